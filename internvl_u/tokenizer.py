"""Text to token ids and back. Structural tokens are made by name and never parsed from text.

A user who types `<img>` or `<|im_end|>` gets these characters as plain text, while the official code takes them for
structure.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .defaults import CHARACTERS
from .files import in_short, kind_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer

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


class Special(NamedTuple):
    """A structural token inside a prompt, as opposed to text."""

    name: str


class ImageSlot(NamedTuple):
    """The place of an input image inside a prompt."""


class TokenRange(NamedTuple):
    """Where an image's features are in the ids: from `start` to before `stop`."""

    start: int
    stop: int


Piece = str | Special | ImageSlot


class Thought(str):
    """A thought as text that remembers its tokens, which the text alone does not always give back.

    It is a `str` because ComfyUI's STRING is: whatever node stands between Think and Encode takes it for one.
    """

    ids: tuple[int, ...]

    def __new__(cls, text: str, ids: Sequence[int]) -> Thought:
        thought = super().__new__(cls, text)
        thought.ids = tuple(ids)
        return thought

    def __getnewargs__(self) -> tuple[str, tuple[int, ...]]:
        return str(self), self.ids  # so that copies remember too


class Tokenizer:
    """Text to ids and back, with special tokens by name only."""

    def __init__(self, source: Path | str):
        """Reads `tokenizer.json`, or the older vocab.json and merges.txt, in a folder; or the text of the former.

        Raises:
            RuntimeError: the tokenizer is unreadable or lacks one of the model's special tokens.
        """
        self._tokenizer = _read(source)
        self._tokenizer.encode_special_tokens = True
        # Its own settings would cut the prompt or fill it up without a word.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.special: dict[str, int] = {}
        missing = []
        for name in dict.fromkeys((PAD, IM_START, IM_END, *ROW_TOKENS)):
            number = self._tokenizer.token_to_id(name)
            if number is None:
                missing.append(name)
            else:
                self.special[name] = number
        if missing:
            raise RuntimeError(
                f"the tokenizer {_where(source)} has no {', '.join(missing)}: it belongs to another model"
            )

    @property
    def special_token_rows(self) -> dict[int, int]:
        """Row in `special_token_embedding` by token id."""
        return {self.special[name]: row for row, name in enumerate(ROW_TOKENS)}

    @property
    def stops(self) -> tuple[int, ...]:
        """The ids that end what the model writes."""
        return self.special[IM_END], self.special[IMG]

    def encode(self, pieces: Sequence[Piece], image_tokens: int = 0) -> tuple[list[int], list[TokenRange]]:
        """Returns the pieces' ids and the places of the images' features, each `image_tokens` long."""
        ids: list[int] = []
        images: list[TokenRange] = []
        for piece in pieces:
            if isinstance(piece, Special):
                ids.append(self.special[piece.name])
            elif isinstance(piece, ImageSlot):
                images.append(TokenRange(len(ids) + 1, len(ids) + 1 + image_tokens))
                ids += [self.special[IMG], *[self.special[IMG_CONTEXT]] * image_tokens, self.special[END_IMG]]
            else:
                text = _whole(piece)
                with _library_errors("this text cannot be encoded"):
                    ids += self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids, images

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, without special tokens."""
        with _library_errors("what was written cannot be decoded"):
            return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def decode_thought(self, written: Sequence[int]) -> Thought:
        """Returns the thought that the official code draws from, of all ids that were written."""
        ids = trim_thought(written, self.stops)
        return Thought(self.decode(ids), ids)

    def encode_thought(self, text: str) -> tuple[int, ...] | None:
        """Returns the ids of a thought: its own where it remembers them, else those of its text. None: no thought."""
        if isinstance(text, Thought):
            return text.ids
        return tuple(self.encode([text])[0]) if has_thought(text) else None


def has_thought(text: str) -> bool:
    """Returns whether a text is a chain of thought; one that the model wrote may be empty, an empty text is none."""
    return bool(text) or isinstance(text, Thought)


def trim_thought(written: Sequence[int], stops: Sequence[int]) -> tuple[int, ...]:
    """Returns the tokens of a written thought that the official code draws from.

    It drops the token that ended the thought and the one before it, or the last two where nothing ended it.
    """
    end = next((i for i, token in enumerate(written) if token in stops), len(written) - 1)
    return tuple(written[: max(end - 1, 0)])


def tokenizer_json(folder: Path) -> str:
    """Returns a folder's tokenizer as the text of a tokenizer.json.

    Raises:
        RuntimeError: the tokenizer is unreadable.
    """
    return _read(folder).to_str()


def _read(source: Path | str) -> FastTokenizer:
    from tokenizers import Tokenizer as FastTokenizer

    with _library_errors(f"the tokenizer {_where(source)} is unreadable"):
        if isinstance(source, str):
            return FastTokenizer.from_str(source)
        file = source / "tokenizer.json"
        if file.is_file():
            head = file.read_bytes()[:512]
            if what := kind_of(head, len(head)):
                raise RuntimeError(f"{file} {what}")
            # The library cannot open a path that Python has in surrogate escapes, as beyond ASCII in the C locale.
            return FastTokenizer.from_str(file.read_text(encoding="utf-8"))
        from transformers import AutoTokenizer

        # The files may name code of their own: it is never run, and nobody is asked whether it may.
        read = AutoTokenizer.from_pretrained(str(source), local_files_only=True, trust_remote_code=False)
        return read.backend_tokenizer


def _whole(text: str) -> str:
    """Returns the text.

    Raises:
        ValueError: it is no text, too long for any context, or holds half a character, which no tokenizer knows.
    """
    if not isinstance(text, str):
        raise ValueError(f"a {type(text).__name__} found, a text expected")
    if len(text) > CHARACTERS:
        raise ValueError(f"a text of {len(text)} characters found, {CHARACTERS} expected at most")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"half a character (a lone surrogate, {text[error.start]!r}) found at place {error.start} of the text: "
            "take it out"
        ) from None
    return text


@contextlib.contextmanager
def _library_errors(what: str) -> Iterator[None]:
    """Turns what the tokenizers library raises into one kind of error.

    Raises:
        RuntimeError: it failed. Its own panics are no Exception, and would end ComfyUI's worker thread.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise RuntimeError(f"{what} ({in_short(error)})") from error


def _where(source: Path | str) -> str:
    return f"in {source}" if isinstance(source, Path) else "of the file"
