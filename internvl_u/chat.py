"""A conversation as a value: its turns with their pictures, kept as JSON, told as Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, NamedTuple

from PIL import Image
from pydantic import Field

from .defaults import CHARACTERS
from .schema import Section, checked, parse

Role = Literal["user", "assistant"]
ROLES: tuple[Role, Role] = ("user", "assistant")
NAMES = {"user": "You", "assistant": "InternVL-U"}
TURNS, PICTURES = 10_000, 64
"""The most turns of a conversation that is read, and the most pictures of a turn."""


class Picture(NamedTuple):
    """An RGB image, and the name of the file that it is kept in; "" where it is in none."""

    image: Image.Image
    name: str = ""


@dataclass(frozen=True)
class Turn:
    """What one side said at once. `thought` is what the model thought before it drew: kept, but not read again."""

    role: Role
    text: str = ""
    pictures: tuple[Picture, ...] = ()
    thought: str = ""

    def __post_init__(self):
        if self.role not in ROLES:
            raise ValueError(f"role {self.role!r} found, one of {', '.join(ROLES)} expected")


@dataclass(frozen=True)
class History:
    """A conversation so far. It is never changed: whatever adds or takes away returns another one."""

    turns: tuple[Turn, ...] = ()

    def __len__(self) -> int:
        return len(self.turns)

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """All images, in the order in which the model reads them."""
        return tuple(picture.image for turn in self.turns for picture in turn.pictures)

    @property
    def last_picture(self) -> Picture | None:
        """The newest picture of either side."""
        return next((turn.pictures[-1] for turn in reversed(self.turns) if turn.pictures), None)

    def add(self, *turns: Turn) -> History:
        """Returns the conversation gone on with."""
        return History((*self.turns, *turns))

    def branch(self, turns: int) -> History:
        """Returns the first `turns` turns, to go on from there in another way.

        Raises:
            ValueError: there are not as many.
        """
        if not 0 <= turns <= len(self):
            raise ValueError(f"{turns} turns found, 0 to {len(self)} expected")
        return History(self.turns[:turns])

    def clear(self) -> History:
        """Returns a conversation without a turn."""
        return History()

    def without_pictures(self) -> History:
        """Returns the words alone; a turn that was only a picture is kept, empty."""
        return History(tuple(replace(turn, pictures=()) for turn in self.turns))

    def without_oldest(self) -> History:
        """Returns the conversation without its oldest message of the user and what was answered to it."""
        after = (i for i, turn in enumerate(self.turns) if i and turn.role == "user")
        return History(self.turns[next(after, len(self)) :])

    def fit(self, length: Callable[[History], int], allowed: int) -> History:
        """Returns as much of the end of the conversation as fits, in whole messages with their answers.

        `length(history)` are the tokens of the prompt with `history` before it, `allowed` how many there may be.
        """
        history = self
        while history.turns and length(history) > allowed:
            history = history.without_oldest()
        return history

    def to_json(self) -> str:
        """Returns the conversation as JSON, each picture as the name of its file."""
        return json.dumps({"turns": [_entry(turn) for turn in self.turns]}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, open_picture: Callable[[str], Image.Image]) -> History:
        """Returns the conversation that `to_json` wrote; "" is an empty one.

        `open_picture(name)` returns the RGB image of a name.

        Raises:
            ValueError: the text is something else; says where.
        """
        if not text.strip():
            return cls()
        if len(text) > CHARACTERS:
            raise ValueError(f"a conversation of {len(text)} characters found, {CHARACTERS} expected at most")
        try:
            read = checked(_Conversation, parse(text, "the conversation"), "the conversation")
        except RuntimeError as error:
            raise ValueError(f"{error}: a text found, the conversation of an earlier run expected") from error
        return cls(
            tuple(
                Turn(
                    turn.role,
                    turn.text,
                    tuple(Picture(open_picture(name), name) for name in turn.pictures),
                    turn.thought,
                )
                for turn in read.turns
            )
        )

    def to_markdown(self) -> str:
        """Returns the conversation as Markdown, its pictures by the names of their files."""
        return "\n\n".join(part for turn in self.turns for part in _told(turn)) + "\n" if self.turns else ""


class _Turn(Section):
    role: Role
    text: str = ""
    pictures: Annotated[list[str], Field(max_length=PICTURES)] = []
    thought: str = ""


class _Conversation(Section):
    turns: Annotated[list[_Turn], Field(max_length=TURNS)] = []


def _entry(turn: Turn) -> dict[str, object]:
    entry: dict[str, object] = {"role": turn.role, "text": turn.text}
    if turn.pictures:
        entry["pictures"] = [picture.name for picture in turn.pictures]
    if turn.thought:
        entry["thought"] = str(turn.thought)
    return entry


def _told(turn: Turn) -> Sequence[str]:
    parts = [f"**{NAMES[turn.role]}**"]
    if turn.thought:
        parts.append("\n".join(f"> {line}".rstrip() for line in turn.thought.splitlines()))
    if turn.text:
        parts.append(turn.text)
    return [*parts, *(f"![{_plain(one.name)}](<{_plain(one.name)}>)" for one in turn.pictures)]


def _plain(name: str) -> str:
    """Returns a file's name without what would end a link of Markdown."""
    return "".join(letter for letter in name if letter.isprintable() and letter not in "[]<>")
