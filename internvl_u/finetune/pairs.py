"""Pairs to learn control from: each picture of a folder with a map of it, and the words that go with that."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

from ..console import shown_name
from ..defaults import LARGEST, MAP_SIZE, SMALLEST
from ..folder import pictures_in
from ..images import open_image, to_rgb
from ..numbers import check_whole
from ..results import replace_text
from ..schema import read_json
from .maps import DEFAULT, Thresholds, make_map, map_instruction

BEFORE, AFTER = "before", "after"
SETTINGS = "pairs.json"
"""In the folder of pairs: what they were made with."""
LARGEST_CAPTION = 1 << 16
"""Bytes of a picture's text file."""


class Pairs(NamedTuple):
    """The pictures that were written as pairs, those that were there before, and a sentence for each one left out."""

    written: list[Path]
    skipped: list[Path]
    failed: list[str]


def make_pairs(
    pictures: list[Path],
    out: Path,
    kind: str,
    thresholds: Thresholds = DEFAULT,
    size: int = MAP_SIZE,
    on_picture: Callable[[Path], object] = lambda file: None,
) -> Pairs:
    """Writes before/NAME.png (the map), after/NAME (the picture as it is) and after/NAME.txt (the words) into `out`.

    The map is that of the picture at the area of `size` x `size` pixels at most: edges of more are too fine for the
    model. Each pair is whole or not there, and stays as it is once it is there; so the same call goes on after an
    interruption. A picture that cannot be read is told of, and does not keep the others from theirs.
    `on_picture(file)` is called after each.

    Raises:
        ValueError: `out` holds pairs of other settings, or something else; or the thresholds or the size are none.
        OSError: nothing can be written there.
    """
    thresholds.check()
    check_whole("size", size, SMALLEST, LARGEST, "pixels")
    _open(out, {"kind": kind, **thresholds._asdict(), "size": size})
    done = Pairs([], [], [])
    owners: dict[str, Path] = {}
    for picture in pictures:
        owner = owners.setdefault(picture.stem, picture)
        pair = (out / BEFORE / f"{picture.stem}.png", out / AFTER / picture.name, out / AFTER / f"{picture.stem}.txt")
        if owner != picture:
            done.failed.append(f"{picture} left out: {owner.name} has the same name. Rename one of the two")
        elif all(file.exists() for file in pair):
            done.skipped.append(picture)
        else:
            try:
                _write(picture, pair, lambda image: make_map(_limited(image, size), kind, thresholds), kind)
                done.written.append(picture)
            except (ValueError, OSError) as error:
                done.failed.append(f"{picture} left out: {error}")
        on_picture(picture)
    return done


def _open(out: Path, settings: dict[str, object]) -> None:
    """Makes the folder, or makes sure that it is one of the same settings."""
    stated = out / SETTINGS
    if stated.is_file():
        found = read_json(stated)
        if found != settings:
            raise ValueError(
                f"--out {out} holds pairs of {_listed(found)}, {_listed(settings)} expected: choose another folder"
            )
    elif out.is_dir() and any(out.iterdir()):
        raise ValueError(f"--out {out} holds other files and no {SETTINGS}: choose another folder")
    try:
        for name in (BEFORE, AFTER):
            (out / name).mkdir(parents=True, exist_ok=True)
        replace_text(json.dumps(settings), stated)
    except OSError as error:
        raise OSError(f"--out {out}: nothing can be written there ({error.strerror or error})") from error


def _listed(settings: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in list(settings.items())[:5])[:200]


def _limited(image: Image.Image, size: int) -> Image.Image:
    scale = size / math.sqrt(image.width * image.height)
    if scale >= 1:
        return image
    return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)


def _write(picture: Path, pair: tuple[Path, Path, Path], make: Callable[[Image.Image], Image.Image], kind: str) -> None:
    """Writes a pair; the text comes last, so that what lacks it is made anew."""
    before, after, text = pair
    words = map_instruction(kind, caption_of(picture))
    image = open_image(picture, "it")
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        raise ValueError(f"it has {frames} frames, one expected")
    control = make(to_rgb(image))
    _replace(before, lambda partial: control.save(partial, format="PNG"))
    _replace(after, lambda partial: shutil.copyfile(picture, partial))
    replace_text(words, text)


def caption_of(picture: Path) -> str:
    """Returns what stands in the text file beside a picture, "" where there is none.

    Raises:
        ValueError: it is no text in UTF-8, or too long.
    """
    file = picture.with_suffix(".txt")
    if not file.is_file():
        return ""
    if file.stat().st_size > LARGEST_CAPTION:
        raise ValueError(f"{file.name} has {file.stat().st_size} bytes, {LARGEST_CAPTION} expected at most")
    try:
        return file.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.name} is no text in UTF-8 ({error.reason}): save it as UTF-8") from error


def _replace(file: Path, write: Callable[[Path], object]) -> None:
    partial = file.with_name(f".{file.stem[:40]}.{os.getpid()}.part")
    try:
        write(partial)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def run(folder: Path, out: Path, kind: str, thresholds: Thresholds, size: int) -> str:
    """Makes the pairs of a folder, tells of them on stderr, and returns the name of the folder of pairs.

    Raises:
        RuntimeError: some pictures have no pair, the others have.
        and as `make_pairs`, `pictures_in`.
    """
    pictures = pictures_in(folder)
    if out.resolve() == folder.resolve():
        raise ValueError(f"--out {out} is the folder of the pictures, another one expected")
    without = sum(not picture.with_suffix(".txt").is_file() for picture in pictures)
    with tqdm(total=len(pictures), unit="picture", desc="pairs") as bar:
        done = make_pairs(pictures, out, kind, thresholds, size, lambda file: bar.update())
    for sentence in done.failed:
        tqdm.write(f"internvl_u: {shown_name(sentence)}", file=sys.stderr)
    if done.skipped:
        tqdm.write(f"internvl_u: {len(done.skipped)} pairs were there and stay", file=sys.stderr)
    if without:
        tqdm.write(f"internvl_u: {without} of {len(pictures)} pictures have no .txt: no caption", file=sys.stderr)
    if done.failed:
        raise RuntimeError(
            f"{len(done.failed)} of {len(pictures)} pictures have no pair; {len(done.written)} pairs were written"
        )
    return shown_name(str(out))
