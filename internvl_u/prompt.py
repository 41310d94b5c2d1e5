"""The chat template and the three branches of an image, as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .chat import Turn
from .defaults import IMAGES
from .rope import Layout, Span
from .tokenizer import IM_END, IM_START, IMG, IMG_UNCOND, PAD, ImageSlot, Piece, Special, Tokenizer, TokenRange

IMAGE_PLACEHOLDER = "<image>"
SENTENCE_ENDS = (".", "!", "?", ",", ":", ";")
THOUGHT_PIECE = 128
"""Tokens of a thought that are read at once: so many of a longer one need not be read again."""
PARTIAL_PROMPT = "Generate an image based on reference images."

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
_ANSWER: tuple[Piece, ...] = (Special(IM_START), "assistant\n")


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt's ids, where its images' features go, and where the user's last turn begins.

    Each image takes `grid` x `grid` tokens. The model reads a prompt in pieces, which end at `cuts` and at its end:
    then what has been read of one prompt serves for another that begins with the same pieces, to the same bits.
    """

    ids: tuple[int, ...]
    images: tuple[TokenRange, ...]
    user_start: int
    grid: int
    cuts: tuple[int, ...] = ()

    @property
    def pieces(self) -> list[TokenRange]:
        """The pieces in which the prompt is read."""
        ends = (*self.cuts, len(self.ids))
        return [TokenRange(start, end) for start, end in zip((0, *ends), ends, strict=False) if start < end]

    @property
    def layout(self) -> Layout:
        """The context's spans, from the user's last turn to the end."""
        spans, position = [], self.user_start
        for image in self.images:
            if image.start < self.user_start:
                continue  # of a turn before: the language model reads it, the transformer is not handed it
            spans += [Span(image.start - position), Span(image.stop - image.start, self.grid, self.grid)]
            position = image.stop
        return tuple(span for span in (*spans, Span(len(self.ids) - position)) if span.count)


@dataclass(frozen=True)
class BranchPrompts:
    """The three prompts of one image. Without input images `partial` is `unconditional`."""

    conditional: TokenizedPrompt
    partial: TokenizedPrompt
    unconditional: TokenizedPrompt


def branch_prompts(
    tokenizer: Tokenizer,
    text: str,
    *,
    images: int = 0,
    grid: int = 0,
    system: str | None = None,
    thought: Sequence[int] | None = None,
    negative: str = "",
    earlier: Sequence[Turn] = (),
) -> BranchPrompts:
    """Returns the prompts for an image drawn from `text`, or edited from `images` input images.

    Each image takes `grid` x `grid` tokens. `system` replaces the default system message; `thought` are the ids of a
    chain of thought that the drawing follows, which may be empty; None: drawn without one. An empty `text` is allowed:
    the user's turn is then empty. `negative` is a text that the unconditional branch reads in place of its own, which
    the official code has no way to change; the two other branches stay as they are.

    `earlier` are the turns of a conversation before this one; their images come before the `images` in the conditional
    prompt. They are words to follow, so the other two prompts are without them. The language model reads them, and only
    the last turn is handed on to the transformer, so that what it is handed stays as long as in training. (The official
    code hands on all from the first user's turn on, and draws in no conversation. The nano model, which was trained
    with none, draws after one turn 18 of 30 things right this way, and 0 of 30 the other way.)

    Raises:
        ValueError: a text has more `<image>` placeholders than there are images, or there are more than 64 of these.
    """
    message = drawing_system(images) if system is None else system

    def build(turn: Sequence[Piece], earlier: Sequence[Turn] = ()) -> TokenizedPrompt:
        return _prompt(tokenizer, message, turn, grid, [tokenizer.special[IMG]], earlier)

    unconditional = build(["Here is a random image ", Special(IMG_UNCOND), ":"])
    conditional = build(_user_turn(text, images), earlier)
    partial = build(_with_images(f"{IMAGE_PLACEHOLDER}\n" * images + PARTIAL_PROMPT)) if images else unconditional
    if thought is not None:
        longest = max(len(prompt.ids) for prompt in (conditional, partial, unconditional))
        conditional = _with_thought(tokenizer, conditional, thought, longest)
    if negative.strip():
        unconditional = build(_user_turn(negative, 0, "negative prompt"))
        partial = partial if images else unconditional
    return BranchPrompts(conditional, partial, unconditional)


def check_images(count: int) -> None:
    """Makes sure that a prompt may have so many images. To be asked before any work.

    Raises:
        ValueError: there are too many.
    """
    if count > IMAGES:
        raise ValueError(
            f"{count} pictures found, {IMAGES} expected at most: give fewer, or pick some of a video's frames"
        )


def drawing_system(images: int) -> str:
    """Returns the default system message for drawing, or with input images for editing."""
    return SYSTEM_EDIT if images else SYSTEM_DRAW


def generation_prompt(
    tokenizer: Tokenizer, text: str, *, system: str, images: int = 0, grid: int = 0, earlier: Sequence[Turn] = ()
) -> TokenizedPrompt:
    """Returns the prompt after which the model writes: an answer, or a thought before it draws.

    `earlier` are the turns of a conversation before this one; their images come before the `images`.

    Raises:
        ValueError: the text has more `<image>` placeholders than there are images, or there are more than 64 of these.
    """
    return _prompt(tokenizer, system, _user_turn(text, images), grid, earlier=earlier)


def plain_prompt(tokenizer: Tokenizer, text: str, *, images: int = 0, grid: int = 0) -> TokenizedPrompt:
    """Returns a text as it is, with its images and without the chat template: the model goes on with it.

    Raises:
        ValueError: there is nothing to go on with, the text has more `<image>` placeholders than there are images, or
            there are more than 64 of these.
    """
    ids, places = tokenizer.encode(_with_images(_with_placeholders(text, images)), grid**2)
    if not ids:
        raise ValueError("an empty text found, one to go on with expected: without the template nothing is added to it")
    return TokenizedPrompt(tuple(ids), tuple(places), 0, grid)


def _with_thought(
    tokenizer: Tokenizer, prompt: TokenizedPrompt, thought: Sequence[int], longest: int
) -> TokenizedPrompt:
    """Returns a prompt of the conditional branch with a thought before its last token, `<img>`.

    The official code pads its three prompts on the left to the longest, and after a thought it attends to the padding
    of this one (`_generate_image_with_cot`, `attention_mask_cot`). So a prompt shorter than `longest` begins with pads.
    """
    missing = longest - len(prompt.ids)
    padding = (tokenizer.special[PAD],) * missing
    *before, drawn = prompt.ids
    images = tuple(TokenRange(image.start + missing, image.stop + missing) for image in prompt.images)
    ids = (*padding, *before, *thought, drawn)
    cuts = [cut + missing for cut in prompt.cuts]
    cuts += range(missing + len(before), len(ids), THOUGHT_PIECE)  # up to here Think has read the prompt already
    return TokenizedPrompt(ids, images, prompt.user_start + missing, prompt.grid, tuple(cuts))


def _prompt(
    tokenizer: Tokenizer,
    system: str,
    turn: Sequence[Piece],
    grid: int,
    ending: Sequence[int] = (),
    earlier: Sequence[Turn] = (),
) -> TokenizedPrompt:
    ids: list[int] = []
    images: list[TokenRange] = []
    cuts: list[int] = []

    def add(pieces: Sequence[Piece]) -> None:
        added, places = tokenizer.encode(pieces, grid**2)
        images.extend(TokenRange(place.start + len(ids), place.stop + len(ids)) for place in places)
        ids.extend(added)

    add([Special(IM_START), f"system\n{system}", Special(IM_END), "\n"])
    for one in earlier:
        opening, said = _earlier_turn(one)
        if one.role == "user":
            cuts.append(len(ids))
        add(opening)
        if one.role == "assistant":
            cuts.append(len(ids))  # where the prompt ended after which this was written
        add(said)
    cuts.append(len(ids))
    add([*_opened("user", turn), *_ANSWER])
    return TokenizedPrompt((*ids, *ending), tuple(images), cuts[-1], grid, tuple(cuts))


def _opened(role: str, turn: Sequence[Piece]) -> list[Piece]:
    first, *rest = turn
    words = [f"{role}\n{first}", *rest] if isinstance(first, str) else [f"{role}\n", first, *rest]
    return [Special(IM_START), *words, Special(IM_END), "\n"]


def _earlier_turn(turn: Turn) -> tuple[list[Piece], list[Piece]]:
    """Returns a turn of the conversation as the model read or wrote it: what opens it, and the rest.

    A picture that it drew comes after its words, where its own `<img>` stood. What it thought is left out, as the chat
    template of Qwen3 does for turns that are over.
    """
    images = len(turn.pictures)
    if turn.role == "user":
        return [], _opened("user", _user_turn(_fewer_placeholders(turn.text, images), images))
    words = [turn.text] if turn.text else []
    return [*_ANSWER], [*words, *[ImageSlot()] * images, Special(IM_END), "\n"]


def _fewer_placeholders(text: str, images: int) -> str:
    """Returns a text with no more placeholders than images: pictures of a turn may be left out."""
    return text if text.count(IMAGE_PLACEHOLDER) <= images else text.replace(IMAGE_PLACEHOLDER, "")


def _user_turn(text: str, images: int, name: str = "prompt") -> list[Piece]:
    return _with_images(_sentence(_with_placeholders(text, images, name)))


def _with_placeholders(text: str, images: int, name: str = "prompt") -> str:
    check_images(images)
    slots = text.count(IMAGE_PLACEHOLDER)
    if slots > images:
        raise ValueError(
            f"the {name} has {slots} {IMAGE_PLACEHOLDER} placeholders for {images} pictures: connect more "
            "pictures or take placeholders out"
        )
    return f"{IMAGE_PLACEHOLDER}\n" * (images - slots) + text


def _with_images(text: str) -> list[Piece]:
    pieces: list[Piece] = []
    for words in text.split(IMAGE_PLACEHOLDER):
        pieces += [ImageSlot(), words]
    return [piece for piece in pieces[1:] if piece != ""] or [""]


def _sentence(text: str) -> str:
    text = text.strip()
    if text:
        text = text[0].upper() + text[1:]
        if not text.endswith(SENTENCE_ENDS):
            text += "."
    return text
