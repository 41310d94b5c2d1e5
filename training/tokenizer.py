"""Stage 0: the nano model's tokenizer, a small byte-level BPE over the captions' language, with all special tokens."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from internvl_u import tokenizer as special
from internvl_u.prompt import PARTIAL_PROMPT, SYSTEM_ANSWER, SYSTEM_DRAW, SYSTEM_EDIT

from .data import captions, edits, questions, riddles
from .data.scenes import counted_scene, random_scene, related_scene

VOCABULARY = 1200
"""Tokens without the special ones."""
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen's tokenizer cuts text into words."""
END, PAD = special.IM_END, special.PAD
SPECIAL = (
    (END, PAD, special.IM_START, special.IMG, special.END_IMG, special.IMG_CONTEXT)
    + ("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
    + (special.IMG_UNCOND,)
)
CORPUS = 8000
SENTENCES = (
    "Here is a random image :",
    PARTIAL_PROMPT,
    "user\nWhat",
    "assistant\n",
    "The quick brown fox jumps over the lazy dog, isn't it? 0123456789",
)


def corpus(seed: int = 0):
    """Yields the texts that the tokenizer learns from."""
    rng = random.Random(seed)
    for i in range(CORPUS):
        scene = (random_scene, related_scene, counted_scene)[i % 3](rng)
        edit, riddle = edits.random_edit(rng), riddles.random_riddle(rng)
        asked = [*questions.questions(rng, scene)[:2], questions.knowledge(rng), *questions.image_pair(rng)[2][:2]]
        texts = [captions.caption(rng, scene), edit.instruction, edits.thought(edit), riddle.text, riddle.thought]
        for text in (*texts, *(part for question in asked for part in (question.text, question.answer))):
            yield text
            yield text[:1].upper() + text[1:] + "."
        for system in (SYSTEM_ANSWER, SYSTEM_DRAW, SYSTEM_EDIT):
            yield f"system\n{system}"
        yield from SENTENCES


def train() -> Tokenizer:
    """Returns the tokenizer, special tokens after all others."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIAL])
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the tokenizer as the released checkpoint has it: the fast file, the older files and their settings."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    special = {name: tokenizer.token_to_id(name) for name in SPECIAL}
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    _write(folder / "added_tokens.json", special)
    named = {"eos_token": END, "pad_token": PAD, "unk_token": PAD}
    listed = [name for name in SPECIAL if name not in (END, PAD)]
    _write(
        folder / "special_tokens_map.json",
        {"additional_special_tokens": listed, **{key: {"content": name, **plain} for key, name in named.items()}},
    )
    settings = {
        "added_tokens_decoder": {
            str(number): {"content": name, **plain, "special": True} for name, number in special.items()
        },
        "additional_special_tokens": listed,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        **named,
        "errors": "replace",
        "extra_special_tokens": {},
        "model_max_length": 4096,
        "padding_side": "left",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
    }
    _write(folder / "tokenizer_config.json", settings)


def vocabulary_size(folder: Path) -> int:
    """Returns how many tokens a saved tokenizer has, special ones included."""
    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()


def _write(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint's processor")
    chosen = parser.parse_args()
    if not (chosen.out / "tokenizer.json").is_file():
        save(train(), chosen.out)
