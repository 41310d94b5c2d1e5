"""One message of a conversation: what the model reads of the conversation, and whether it answers or draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from .chat import History, Picture, Turn
from .prompt import IMAGE_PLACEHOLDER, SYSTEM_ANSWER, drawing_system
from .tokenizer import IMG, Tokenizer

DECIDE, ANSWER, DRAW, EDIT, THINK_DRAW, THINK_EDIT = ACTIONS = (
    "decide by itself",
    "answer",
    "draw",
    "edit the last picture",
    "think and draw",
    "think and edit",
)
WHOLE, WORDS, LAST_PICTURE = READS = ("whole conversation", "words and last picture", "last picture alone")


class Speaker(Protocol):
    """A model that writes and draws."""

    @property
    def tokenizer(self) -> Tokenizer:
        """What its ids mean."""
        ...

    def write(
        self, text: str, system: str, images: Sequence[Image.Image], history: History, *, thinks: bool
    ) -> list[int]:
        """Returns the ids that it writes: of an answer, or where it `thinks` of a thought."""
        ...

    def draw(self, text: str, images: Sequence[Image.Image], history: History, thought: str) -> Picture:
        """Returns the picture that it draws, or makes of `images`."""
        ...


@dataclass(frozen=True)
class Message:
    """What the user says: a text with pictures, what is to be done, and how much of the conversation is read."""

    text: str
    pictures: tuple[Picture, ...] = ()
    action: str = DECIDE
    reads: str = WHOLE

    def __post_init__(self):
        for name, known in (("action", ACTIONS), ("reads", READS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} found, one of {', '.join(known)} expected")


def reply(speaker: Speaker, history: History, message: Message) -> History:
    """Returns the conversation gone on with the message and with what the model made of it.

    A picture that it decides to draw by itself is drawn of the message's words and pictures; what it wrote before its
    own `<img>` is the thought.

    Raises:
        ValueError: there is nothing to edit, or what the speaker raises: then nothing has happened.
    """
    asked = Turn("user", message.text, message.pictures)
    if message.action in (DECIDE, ANSWER):
        before, images = _context(history, message, sees=True)
        written = speaker.write(message.text, SYSTEM_ANSWER, images, before, thinks=False)
        if message.action == ANSWER or speaker.tokenizer.special[IMG] not in written:
            return history.add(asked, Turn("assistant", speaker.tokenizer.decode(written)))
        thought = speaker.tokenizer.decode_thought(written)
        before, images = _context(history, message, sees=False)
        return history.add(asked, _drawn(speaker.draw(message.text, images, before, thought), thought))

    edits = message.action in (EDIT, THINK_EDIT)
    if edits and not message.pictures and history.last_picture is None:
        raise ValueError("no picture found to edit, neither in the message nor before it: give one, or draw one first")
    before, images = _context(history, message, sees=edits)
    thought = ""
    if message.action in (THINK_DRAW, THINK_EDIT):
        system = drawing_system(len(images))
        written = speaker.write(message.text, system, images, before, thinks=True)
        thought = speaker.tokenizer.decode_thought(written)
    return history.add(asked, _drawn(speaker.draw(message.text, images, before, thought), thought))


def new_pictures(history: History, text: str, pictures: Sequence[Picture]) -> tuple[Picture, ...]:
    """Returns those of the pictures that the conversation has not shown yet, by the names of their files.

    What stays connected is so not shown with each message anew; a text that names `<image>` means all of them.
    """
    if IMAGE_PLACEHOLDER in text:
        return tuple(pictures)
    known = {picture.name for turn in history.turns for picture in turn.pictures}
    return tuple(picture for picture in pictures if picture.name not in known)


def _context(history: History, message: Message, *, sees: bool) -> tuple[History, tuple[Image.Image, ...]]:
    """Returns the turns that the model reads before the message, and the images that come with it.

    `sees`: where the message brings none, it is about the last picture. To be edited it has to come with the message;
    the model then reads the words alone before it, and not each picture twice.
    """
    images = tuple(picture.image for picture in message.pictures)
    last = history.last_picture
    edits = message.action in (EDIT, THINK_EDIT)
    if sees and not images and last is not None and (edits or message.reads != WHOLE):
        images = (last.image,)
    if message.reads == LAST_PICTURE:
        return history.clear(), images
    return (history if message.reads == WHOLE and not edits else history.without_pictures()), images


def _drawn(picture: Picture, thought: str) -> Turn:
    return Turn("assistant", "", (picture,), thought)
