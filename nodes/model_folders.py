"""Which checkpoints there are, in all the places where ComfyUI keeps models."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import folder_paths

from ..internvl_u.checkpoint import HOW_TO_GET, PARTS, holds_language_model, holds_transformer, is_checkpoint

KEY = "InternVL-U"
SHARED_KEY = "diffusers"
TRANSFORMER_KEY, LANGUAGE_KEY, VAE_KEY = "diffusion_models", "text_encoders", "vae"
AUTO = "auto"
QWEN_VAE = "qwen_image_vae.safetensors"


class Found(NamedTuple):
    """Where the three parts are: all in one folder, or a file each."""

    transformer: Path
    language: Path
    vae: Path


def register() -> None:
    """Adds `models/InternVL-U` to ComfyUI's model folders, beside what extra_model_paths.yaml gave this key."""
    folder_paths.add_model_folder_path(KEY, str(Path(folder_paths.models_dir) / KEY))


def roots() -> list[Path]:
    """Returns the folders that are searched for checkpoint folders, the pack's own first."""
    keys = (KEY, SHARED_KEY)
    found = [Path(path) for key in keys for path in folder_paths.folder_names_and_paths.get(key, ([],))[0]]
    return list(dict.fromkeys(found))


def folders() -> dict[str, Path]:
    """Returns checkpoint folders by the name that the node shows; of equal names the first one found."""
    found: dict[str, Path] = {}
    own = {Path(path) for path in folder_paths.get_folder_paths(KEY)}
    for root in roots():
        if root in own and is_checkpoint(root):
            found.setdefault(root.name, root)
        for folder in sorted(root.iterdir()) if root.is_dir() else ():
            # In a folder of our own a broken checkpoint is listed too: loading it says what is wrong with it.
            if folder.is_dir() and (is_checkpoint(folder) or (root in own and _looks_meant(folder, root))):
                found.setdefault(folder.name, folder)
    return found


def files(key: str) -> dict[str, Path]:
    """Returns the safetensors files of one of ComfyUI's model folders by name."""
    names = (name for name in folder_paths.get_filename_list(key) if name.endswith(".safetensors"))
    return {name: Path(folder_paths.get_full_path_or_raise(key, name)) for name in names}


def transformer_files() -> dict[str, Path]:
    """Returns the files in `diffusion_models` that hold InternVL-U's transformer."""
    return {name: file for name, file in files(TRANSFORMER_KEY).items() if _holds_transformer(*_state(file))}


def language_files() -> dict[str, Path]:
    """Returns the files in `text_encoders` that hold InternVL-U's language model."""
    return {name: file for name, file in files(LANGUAGE_KEY).items() if _holds_language_model(*_state(file))}


def available() -> list[str]:
    """Returns what the node offers: checkpoint folders, then single files."""
    return [*folders(), *transformer_files()]


def find(name: str, language: str = AUTO, vae: str = AUTO) -> Found:
    """Returns where the parts of a model are. With `auto` they come from the same folder or were converted together.

    Raises:
        FileNotFoundError: there is none of this name; tells where it was looked for and how to get one.
    """
    inside = folders().get(name)
    transformer = inside or transformer_files().get(name)
    if transformer is None:
        raise FileNotFoundError(_missing(name))
    return Found(
        transformer,
        inside if inside and language == AUTO else _language_of(name, language),
        inside if inside and vae == AUTO else _vae_of(name, vae),
    )


def _language_of(name: str, wanted: str) -> Path:
    found = language_files()
    if wanted == AUTO:
        twin = name.replace("internvl_u_", "internvl_u_mllm_")
        wanted = twin if twin in found else next(iter(found), AUTO)
    if wanted not in found:
        raise FileNotFoundError(
            f"no language model {wanted!r} for {name} in {', '.join(folder_paths.get_folder_paths(LANGUAGE_KEY))}. "
            "`python -m internvl_u convert` writes it beside the transformer's file."
        )
    return found[wanted]


def _vae_of(name: str, wanted: str) -> Path:
    found = files(VAE_KEY)
    if wanted == AUTO:
        ours = (file for file in found if Path(file).name.startswith("internvl_u_vae"))
        qwen = (file for file in found if Path(file).name == QWEN_VAE)
        wanted = next(ours, next(qwen, AUTO))
    if wanted not in found:
        raise FileNotFoundError(
            f"no VAE {wanted!r} for {name} in {', '.join(folder_paths.get_folder_paths(VAE_KEY))}. "
            f"`python -m internvl_u convert` writes it; {QWEN_VAE} does as well."
        )
    return found[wanted]


def _missing(name: str) -> str:
    searched = [*map(str, roots()), *folder_paths.get_folder_paths(TRANSFORMER_KEY)]
    others = f" Found there: {', '.join(available())}." if available() else ""
    return (
        f"no InternVL-U model {name!r}. Searched: {', '.join(searched)}.{others} "
        f"{HOW_TO_GET} into {roots()[0] / 'InternVL-U'}, then press R to refresh the list."
    )


def _looks_meant(folder: Path, root: Path) -> bool:
    return not folder.name.startswith(".") and not (is_checkpoint(root) or folder.name in PARTS)


def _state(file: Path) -> tuple[Path, int, int]:
    stat = file.stat()
    return file, stat.st_mtime_ns, stat.st_size


@functools.lru_cache(maxsize=4096)
def _holds_transformer(file: Path, mtime: int, size: int) -> bool:
    return holds_transformer(file)


@functools.lru_cache(maxsize=4096)
def _holds_language_model(file: Path, mtime: int, size: int) -> bool:
    return holds_language_model(file)
