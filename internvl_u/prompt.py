"""Prompts: the chat template, the three branches of a picture, and token ids.

Structure is made of token ids and never parsed from text: a user who types `<img>` or `<|im_end|>` gets these
characters as plain text, while the official code takes them for structure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .checkpoint import HOW_TO_GET
from .positions import Layout, Span

PAD, IM_START, IM_END, IMG, END_IMG, IMG_CONTEXT, IMG_UNCOND = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<img_uncond>",
)
ROW_TOKENS = ("</box>", "<box>", IMG_CONTEXT, END_IMG, IMG, "</quad>", "<quad>", "</ref>", "<ref>", IMG_UNCOND)
"""Tokens with a row of their own in `special_token_embedding`, in the order of its rows."""

IMAGE_PLACEHOLDER = "<image>"
SENTENCE_ENDS = (".", "!", "?", ",", ":", ";")
WITHOUT_WORDS = "Generate an image based on reference images."

_NAME = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
SYSTEM_ANSWER = _NAME
SYSTEM_DRAW = (
    _NAME
    + "请通过详细描述图像中物体和背景的颜色、形状、大小、纹理、数量、文字内容以及空间位置关系等来对图像进行全面描述："
)
SYSTEM_EDIT = (
    _NAME + "请描述输入图像的关键特征（颜色、形状、大小、纹理、物体、背景等），然后解释用户的文本指令应该如何改变或"
    "修改图像，从而生成一个满足用户要求的新图像，并适当保持与原始输入的一致性。："
)


class Special(NamedTuple):
    """A structural token inside a prompt, as opposed to text."""

    name: str


class Picture(NamedTuple):
    """The place of an input picture inside a prompt."""


class Place(NamedTuple):
    """Where a picture's features are in the ids: from `start` to before `stop`."""

    start: int
    stop: int


Piece = str | Special | Picture


@dataclass(frozen=True)
class TokenIds:
    """A tokenised prompt: its ids, where its pictures' features go, and where the user's turn begins."""

    ids: tuple[int, ...]
    pictures: tuple[Place, ...]
    user: int
    grid: int

    @property
    def layout(self) -> Layout:
        """The context's spans, from the user's turn to the end."""
        spans, position = [], self.user
        for place in self.pictures:
            spans += [Span(place.start - position), Span(place.stop - place.start, self.grid, self.grid)]
            position = place.stop
        return tuple(span for span in (*spans, Span(len(self.ids) - position)) if span.count)


@dataclass(frozen=True)
class Branches:
    """The three prompts of one picture. Without input pictures `partial` is `unconditional`."""

    conditional: TokenIds
    partial: TokenIds
    unconditional: TokenIds


class Tokenizer:
    """Text to ids and back, with special tokens by name only."""

    def __init__(self, source: Path | str):
        """Reads `tokenizer.json`, or the older vocab.json and merges.txt, in a folder; or the text of the former.

        Raises:
            RuntimeError: the tokenizer is unreadable or lacks one of the model's special tokens.
        """
        self._tokenizer = _read_tokenizer(source)
        self._tokenizer.encode_special_tokens = True
        names = dict.fromkeys((PAD, IM_START, IM_END, *ROW_TOKENS))
        self.special = {name: self._tokenizer.token_to_id(name) for name in names}
        missing = [name for name, number in self.special.items() if number is None]
        if missing:
            where = f"in {source}" if isinstance(source, Path) else "of the file"
            raise RuntimeError(f"the tokenizer {where} has no {', '.join(missing)}: it belongs to another model")

    def encode(self, pieces: Sequence[Piece], picture_tokens: int = 0) -> tuple[list[int], list[Place]]:
        """Returns the pieces' ids and the places of the pictures, each `picture_tokens` long."""
        ids: list[int] = []
        pictures: list[Place] = []
        for piece in pieces:
            if isinstance(piece, Special):
                ids.append(self.special[piece.name])
            elif isinstance(piece, Picture):
                pictures.append(Place(len(ids) + 1, len(ids) + 1 + picture_tokens))
                ids += [self.special[IMG], *[self.special[IMG_CONTEXT]] * picture_tokens, self.special[END_IMG]]
            else:
                ids += self._tokenizer.encode(piece, add_special_tokens=False).ids
        return ids, pictures

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def thought_of(self, written: Sequence[int]) -> Thought:
        """Returns the thought that the official code draws from, of all ids that were written."""
        ids = handed_on(written, self.stops)
        return Thought(self.decode(ids), ids)

    def thought(self, text: str) -> tuple[int, ...] | None:
        """Returns the ids of a thought: its own where it remembers them, else those of its text. None: no thought."""
        if isinstance(text, Thought):
            return text.ids
        return tuple(self.encode([text])[0]) if has_thought(text) else None

    @property
    def stops(self) -> tuple[int, ...]:
        """The ids that end what the model writes."""
        return self.special[IM_END], self.special[IMG]


def find_tokenizer(root: Path) -> Path:
    """Returns the folder of a checkpoint that holds the tokenizer: `processor`, or `vlm` in some mirrors.

    Raises:
        FileNotFoundError: neither has one.
    """
    for part in ("processor", "vlm"):
        if (root / part / "tokenizer.json").is_file() or (root / part / "vocab.json").is_file():
            return root / part
    raise FileNotFoundError(f"no tokenizer.json or vocab.json in {root / 'processor'} or {root / 'vlm'}. {HOW_TO_GET}.")


def branches(
    tokenizer: Tokenizer,
    text: str,
    *,
    pictures: int = 0,
    grid: int = 0,
    system: str | None = None,
    thought: Sequence[int] | None = None,
) -> Branches:
    """Returns the prompts for a picture drawn from `text`, or edited from `pictures` input pictures.

    Each picture takes `grid` x `grid` tokens. `system` replaces the default system message; `thought` are the ids of
    a chain of thought that the drawing follows, which may be empty; None: drawn without one. An empty `text` is
    allowed: the user's turn is then empty.

    Raises:
        ValueError: the text has more `<image>` placeholders than there are pictures.
    """
    message = drawing_system(pictures) if system is None else system

    def build(turn: Sequence[Piece]) -> TokenIds:
        return _prompt(tokenizer, message, turn, grid, [tokenizer.special[IMG]])

    nothing = build(["Here is a random image ", Special(IMG_UNCOND), ":"])
    conditional = build(_user_turn(text, pictures))
    partial = build(_with_pictures(f"{IMAGE_PLACEHOLDER}\n" * pictures + WITHOUT_WORDS)) if pictures else nothing
    if thought is not None:
        longest = max(len(tokens.ids) for tokens in (conditional, partial, nothing))
        conditional = _after_thought(tokenizer, conditional, thought, longest)
    return Branches(conditional, partial, nothing)


def _after_thought(tokenizer: Tokenizer, prompt: TokenIds, thought: Sequence[int], longest: int) -> TokenIds:
    """Returns a prompt of the conditional branch with a thought before its last token, `<img>`.

    The official code pads its three prompts on the left to the longest, and after a thought it attends to the padding
    of this one (`_generate_image_with_cot`, `attention_mask_cot`). So a prompt shorter than `longest` begins with pads.
    """
    missing = longest - len(prompt.ids)
    padding = (tokenizer.special[PAD],) * missing
    *opened, drawn = prompt.ids
    places = tuple(Place(place.start + missing, place.stop + missing) for place in prompt.pictures)
    return TokenIds((*padding, *opened, *thought, drawn), places, prompt.user + missing, prompt.grid)


def drawing_system(pictures: int) -> str:
    """Returns the default system message for drawing, or with pictures for editing."""
    return SYSTEM_EDIT if pictures else SYSTEM_DRAW


def opening(tokenizer: Tokenizer, text: str, *, system: str, pictures: int = 0, grid: int = 0) -> TokenIds:
    """Returns the prompt after which the model writes: an answer, or a thought before it draws.

    Raises:
        ValueError: the text has more `<image>` placeholders than there are pictures.
    """
    return _prompt(tokenizer, system, _user_turn(text, pictures), grid)


def has_thought(text: str) -> bool:
    """Tells whether a text is a chain of thought; one that the model wrote may be empty, an empty text is none."""
    return bool(text) or isinstance(text, Thought)


def handed_on(written: Sequence[int], stops: Sequence[int]) -> tuple[int, ...]:
    """Returns the tokens of a written thought that the official code draws from.

    It drops the token that ended the thought and the one before it, or the last two where nothing ended it.
    """
    end = next((i for i, token in enumerate(written) if token in stops), len(written) - 1)
    return tuple(written[: max(end - 1, 0)])


class Thought(str):
    """A thought as text that remembers its tokens, which the text alone does not always give back."""

    ids: tuple[int, ...]

    def __new__(cls, text: str, ids: Sequence[int]):
        made = super().__new__(cls, text)
        made.ids = tuple(ids)
        return made

    def __getnewargs__(self):
        return str(self), self.ids  # so that copies remember too


def _prompt(
    tokenizer: Tokenizer, system: str, turn: Sequence[Piece], grid: int, written: Sequence[int] = ()
) -> TokenIds:
    before, _ = tokenizer.encode([Special(IM_START), f"system\n{system}", Special(IM_END), "\n"])
    first, *rest = turn
    user = ["user\n" + first, *rest] if isinstance(first, str) else ["user\n", first, *rest]
    after = [Special(IM_END), "\n", Special(IM_START), "assistant\n"]
    ids, places = tokenizer.encode([Special(IM_START), *user, *after], grid**2)
    places = [Place(place.start + len(before), place.stop + len(before)) for place in places]
    return TokenIds((*before, *ids, *written), tuple(places), len(before), grid)


def _user_turn(text: str, pictures: int) -> list[Piece]:
    slots = text.count(IMAGE_PLACEHOLDER)
    if slots > pictures:
        raise ValueError(
            f"the prompt has {slots} {IMAGE_PLACEHOLDER} placeholders for {pictures} pictures: connect more "
            "pictures or take placeholders out"
        )
    return _with_pictures(_sentence(f"{IMAGE_PLACEHOLDER}\n" * (pictures - slots) + text))


def _with_pictures(text: str) -> list[Piece]:
    pieces: list[Piece] = []
    for words in text.split(IMAGE_PLACEHOLDER):
        pieces += [Picture(), words]
    return [piece for piece in pieces[1:] if piece != ""] or [""]


def _sentence(text: str) -> str:
    text = text.strip()
    if text:
        text = text[0].upper() + text[1:]
        if not text.endswith(SENTENCE_ENDS):
            text += "."
    return text


def tokenizer_text(folder: Path) -> str:
    """Returns a folder's tokenizer as the text of a tokenizer.json.

    Raises:
        RuntimeError: the tokenizer is unreadable.
    """
    return _read_tokenizer(folder).to_str()


def _read_tokenizer(source: Path | str):
    from tokenizers import Tokenizer as Fast

    try:
        if isinstance(source, str):
            return Fast.from_str(source)
        if (source / "tokenizer.json").is_file():
            return Fast.from_file(str(source / "tokenizer.json"))
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(source), local_files_only=True).backend_tokenizer
    except Exception as error:
        where = f"in {source}" if isinstance(source, Path) else "of the file"
        raise RuntimeError(f"the tokenizer {where} is unreadable ({error}). Download it again.") from error
