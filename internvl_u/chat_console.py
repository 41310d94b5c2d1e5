"""`python -m internvl_u chat`: a conversation from the terminal, or from lines of a pipe."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .defaults import ANSWER_TOKENS, STEPS

if TYPE_CHECKING:
    from PIL import Image

    from .chat import History, Picture
    from .pipeline import Pipeline
    from .tokenizer import Tokenizer

HELP = """\
TEXT         says it; the model answers, or draws if it decides to
/ask TEXT    lets it answer in words
/draw TEXT   draws it
/edit TEXT   changes the last picture
/think TEXT  thinks first, then draws it; /think /edit TEXT thinks first, then changes the last picture
/image FILE  shows a picture with the next message
/clear       begins a new conversation
/save FILE   writes the conversation to FILE.md or FILE.json
/help, /quit"""
READS = {"whole": "whole conversation", "words": "words and last picture", "picture": "last picture alone"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes besides the model, its dtype and its device."""
    parser.epilog, parser.formatter_class = HELP, argparse.RawDescriptionHelpFormatter
    parser.add_argument("--width", type=int, metavar="W", help="of new pictures, in pixels (default: the model's own)")
    parser.add_argument("--height", type=int, metavar="H", help="of new pictures, in pixels (default: the model's own)")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help="denoising steps (default %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of the first picture; one more for each (default %(default)s)"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=ANSWER_TOKENS,
        metavar="N",
        help="longest answer or thought (default %(default)s)",
    )
    parser.add_argument(
        "--reads",
        choices=READS,
        default="whole",
        help="of the conversation before a message: all of it, its words and the last picture, or that picture alone "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path(), metavar="DIR", help="folder for pictures (default: this one)"
    )


def run(options: argparse.Namespace, pipeline: Pipeline) -> None:
    """Answers the lines of stdin until they end, or until /quit.

    On a terminal a message that fails is told of, and the conversation goes on; in a pipe it ends the command.

    Raises:
        ValueError, RuntimeError, OSError: a message of a pipe failed, or --out is no folder.
    """
    from .chat import History

    if not options.out.is_dir():
        raise FileNotFoundError(f"no folder {options.out} for --out. Make it first.")
    talk = Talk(ConsoleSpeaker(pipeline, options), READS[options.reads], History())
    asks = sys.stdin.isatty()
    if asks:
        _tell(HELP)
    for line in _lines(asks):
        try:
            if not talk.take(line):
                return
        except KeyboardInterrupt:
            if not asks:
                raise
            _tell("interrupted")
        except (ValueError, RuntimeError, OSError) as error:
            if not asks:
                raise
            _tell(f"internvl_u: {' '.join(str(error).split())}")


def _lines(asks: bool) -> Iterator[str]:
    while True:
        if asks:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.strip()


def _tell(text: str) -> None:
    print(text, file=sys.stderr)


@dataclass
class Talk:
    """The conversation, and the pictures that go with the next message."""

    speaker: ConsoleSpeaker
    reads: str
    history: History
    pictures: list[Picture] = field(default_factory=list)

    def take(self, line: str) -> bool:
        """Does what a line says. Returns whether another one may come.

        Raises:
            ValueError: it is no command, or its message cannot be answered: then it has changed nothing.
        """
        from . import reply

        command, _, text = line.partition(" ") if line.startswith("/") else ("", "", line)
        text = text.strip()
        act: dict[str, Callable[[str], object]] = {
            "": lambda text: text and self._say(text, reply.DECIDE),
            "/ask": lambda text: self._say(text, reply.ANSWER),
            "/draw": lambda text: self._say(text, reply.DRAW),
            "/edit": lambda text: self._say(text, reply.EDIT),
            "/think": self._think,
            "/image": self._show,
            "/clear": lambda _: self._clear(),
            "/save": self._save,
            "/help": lambda _: _tell(HELP),
        }
        if command == "/quit":
            return False
        if command not in act:
            raise ValueError(f"{command} found, one of {', '.join(filter(None, act))}, /quit expected")
        act[command](text)
        return True

    def _think(self, text: str) -> None:
        from . import reply

        edits = text.startswith("/edit ")
        self._say(text.removeprefix("/edit ").strip(), reply.THINK_EDIT if edits else reply.THINK_DRAW)

    def _say(self, text: str, action: str) -> None:
        from .reply import Message, reply

        if not text:
            raise ValueError("a command without a text found: type what to draw or to change behind it")
        self.history = reply(self.speaker, self.history, Message(text, tuple(self.pictures), action, self.reads))
        self.pictures.clear()

    def _show(self, name: str) -> None:
        from PIL import Image, UnidentifiedImageError

        from .chat import Picture
        from .images import preprocessing_warnings, to_rgb

        try:
            with Image.open(name) as image:
                image.load()
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
            raise ValueError(f"/image {name} is not readable as a picture ({error})") from error
        for warning in preprocessing_warnings(image, self.speaker.pipeline.encoder.sizes):
            _tell(f"internvl_u: {name}: {warning}")
        self.pictures.append(Picture(to_rgb(image), name))

    def _clear(self) -> None:
        self.history = self.history.clear()
        self.pictures.clear()

    def _save(self, name: str) -> None:
        writers = {".md": self.history.to_markdown, ".json": self.history.to_json}
        file = Path(name)
        if file.suffix.lower() not in writers:
            raise ValueError(f"/save {name} found, a name ending in .md or .json expected")
        file.write_text(writers[file.suffix.lower()](), encoding="utf-8")


@dataclass
class ConsoleSpeaker:
    """A pipeline as `reply` wants it: answers stream to stdout, thoughts to stderr, pictures go into files."""

    pipeline: Pipeline
    options: argparse.Namespace
    drawn: int = 0

    @property
    def tokenizer(self) -> Tokenizer:
        """What its ids mean."""
        return self.pipeline.encoder.tokenizer

    def write(
        self, text: str, system: str, images: Sequence[Image.Image], history: History, *, thinks: bool
    ) -> list[int]:
        """Returns the ids that it writes, and prints them meanwhile."""
        from .generation import GenerationConfig

        stream = sys.stderr if thinks else sys.stdout
        told = ""

        def show(ids: list[int]) -> None:
            nonlocal told
            said = self.tokenizer.decode(ids).rstrip("\ufffd")  # the beginning of a character of several tokens
            if said.startswith(told) and len(said) > len(told):
                print(said[len(told) :], end="", file=stream, flush=True)
                told = said

        config = GenerationConfig(self.options.max_new_tokens)
        try:
            written = self.pipeline.generate(text, images, system, config, show, history)
            print(self.tokenizer.decode(written).removeprefix(told), end="", file=stream)
            return written
        finally:
            print(file=stream, flush=True)

    def draw(self, text: str, images: Sequence[Image.Image], history: History, thought: str) -> Picture:
        """Returns the picture that it draws, and prints the name of its file."""
        from PIL.PngImagePlugin import PngInfo
        from tqdm import tqdm

        from .chat import Picture
        from .pipeline import ImageRequest
        from .results import check_target, save_image

        width, height = (None, None) if images else (self.options.width, self.options.height)
        seed = self.options.seed + self.drawn
        request = ImageRequest(
            text, width, height, self.options.steps, seed, images=tuple(images), thought=thought, history=history
        )
        file = self._free_name()
        check_target(file)
        with tqdm(total=request.steps, unit="step", desc="draw") as bar:
            image = self.pipeline.draw(request, lambda done: bar.update(done - bar.n))
        save_image(image, file, PngInfo())
        self.drawn += 1
        print(file, flush=True)
        return Picture(image, str(file))

    def _free_name(self) -> Path:
        names = (self.options.out / f"picture_{number:03}.png" for number in itertools.count(1))
        return next(name for name in names if not name.exists())
