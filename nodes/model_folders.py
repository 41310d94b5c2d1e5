"""Which checkpoint folders there are, in all the places where ComfyUI keeps models."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ..internvl_u.checkpoint import HOW_TO_GET, PARTS, is_checkpoint

KEY = "InternVL-U"
SHARED_KEY = "diffusers"


def register() -> None:
    """Adds `models/InternVL-U` to ComfyUI's model folders, beside what extra_model_paths.yaml gave this key."""
    folder_paths.add_model_folder_path(KEY, str(Path(folder_paths.models_dir) / KEY))


def roots() -> list[Path]:
    """Returns the folders that are searched, the pack's own first."""
    keys = (KEY, SHARED_KEY)
    found = [Path(path) for key in keys for path in folder_paths.folder_names_and_paths.get(key, ([],))[0]]
    return list(dict.fromkeys(found))


def available() -> dict[str, Path]:
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


def find(name: str) -> Path:
    """Returns the folder of a checkpoint.

    Raises:
        FileNotFoundError: there is none of this name; tells where it was looked for and how to get one.
    """
    found = available()
    if name not in found:
        searched = ", ".join(str(root) for root in roots())
        others = f" Found there: {', '.join(found)}." if found else ""
        raise FileNotFoundError(
            f"no InternVL-U model {name!r}. Searched: {searched}.{others} "
            f"{HOW_TO_GET} into {roots()[0] / 'InternVL-U'}, then press R to refresh the list."
        )
    return found[name]


def _looks_meant(folder: Path, root: Path) -> bool:
    return not folder.name.startswith(".") and not (is_checkpoint(root) or folder.name in PARTS)
