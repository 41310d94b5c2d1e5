"""Results of the command line: looked at before minutes of work, written whole or not at all, kept elsewhere."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo


def check_target(file: Path) -> None:
    """Makes sure, before any work, that an image can be written to `file`.

    Raises:
        ValueError: it is no name of a PNG file, or the name of a folder.
        OSError: its folder is not there, or nothing can be written into it.
    """
    if file.suffix.lower() != ".png":
        raise ValueError(f"--out {file} found, a name ending in .png expected")
    folder = file.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder} for --out. Make it first.")
    try:
        if file.is_dir():
            raise ValueError(f"--out {file} is a folder, a file expected")
        _partial(file).write_bytes(bytes(4096))
        _partial(file).unlink()
        if not file.exists():
            file.touch(exist_ok=False)
            file.unlink()
    except OSError as error:
        raise OSError(f"--out {str(file)[:300]}: nothing can be written there ({error.strerror or error})") from error


def save_image(image: Image.Image, file: Path, info: PngInfo) -> None:
    """Writes a PNG file, whole or not at all; where that fails, it is kept in the temporary folder.

    Raises:
        OSError: it could not be written there; says where it is.
    """
    try:
        _write(image, file, info)
    except OSError as error:
        kept = Path(tempfile.mkdtemp(prefix="internvl_u_")) / "picture.png"
        _write(image, kept, info)
        raise OSError(f"--out {file}: not written ({error.strerror or error}). The picture is in {kept}") from error


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


def _partial(file: Path) -> Path:
    return file.with_name(f".{file.stem[:40]}.{os.getpid()}.part")
