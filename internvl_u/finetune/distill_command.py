"""`python -m internvl_u distill`: its options."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from ..console import check_model_name
from ..defaults import STEPS
from .command import say, target


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
    add("--save-every", type=int, default=100, metavar="N", help="steps between states (default %(default)s)")
    add("--log-every", type=int, default=10, metavar="N", help="steps between rows of the log (default %(default)s)")
    add("--seed", type=int, default=0, metavar="S", help="(default %(default)s)")
    add("--device", default="auto", metavar="D", help="torch device; auto: a GPU if there is one (default %(default)s)")
    add("--work", type=Path, metavar="DIR", help="log and states (default: NAME-training beside --out)")


def run(options: argparse.Namespace) -> list[Path]:
    """Distils as options say and returns what was written.

    Raises:
        ImportError: peft is not installed.
        ValueError, FileNotFoundError: an option, or the prompts, are not as they should be.
    """
    if importlib.util.find_spec("peft") is None:
        raise ImportError("distill needs peft, which is not installed: pip install peft")
    from ..devices import chosen_device, chosen_dtype
    from .distill import Distillation, DistillSettings

    check_model_name(str(options.model))
    device = chosen_device(options.device)
    settings = DistillSettings(
        model=options.model,
        data=tuple(options.data),
        out=target(options.out),
        evaluations=options.evaluations,
        teacher_steps=options.teacher_steps,
        rank=options.rank,
        steps=options.steps,
        batch=options.batch,
        lr=options.lr,
        edits=options.edits,
        resolution=options.resolution,
        dtype=str(chosen_dtype(options.dtype, device))[6:],
        device=str(device),
        seed=options.seed,
        checkpointing=options.gradient_checkpointing,
        save_every=options.save_every,
        log_every=options.log_every,
        work=options.work,
    )
    return Distillation(settings, say).run()
