"""A text beside each picture of a folder, as trainers read them: NAME.txt for NAME.png."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image
from tqdm import tqdm

from .console import shown_name
from .images import open_image, to_rgb
from .results import replace_text

if TYPE_CHECKING:
    from .generation import GenerationConfig
    from .pipeline import Pipeline

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Of files that are taken for pictures, in any case."""


class FolderTexts(NamedTuple):
    """The texts that were written, those that were there before, and a sentence for each picture without one."""

    written: list[Path]
    skipped: list[Path]
    failed: list[str]


def pictures_in(folder: Path) -> list[Path]:
    """Returns a folder's pictures by name; hidden files and folders inside it are none.

    Raises:
        FileNotFoundError: there is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder} found: give the name of one that holds pictures")
    files = sorted(file for file in folder.iterdir() if not file.name.startswith(".") and file.is_file())
    pictures = [file for file in files if file.suffix.lower() in ENDINGS]
    if not pictures:
        raise FileNotFoundError(
            f"{len(files)} files and no picture found in {folder}, one of {' '.join(ENDINGS)} expected"
        )
    return pictures


def write_texts(
    pictures: list[Path],
    describe: Callable[[Image.Image], str],
    overwrite: bool = False,
    on_picture: Callable[[Path], object] = lambda file: None,
) -> FolderTexts:
    """Writes what `describe` says of each picture into a text file beside it, whole or not at all.

    A text that is there stays, unless `overwrite`; so the same call goes on after an interruption. A picture that
    cannot be read, or whose text cannot be written, is told of and does not keep the others from theirs.
    `on_picture(file)` is called after each.
    """
    done = FolderTexts([], [], [])
    owners: dict[Path, Path] = {}
    for picture in pictures:
        text = picture.with_suffix(".txt")
        owner = owners.setdefault(text, picture)
        if owner != picture:
            done.failed.append(f"{picture} left out: {text.name} is that of {owner.name}. Rename one of the two")
        elif text.exists() and not overwrite:
            done.skipped.append(text)
        else:
            try:
                replace_text(describe(open_image(picture)), text)
                done.written.append(text)
            except (ValueError, OSError) as error:
                done.failed.append(str(error))
        on_picture(picture)
    return done


def ask_of_each(
    pictures: list[Path],
    pipeline: Pipeline,
    question: str,
    system: str | None,
    config: GenerationConfig,
    overwrite: bool,
) -> list[str]:
    """Writes the answer about each picture beside it and tells of it on stderr; returns the names of the new texts.

    Raises:
        RuntimeError: some pictures have no text, the others have.
    """

    def describe(picture: Image.Image) -> str:
        return pipeline.answer(question, (to_rgb(picture),), system, config)

    with tqdm(total=len(pictures), unit="picture", desc="ask") as bar:
        done = write_texts(pictures, describe, overwrite, lambda file: bar.update())
    for sentence in done.failed:
        tqdm.write(f"internvl_u: {shown_name(sentence)}", file=sys.stderr)
    if done.skipped:
        tqdm.write(f"internvl_u: {len(done.skipped)} texts were there and stay; see --overwrite", file=sys.stderr)
    if done.failed:
        raise RuntimeError(
            f"{len(done.failed)} of {len(pictures)} pictures have no text; {len(done.written)} texts were written"
        )
    return [shown_name(str(file)) for file in done.written]
