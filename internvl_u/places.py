"""Where a model lies: in a folder of its own, one level deeper, in the hub's cache, or in the box; and single files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from .checkpoint import GGUF_ENDING, is_checkpoint
from .defaults import NANO, NANO_FOLDERS, NANO_LORAS

QWEN_VAE = "qwen_image_vae.safetensors"
"""The name of the same VAE among ComfyUI's files."""
_HUB_PREFIX = "models--"
_ENDINGS = (".safetensors", GGUF_ENDING)


class Found(NamedTuple):
    """Where the three parts are: all in one folder, or a file each."""

    transformer: Path
    language: Path
    vae: Path


def nano_folder() -> Path | None:
    """Returns the folder of the nano model that comes with the pack; None where it has been left out."""
    here = Path(__file__).parent
    return next((folder for name in NANO_FOLDERS if is_checkpoint(folder := here.joinpath(*name))), None)


def nano_loras() -> dict[str, Path]:
    """Returns the LoRAs that come with the nano model, by the names of their files."""
    nano = nano_folder()
    return {} if nano is None else {file.name: file for file in sorted((nano / NANO_LORAS).glob("*.safetensors"))}


def is_nano(place: Path) -> bool:
    """Returns whether a folder is the nano model that comes with the pack, or a copy of it under its own name."""
    nano = nano_folder()
    return place.name == NANO_FOLDERS[-1][-1] or (nano is not None and place.resolve() == nano.resolve())


def snapshot(place: Path) -> Path | None:
    """Returns the checkpoint folder in a folder of the hub's cache (models--OWNER--NAME), None where there is none.

    It is the one that `main` stands for, else the newest.
    """
    if not place.name.startswith(_HUB_PREFIX):
        return None
    try:
        folders = sorted((place / "snapshots").iterdir(), key=lambda folder: folder.stat().st_mtime, reverse=True)
    except OSError:
        return None
    try:
        main = (place / "refs" / "main").read_text(encoding="utf-8", errors="replace").strip()[:100]
    except OSError:
        main = ""
    folders.sort(key=lambda folder: folder.name != main)
    return next(filter(is_checkpoint, folders), None)


def shown_folder(place: Path) -> str:
    """Returns the name of a checkpoint folder: its own, or of a snapshot in the hub's cache its repository's."""
    place = place.absolute()
    if place.parent.name == "snapshots" and place.parent.parent.name.startswith(_HUB_PREFIX):
        return place.parent.parent.name.rpartition("--")[2]
    return place.name


def inside(place: Path) -> Iterator[tuple[str, Path]]:
    """Yields (name, checkpoint folder) of what lies one level deeper in a folder that is no checkpoint itself.

    A snapshot of the hub's cache goes by the name of its repository.
    """
    found = snapshot(place)
    if found is not None:
        yield place.name.rpartition("--")[2], found
        return
    if is_other_model(place):
        return
    for folder in children(place):
        deeper = folder if is_checkpoint(folder) else snapshot(folder)
        if deeper is not None:
            yield (folder.name if deeper is folder else folder.name.rpartition("--")[2]), deeper


def is_other_model(place: Path) -> bool:
    """Returns whether a folder that is no checkpoint of ours says that it is a model: nothing deeper is looked at."""
    try:
        return (place / "model_index.json").is_file() or (place / "config.json").is_file()
    except OSError:
        return True


def children(place: Path) -> list[Path]:
    """Returns the folders in a folder, in order of their names; those whose names are no UTF-8 are left out."""
    try:
        return sorted(child for child in place.iterdir() if child.is_dir() and is_text(child.name))
    except OSError:  # not there, or without the right to be read
        return []


def is_text(name: str) -> bool:
    """Returns whether a name is UTF-8: another one cannot be sent to a page, nor come back from it."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def checkpoint_folder(place: Path) -> Path:
    """Returns the checkpoint folder that `place` is or holds one level deeper, also as a folder of the hub's cache.

    "nano" is the nano model, unless a folder has that name. What holds none is returned as it is.

    Raises:
        ValueError: it holds several.
    """
    if str(place) == NANO and not place.exists():
        return nano_folder() or place
    if not place.is_dir() or is_checkpoint(place):
        return place
    found = dict(inside(place))
    if len(found) > 1:
        raise ValueError(f"{place} holds {len(found)} models, one expected: name one of {', '.join(map(str, found))}")
    return next(iter(found.values()), place)


def locate(model: Path, language: Path | None = None, vae: Path | None = None) -> Found:
    """Returns where the parts are of a checkpoint folder, or of the transformer's single file.

    What is not named of single files lies beside the file, by the names that `convert` gives.

    Raises:
        FileNotFoundError: the file of the language model or of the VAE is not there.
        ValueError: several are.
    """
    model = checkpoint_folder(model)
    if model.is_dir() or not model.exists():
        return Found(model, language or model, vae or model)
    return Found(model, language or _language_beside(model), vae or _vae_beside(model))


def _language_beside(model: Path) -> Path:
    twin = model.name.replace("internvl_u_", "internvl_u_mllm_", 1)
    found = _beside(model, "text_encoders", lambda name: name.startswith("internvl_u_mllm_"))
    same = [file for file in found if file.name == twin] or found
    return _only(same, model, f"language model ({twin})", "--mllm")


def _vae_beside(model: Path) -> Path:
    ours = _beside(model, "vae", lambda name: name.startswith("internvl_u_vae"))
    return _only(ours or _beside(model, "vae", QWEN_VAE.__eq__), model, f"VAE (internvl_u_vae_*, {QWEN_VAE})", "--vae")


def _beside(model: Path, folder: str, wanted: Callable[[str], bool]) -> list[Path]:
    """Returns the weight files beside another, and in the folder of this name beside that one's folder."""
    found: dict[Path, None] = {}
    for place in (model.absolute().parent, model.absolute().parent.parent / folder):
        files = sorted(place.iterdir()) if place.is_dir() else []
        found |= dict.fromkeys(file for file in files if file.suffix in _ENDINGS and wanted(file.name))
    return [file for file in found if file.is_file()]


def _only(found: list[Path], model: Path, what: str, flag: str) -> Path:
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{len(found)} files found for the {what} of {model}, one expected: name it with {flag}")
    raise FileNotFoundError(
        f"no file of the {what} beside {model}: name it with {flag}. `convert` writes the three files of a model"
    )
