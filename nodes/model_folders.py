"""Which checkpoints there are, in all the places where ComfyUI keeps models."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

import folder_paths

from ..internvl_u.checkpoint import (
    GGUF_ENDING,
    holds_language_model,
    holds_transformer,
    is_checkpoint,
    open_checkpoint,
)
from ..internvl_u.defaults import HOW_TO_GET, MODEL_FOLDER, NANO_CHOICE, PARTS, RELEASED_SIZE
from ..internvl_u.places import QWEN_VAE, Found, children, inside, is_text, nano_folder, nano_loras
from ..native import compat

KEY = "InternVL-U"
SHARED_KEY = "diffusers"
TRANSFORMER_KEY, LANGUAGE_KEY, VAE_KEY = "diffusion_models", "text_encoders", "vae"
LORA_KEY = "loras"
AUTO = "auto"
NONE_FOUND, NO_LORA = "no model found", "no LoRA found"
_SITES = {"huggingface": "Hugging Face", "modelscope": "ModelScope"}
GGUF_KEYS = {TRANSFORMER_KEY: "internvl_u_gguf_diffusion_models", LANGUAGE_KEY: "internvl_u_gguf_text_encoders"}
"""Keys of our own under which ComfyUI lists the GGUF files of its folders: its own loaders, which cannot read them, go
on without, and so do other packs."""
ENDINGS = (".safetensors", GGUF_ENDING)
_answers: dict[tuple, bool] = {}
_logger = logging.getLogger("internvl_u")


def register() -> None:
    """Adds `models/InternVL-U` to ComfyUI's model folders, and keys that list the GGUF files of some of them.

    What extra_model_paths.yaml gave to the folders counts too.
    """
    folder_paths.add_model_folder_path(KEY, str(Path(folder_paths.models_dir) / KEY))
    for key, own in GGUF_KEYS.items():
        # The same list of folders, so that what is added to it later is seen.
        folder_paths.folder_names_and_paths[own] = (folder_paths.folder_names_and_paths[key][0], {GGUF_ENDING})


def roots() -> list[Path]:
    """Returns the folders that are searched for checkpoint folders, the pack's own first."""
    keys = (KEY, SHARED_KEY)
    found = [Path(path) for key in keys for path in folder_paths.folder_names_and_paths.get(key, ([],))[0]]
    return list(dict.fromkeys(found))


def folders() -> dict[str, Path]:
    """Returns checkpoint folders by the name that the node shows; of equal names the first one found.

    Those one level too deep and in the layout of the hub's cache come after the others.
    """
    found: dict[str, Path] = {}
    deeper: list[tuple[str, Path, Path]] = []
    broken: dict[str, Path] = {}
    own = {Path(path) for path in folder_paths.get_folder_paths(KEY)}
    for root in roots():
        if root in own and is_checkpoint(root):
            found.setdefault(root.name, root)
        for folder in children(root):
            if is_checkpoint(folder):
                found.setdefault(folder.name, folder)
            elif within := list(inside(folder)):
                deeper += [(name, folder, place) for name, place in within]
            elif root in own and _looks_meant(folder, root):
                broken.setdefault(folder.name, folder)
    known = {os.path.realpath(place) for place in found.values()} if deeper else set()
    for name, folder, place in deeper:
        real = os.path.realpath(place)
        if real not in known:  # a link may lead there by another way
            found.setdefault(name if name not in found else f"{folder.name}/{name}", place)
            known.add(real)
    # In a folder of our own a broken checkpoint is listed too: loading it says what is wrong with it.
    return found | {name: folder for name, folder in broken.items() if name not in found}


def files(key: str) -> dict[str, Path]:
    """Returns the weight files of one of ComfyUI's model folders by name; what cannot be read is left out."""
    return {name: Path(file) for name, (file, _) in _listed(key).items()}


def transformer_files() -> dict[str, Path]:
    """Returns the files in `diffusion_models` that hold InternVL-U's transformer."""
    return _holding(holds_transformer, TRANSFORMER_KEY)


def language_files() -> dict[str, Path]:
    """Returns the files in `text_encoders` that hold InternVL-U's language model."""
    return _holding(holds_language_model, LANGUAGE_KEY)


def _listed(key: str) -> dict[str, tuple[str, os.stat_result]]:
    """Returns path and state of the weight files in one of ComfyUI's model folders by name."""
    found: dict[str, tuple[str, os.stat_result]] = {}
    try:
        names, roots = [*folder_paths.get_filename_list(key)], folder_paths.get_folder_paths(key)
        if key in GGUF_KEYS:
            names += folder_paths.get_filename_list(GGUF_KEYS[key])
    except OSError as error:
        _logger.warning("InternVL-U: the files of %s cannot be listed (%s)", key, error)
        return {}
    for name in names:
        if not name.endswith(ENDINGS) or os.path.basename(name).startswith(".") or not is_text(name):
            continue
        for root in roots:
            file = os.path.join(root, name)
            with contextlib.suppress(OSError, ValueError):  # a dead link, a loop of links, a name that is none
                state = os.stat(file)
                if stat.S_ISREG(state.st_mode):
                    found.setdefault(name, (file, state))
    return found


def _holding(question: Callable[[Path], bool], key: str) -> dict[str, Path]:
    """Returns the files of which a function says yes, asked again only when a file has changed."""
    found: dict[str, Path] = {}
    for name, (file, state) in _listed(key).items():
        asked = (question, file, state.st_mtime_ns, state.st_size)
        if asked not in _answers:
            _answers[asked] = question(Path(file))
        if _answers[asked]:
            found[name] = Path(file)
    return found


def available() -> list[str]:
    """Returns what the node offers: checkpoint folders, then single files.

    No file is opened before the server answers: ComfyUI asks already while it starts.
    """
    return [*folders(), *(transformer_files() if compat.is_serving() else ())]


def choices() -> list[str]:
    """Returns the choices of the node's list: what is there, the nano model, and downloads of a released one not there.

    The first one, which a new node has, neither asks for a download nor is the nano model unawares.
    """
    nano = [NANO_CHOICE] if nano_folder() is not None else []
    return [*(available() or [NONE_FOUND]), *nano, *_offered_downloads()]


def is_nano_choice(name: str) -> bool:
    """Returns whether a choice means the nano model that comes with the pack, also as older versions have called it."""
    return name.startswith(NANO_CHOICE[: NANO_CHOICE.index("(")])


def downloads() -> dict[str, str]:
    """Returns the choices that ask for the released model's download, and the source of each."""
    root, home = target().parent, Path(folder_paths.models_dir).parent
    shown = (root.relative_to(home) if root.is_relative_to(home) else root).as_posix()
    if not is_text(shown):
        return {}
    return {f"download InternVL-U ({RELEASED_SIZE}) from {site} to {shown}": source for source, site in _SITES.items()}


def target() -> Path:
    """Returns the folder that a download makes, in the first of ComfyUI's folders for our models."""
    return Path(folder_paths.get_folder_paths(KEY)[0]) / MODEL_FOLDER.name


def source_asked_for(name: str) -> str | None:
    """Returns where the model is to be downloaded from: None unless a choice asks for it and it is not there yet."""
    return _offered_downloads().get(name)


def _offered_downloads() -> dict[str, str]:
    return {} if MODEL_FOLDER.name in folders() else downloads()


def fingerprint(found: Found) -> list[tuple[str, int, int]]:
    """Returns (path, time in ns, size) of each file that loading reads."""
    states = []
    for place in dict.fromkeys(found):
        for file in open_checkpoint(place).files():
            with contextlib.suppress(OSError):  # it has just gone: loading says so
                state = file.stat()
                states.append((str(file), state.st_mtime_ns, state.st_size))
    return states


def find(name: str, language: str = AUTO, vae: str = AUTO) -> Found:
    """Returns where the parts of a model are. With `auto` they come from the same folder or were converted together.

    A choice that asks for a download means the folder that it makes, whether it is there yet or not.

    Raises:
        FileNotFoundError: there is none of this name, or of one of its parts; tells where it was looked for and how to
            get one.
    """
    folder, transformer = _transformer_of(name)
    return Found(
        transformer,
        folder if folder and language == AUTO else _language_of(name, language),
        folder if folder and vae == AUTO else _vae_of(name, vae),
    )


def check_model(name: str) -> None:
    """Makes sure that there is a model of this name, whether its other parts are there or not.

    Raises:
        FileNotFoundError: there is none; see `find`.
    """
    _transformer_of(name)


def _transformer_of(name: str) -> tuple[Path | None, Path]:
    found = folders()
    folder = _by_name(found, name) or (found.get(MODEL_FOLDER.name, target()) if name in downloads() else None)
    if folder is None and is_nano_choice(name):
        folder = nano_folder()
    transformer = folder or _by_name(transformer_files(), name)
    if transformer is None:
        raise FileNotFoundError(_missing(name))
    return folder, transformer


def lora_choices() -> list[str]:
    """Returns the files of LoRAs that the node offers, last those that come with the nano model."""
    own = files(LORA_KEY)
    return [*(own or [NO_LORA]), *(name for name in nano_loras() if name not in own)]


def find_lora(name: str) -> Path:
    """Returns the file of a LoRA; of equal names the user's own, not the one that comes with the nano model.

    Raises:
        FileNotFoundError: there is none of this name; tells where it was looked for.
    """
    file = _by_name(nano_loras() | files(LORA_KEY), name)
    if file is None:
        raise FileNotFoundError(
            f"no LoRA {name!r} in {', '.join(folder_paths.get_folder_paths(LORA_KEY))}. Put its .safetensors file "
            "there, then press R to refresh the list."
        )
    return file


def _language_of(name: str, wanted: str) -> Path:
    found = language_files()
    if wanted == AUTO:
        twin = re.sub(r"internvl_u_(?=[^/\\]*$)", "internvl_u_mllm_", name)  # not in the name of a folder
        wanted = twin if _by_name(found, twin) else next(iter(found), AUTO)
    file = _by_name(found, wanted)
    if file is None:
        searched = ", ".join(folder_paths.get_folder_paths(LANGUAGE_KEY))
        raise FileNotFoundError(
            _reason(_by_name(files(LANGUAGE_KEY), wanted), "vlm")
            or f"Choose another mllm_name, or put the language model that belongs to {name} there: "
            "`python -m internvl_u convert` writes it beside the transformer's file. There is no language model "
            f"{wanted!r} in {searched}."
        )
    return file


def _vae_of(name: str, wanted: str) -> Path:
    found = files(VAE_KEY)
    if wanted == AUTO:
        ours = (file for file in found if Path(file).name.startswith("internvl_u_vae"))
        qwen = (file for file in found if Path(file).name == QWEN_VAE)
        wanted = next(ours, next(qwen, AUTO))
    file = _by_name(found, wanted)
    if file is None:
        raise FileNotFoundError(
            f"Choose another vae_name, or put {QWEN_VAE} or the VAE that `python -m internvl_u convert` writes there. "
            f"There is no VAE {wanted!r} for {name} in {', '.join(folder_paths.get_folder_paths(VAE_KEY))}."
        )
    return file


def _by_name(found: dict[str, Path], name: str) -> Path | None:
    """Returns the file of a name, whichever way its folders are separated: workflows come from other systems."""
    return found.get(name) or {key.replace("\\", "/"): file for key, file in found.items()}.get(name.replace("\\", "/"))


def _missing(name: str) -> str:
    reason = _reason(_by_name(files(TRANSFORMER_KEY), name), "generation_decoder")
    if reason:
        return reason
    offered = " or ".join(f'"{choice}"' for choice in _offered_downloads())
    others = ", ".join(available())
    ways = [f"Download it: choose {offered} in model_name and run again."] if offered else []
    if others:
        ways.append(f"{'Or choose' if offered else 'Choose'} a model that is there: {others}.")
    if nano_folder() is not None and not is_nano_choice(name):
        ways.append(f'To see how it works without it, choose "{NANO_CHOICE}".')
    if offered:
        ways.append(f"Or put its folder into {target().parent} and press R.")
    else:
        ways.append(f"{HOW_TO_GET} into {target()}, then press R to refresh the list.")
    searched = ", ".join([*map(str, roots()), *folder_paths.get_folder_paths(TRANSFORMER_KEY)])
    missing = f"There is no InternVL-U model {name!r} in {searched}."
    if is_nano_choice(name):
        missing += " This copy of the pack comes without it."
    return f"{' '.join(ways)} {missing}"


def _reason(file: Path | None, part: str) -> str | None:
    """Returns why a GGUF file that is there is not this part of ours: there are many of other models."""
    if file is None or file.suffix != GGUF_ENDING:
        return None
    try:
        open_checkpoint(file).config(part)
    except RuntimeError as error:
        return str(error)
    return None


def _looks_meant(folder: Path, root: Path) -> bool:
    return not folder.name.startswith(".") and not (is_checkpoint(root) or folder.name in PARTS)
