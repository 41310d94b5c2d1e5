"""Results of the command line: looked at before minutes of work, written whole or not at all, kept elsewhere."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .console import abandon


def check_target(file: Path) -> None:
    """Makes sure, before any work, that an image can be written to `file`.

    Raises:
        ValueError: it is no name of a PNG file, or of what is no file or is protected from writing.
        OSError: its folder is not there, or nothing can be written into it.
    """
    if file.suffix.lower() != ".png":
        raise ValueError(f"--out {file} found, a name ending in .png expected")
    folder = file.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder} for --out. Make it first.")
    try:
        target = _real(file)
        if target.exists():
            _check_present(file, target.stat().st_mode)
        _partial(target).write_bytes(bytes(4096))
        _partial(target).unlink()
        if not target.exists():
            target.touch(exist_ok=False)
            target.unlink()
    except OSError as error:
        raise OSError(f"--out {str(file)[:300]}: nothing can be written there ({error.strerror or error})") from error


def save_image(image: Image.Image, file: Path, info: PngInfo) -> None:
    """Writes a PNG file, whole or not at all; where that fails, it is kept in the temporary folder.

    A symbolic link is followed: the picture is put where it leads to.

    Raises:
        OSError: it could not be written there; says where it is.
    """
    try:
        _write(image, _real(file), info)
    except OSError as error:
        why = f"--out {file}: not written ({error.strerror or error})"
        raise OSError(_keep(lambda kept: _write(image, kept, info), "picture", ".png", why)) from error


def write_text(text: str, what: str) -> None:
    """Writes a text and a line's end to stdout; where that fails, it is kept in the temporary folder.

    Raises:
        OSError: it could not be written there; says where it is.
    """
    try:
        if sys.stdout is None:
            raise OSError("it is closed")
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        abandon(sys.stdout)
        why = f"stdout: not written ({getattr(error, 'strerror', None) or error})"
        raise OSError(_keep(lambda kept: _write_text(text, kept), what, ".txt", why)) from error


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Gives the name of a file to write, which becomes `file` at the end; nothing of it stays where that fails.

    A symbolic link is followed.

    Raises:
        OSError: it could not be written there.
    """
    target = _real(file)
    partial = _partial(target)
    try:
        yield partial
        os.replace(partial, target)
    except OSError as error:
        raise OSError(f"{file} not written ({error.strerror or error})") from error
    finally:
        partial.unlink(missing_ok=True)


def replace_text(text: str, file: Path) -> None:
    """Writes a text and a line's end to a file in UTF-8, whole or not at all. A symbolic link is followed.

    Raises:
        OSError: it could not be written there.
    """
    with replacing(file) as partial:
        _write_text(text, partial)


def _keep(write: Callable[[Path], object], what: str, suffix: str, why: str) -> str:
    """Writes a result into a new folder for temporary files; returns a sentence that says why and where.

    Raises:
        OSError: it cannot be written there either.
    """
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix="internvl_u_"))
        kept = folder / f"{what.replace(' ', '_')}{suffix}"
        write(kept)
    except OSError as error:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        raise OSError(
            f"{why}. The {what} is lost: the temporary folder does not take it either ({error.strerror or error})"
        ) from error
    return f"{why}. The {what} is in {kept}"


def _check_present(file: Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise ValueError(f"--out {file} is a folder, a file expected")
    if not stat.S_ISREG(mode):
        raise ValueError(f"--out {file} is a device or a pipe, a file expected")
    if not mode & 0o222:
        raise ValueError(f"--out {file} is there and read-only: give another name, or make it writable")


def _write_text(text: str, file: Path) -> None:
    file.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def _write(image: Image.Image, file: Path, info: PngInfo) -> None:
    partial = _partial(file)
    try:
        with partial.open("wb") as target:
            image.save(target, format="PNG", pnginfo=info)
            target.flush()
            os.fsync(target.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _real(file: Path) -> Path:
    """Returns where a file is, symbolic links followed: replacing a link would leave what it leads to as it was."""
    return Path(os.path.realpath(file))


def _partial(file: Path) -> Path:
    return file.with_name(f".{file.stem[:40]}.{os.getpid()}.part")
