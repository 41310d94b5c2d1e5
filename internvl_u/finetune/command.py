"""`python -m internvl_u train`: its options, and what it says before and after."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import check_model_name, check_packages, text_argument

if TYPE_CHECKING:
    from .settings import TrainSettings

PACKAGES = ("accelerate", "peft")
"""What a run needs beside what the model needs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `train`."""
    _add_what_learns(parser)
    _add_how(parser)
    _add_what_is_told(parser)


def _add_what_learns(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="checkpoint folder, or the transformer's single file")
    add(
        "--data",
        type=Path,
        action="append",
        required=True,
        metavar="PATH",
        help="what to learn from; may be given several times: a folder of pictures with a .txt beside each; one with "
        "the folders before and after and a .txt beside each picture after; metadata.jsonl or .csv; a .jsonl file; a "
        "Hugging Face dataset on disk",
    )
    add(
        "--repeats",
        type=int,
        action="append",
        default=[],
        metavar="N",
        help="how often each example of a --data comes in a round of all; given once for each of them (default: once)",
    )
    add("--out", type=Path, required=True, metavar="FILE.safetensors", help="the LoRA; a folder for PEFT is put beside")
    add(
        "--train",
        choices=("transformer", "language", "both"),
        default="transformer",
        help="what learns (default %(default)s)",
    )
    add(
        "--trigger",
        type=text_argument,
        default="",
        metavar="WORD",
        help="put before each text, or in place of [trigger]",
    )
    add("--adapter", choices=("lora", "dora", "lokr"), default="lora", help="(default %(default)s)")
    add("--rank", type=int, default=16, metavar="R", help="(default %(default)s)")
    add("--alpha", type=float, metavar="A", help="(default: the rank)")
    add("--layers", metavar="REGEX", help="names of the layers that learn, whole (default: attention and MLPs)")


def _add_how(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--steps", type=int, default=1000, metavar="N", help="(default %(default)s)")
    add("--batch", type=int, default=1, metavar="N", help="examples computed at once (default %(default)s)")
    add("--accumulate", type=int, default=1, metavar="N", help="batches in each step (default %(default)s)")
    add("--lr", type=float, default=1e-4, metavar="X", help="learning rate (default %(default)s)")
    add("--schedule", choices=("constant", "cosine"), default="constant", help="of the rate (default %(default)s)")
    add("--warmup", type=int, default=20, metavar="N", help="steps until the whole rate (default %(default)s)")
    add("--resolution", type=int, metavar="S", help="pixels: an area of S x S (default: the checkpoint's own size)")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights that do not learn")
    add("--gradient-checkpointing", action="store_true", help="compute blocks twice and keep less in memory")
    add(
        "--optimizer",
        choices=("adamw", "adamw8bit"),
        default="adamw",
        help="8 bit needs bitsandbytes (default %(default)s)",
    )
    add("--weight-decay", type=float, default=0.01, metavar="X", help="(default %(default)s)")
    add(
        "--prompt-dropout", type=float, default=0.1, metavar="P", help="share of prompts left out (default %(default)s)"
    )
    add(
        "--reference-dropout",
        type=float,
        default=0.1,
        metavar="P",
        help="share of edits whose words alone are left out",
    )
    add(
        "--text-weight",
        type=float,
        default=1.0,
        metavar="X",
        help="of the text's loss beside the pictures' (default 1)",
    )


def _add_what_is_told(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--validation", type=float, default=0.0, metavar="P", help="share of examples held back, 0 to 0.5 (default 0)")
    add("--validate-every", type=int, default=100, metavar="N", help="steps (default %(default)s)")
    add_shared(parser)


def add_shared(parser: argparse.ArgumentParser) -> None:
    """Adds what `train` and `distill` have in common of how a run goes on and what it tells."""
    add = parser.add_argument
    add(
        "--sample",
        type=text_argument,
        action="append",
        default=[],
        metavar="PROMPT",
        help="drawn now and then; several",
    )
    add("--sample-every", type=int, default=0, metavar="N", help="steps between contact sheets (default: none)")
    add(
        "--save-every",
        type=int,
        default=100,
        metavar="N",
        help="steps between states to go on from (default %(default)s)",
    )
    add("--log-every", type=int, default=10, metavar="N", help="steps between rows of the log (default %(default)s)")
    add("--seed", type=int, default=0, metavar="S", help="(default %(default)s)")
    add("--device", default="auto", metavar="D", help="torch device; auto: a GPU if there is one (default %(default)s)")
    add("--work", type=Path, metavar="DIR", help="log, states, sheets and cache (default: NAME-training beside --out)")
    add(
        "--save-dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the numbers in the LoRA's files (default %(default)s)",
    )
    add("--estimate", action="store_true", help="say how much memory and time it would take, and stop")


def settings_of(options: argparse.Namespace) -> TrainSettings:
    """Returns the settings that options say.

    Raises:
        ValueError: an option is out of range.
        ImportError: a package is missing.
    """
    check_packages("training", PACKAGES)
    from .adapter import AdapterSettings
    from .objective import Dropout
    from .settings import TrainSettings

    return TrainSettings(
        **shared_settings(options),
        dtype=options.dtype,
        train=options.train,
        adapter=AdapterSettings(options.adapter, options.rank, options.alpha, options.layers),
        accumulate=options.accumulate,
        warmup=options.warmup,
        schedule=options.schedule,
        optimizer=options.optimizer,
        weight_decay=options.weight_decay,
        trigger=options.trigger,
        repeats=tuple(options.repeats),
        dropout=Dropout(options.prompt_dropout, options.reference_dropout),
        text_weight=options.text_weight,
        validation=options.validation,
        validate_every=options.validate_every,
    )


def shared_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields of `RunSettings` that options say, but for the dtype, whose choices differ."""
    from ..devices import chosen_device

    check_model_name(str(options.model))
    names = ("model", "steps", "batch", "lr", "seed", "resolution", "sample_every", "save_every", "log_every", "work")
    return {name: getattr(options, name) for name in (*names, "save_dtype")} | {
        "data": tuple(options.data),
        "out": target(options.out),
        "checkpointing": options.gradient_checkpointing,
        "sample_prompts": tuple(options.sample),
        "device": str(chosen_device(options.device)),
    }


def run(options: argparse.Namespace) -> list[Path]:
    """Trains as options say and returns what was written; with `--estimate` nothing is."""
    settings = settings_of(options)
    from .trainer import Trainer

    trainer = Trainer(settings, say)
    if options.estimate:
        trainer.estimate()
        return []
    return trainer.run()


def target(out: Path) -> Path:
    """Returns --out, which is to be a file that can be written.

    Raises:
        ValueError: it has another ending, or is a folder.
        FileNotFoundError: its folder is not there.
    """
    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out} found, a name ending in .safetensors expected")
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder, a file expected")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"no folder {out.absolute().parent} for --out. Make it first.")
    return out


def say(line: str) -> None:
    """Tells what goes on, on stderr."""
    sys.stderr.write(f"internvl_u: {line}\n")
    sys.stderr.flush()
