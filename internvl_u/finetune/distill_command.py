"""`python -m internvl_u distill`: its options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..console import check_packages
from ..defaults import STEPS
from .command import PACKAGES, add_shared, say, shared_settings

if TYPE_CHECKING:
    from .distill_settings import DistillSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `distill`."""
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="checkpoint folder, or the transformer's single file")
    add(
        "--data",
        type=Path,
        action="append",
        required=True,
        metavar="FILE",
        help="prompts, may be given several times: a .txt file, one a line; a .jsonl file of texts, and of edits with "
        "the names of their pictures; or what `train` learns from, of which the pictures to draw are not used",
    )
    add("--out", type=Path, required=True, metavar="FILE.safetensors", help="the LoRA; a folder for PEFT is put beside")
    add(
        "--evaluations",
        type=int,
        default=8,
        metavar="N",
        help="of the transformer for a picture, in all (default %(default)s)",
    )
    add(
        "--teacher-steps",
        type=int,
        default=STEPS,
        metavar="N",
        help="guided steps that are learned from, rounded up to a multiple of the evaluations (default %(default)s)",
    )
    add("--rank", type=int, default=64, metavar="R", help="(default %(default)s)")
    add("--steps", type=int, default=1000, metavar="N", help="(default %(default)s)")
    add("--batch", type=int, default=16, metavar="N", help="pictures on their way at once (default %(default)s)")
    add("--lr", type=float, default=1e-4, metavar="X", help="highest learning rate (default %(default)s)")
    add("--edits", type=float, metavar="P", help="share of the steps with edits, 0 to 1 (default: as of the prompts)")
    add("--resolution", type=int, metavar="S", help="pixels: an area of S x S (default: the model's own size)")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="arithmetic, and weights that do not learn; auto: bfloat16 on a GPU that has it (default %(default)s)",
    )
    add("--gradient-checkpointing", action="store_true", help="compute blocks twice and keep less in memory")
    add_shared(parser)


def settings_of(options: argparse.Namespace) -> DistillSettings:
    """Returns the settings that options say.

    Raises:
        ImportError: a package is missing.
        ValueError: an option is out of range.
    """
    check_packages("distill", PACKAGES)
    from ..devices import chosen_device, chosen_dtype
    from .distill_settings import DistillSettings

    return DistillSettings(
        **shared_settings(options),
        dtype=str(chosen_dtype(options.dtype, chosen_device(options.device)))[6:],
        evaluations=options.evaluations,
        teacher_steps=options.teacher_steps,
        rank=options.rank,
        edits=options.edits,
    )


def run(options: argparse.Namespace) -> list[Path]:
    """Distils as options say and returns what was written; with `--estimate` nothing is.

    Raises:
        ValueError, FileNotFoundError: an option, or the prompts, are not as they should be.
    """
    settings = settings_of(options)
    from .distill import Distillation

    run = Distillation(settings, say)
    if options.estimate:
        run.estimate()
        return []
    return run.run()
