"""The language models that texts are timed with: the nano model, random ones of any size, and their other formats.

What takes long to write is kept in a folder, and taken from there the next time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from internvl_u.convert import convert

from .random_weights import LANGUAGE, silence, write_checkpoint

NANO = Path(__file__).resolve().parent.parent / "demo" / "internvl-u-nano"
SMALL_VOCABULARY = 1024
"""Tokens of a narrow model, whose output layer would otherwise outweigh all else."""
HEAD = 64


def language_sizes(width: int | None) -> Mapping:
    """Returns the sizes of Qwen3 at the released width, or at a smaller one, where overhead is all that is left."""
    if width in (None, LANGUAGE["hidden_size"]):
        return {}
    heads = max(width // HEAD, 2)
    return {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": HEAD,
        "intermediate_size": 3 * width,
        "vocab_size": SMALL_VOCABULARY,
    }


def random_model(work: Path, layers: int, width: int | None = None, dtype: str = "bfloat16") -> Path:
    """Returns the folder of a random model in `work`, written if need be. All but its Qwen3 is as small as can be."""
    folder = work / f"random_{layers}x{width or LANGUAGE['hidden_size']}_{dtype}"

    def write(into: Path) -> None:
        sizes = language_sizes(width)
        write_checkpoint(into, dtype=dtype, language_layers=layers, vision_layers=1, mmdit_layers=1, language=sizes)

    return _once(folder, write)


def nano_model(work: Path) -> Path:
    """Returns a copy of the nano model in `work` that never ends a text."""
    return silent_copy(NANO, work / "nano")


def silent_copy(model: Path, folder: Path) -> Path:
    """Returns `folder`, a copy of a model that never ends a text."""

    def write(into: Path) -> None:
        shutil.copytree(model, into)
        silence(into)

    return _once(folder, write)


def converted(model: Path, work: Path, dtype: str) -> Path:
    """Returns the language model of a checkpoint folder in another format, converted into `work` if need be."""
    folder = _once(work / f"{model.name}_{dtype}", lambda into: convert(model, into, dtype))
    files = (file for file in (folder / "text_encoders").iterdir() if file.suffix in (".safetensors", ".gguf"))
    return next(files)


def _once(folder: Path, write: Callable[[Path], object]) -> Path:
    """Returns `folder`, which `write(folder)` has filled once; what was cut short does not count."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent) as made:
            write(Path(made) / "made")
            (Path(made) / "made").rename(folder)
    return folder
