"""The arguments of the command line: each command with its own."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from . import __version__, chat_console
from .batch import command as batch
from .console import text_argument
from .defaults import (
    ANSWER_TOKENS,
    FILE_DTYPES,
    GGUF_DTYPES,
    GUIDANCE,
    GUIDANCE_WITH_THOUGHT,
    LARGEST,
    MAP_KINDS,
    MAP_SIZE,
    MAP_THRESHOLDS,
    MODEL_FOLDER,
    NANO,
    RELEASED_SIZE,
    SMALLEST,
    STEPS,
    THOUGHT_TOKENS,
)
from .finetune import command as training
from .finetune import distill_command
from .speed import QUALITY, SPEEDS
from .tasks import AS_WRITTEN, TASKS


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line; `command` is the name of what is to run."""
    parser = argparse.ArgumentParser("internvl_u", description="InternVL-U without ComfyUI.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
    _add_draw(commands.add_parser("draw", help="draw a picture from a text, or edit pictures"))
    _add_chat(commands.add_parser("chat", help="a conversation: questions, answers, pictures and changes of them"))
    _add_ask(commands.add_parser("ask", help="ask about pictures, or chat without any"))
    _add_convert(commands.add_parser("convert", help="write single files for ComfyUI's model folders"))
    _add_merge(commands.add_parser("merge", help="write a checkpoint folder with LoRAs merged into its weights"))
    training.add_arguments(commands.add_parser("train", help="teach the model by a LoRA; needs accelerate and peft"))
    _add_pairs(commands.add_parser("pairs", help="pairs of pictures and their maps, for a LoRA that obeys maps"))
    distill_command.add_arguments(
        commands.add_parser("distill", help="a LoRA after which few evaluations draw a picture; needs peft")
    )
    _add_batch(commands.add_parser("batch", help="a list of pictures and texts by several workers; needs ray"))
    _add_download(commands.add_parser("download", help=f"fetch the released model ({RELEASED_SIZE})"))
    return parser


def _add_draw(parser: argparse.ArgumentParser) -> None:
    _add_shared(parser, "what to draw or to change; may be empty; <image> marks a picture's place")
    pixels = f"pixels, {SMALLEST} to {LARGEST} (default: the first picture's)"
    usual, thinking = GUIDANCE, GUIDANCE_WITH_THOUGHT
    parser.add_argument("--width", type=int, metavar="W", help=pixels)
    parser.add_argument("--height", type=int, metavar="H", help=pixels)
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help="denoising steps (default %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="seed of the start noise (default %(default)s)"
    )
    parser.add_argument(
        "--all-cfg",
        type=float,
        metavar="A",
        help=f"guidance of the words (default {usual.all_cfg}; {thinking.all_cfg} if it thinks)",
    )
    parser.add_argument(
        "--part-cfg",
        type=float,
        metavar="P",
        help=f"guidance of pictures (default {usual.part_cfg}; {thinking.part_cfg} if it thinks)",
    )
    parser.add_argument(
        "--negative-prompt",
        type=text_argument,
        default="",
        metavar="TEXT",
        help="unofficial: what to keep away from (default: the model's own empty prompt)",
    )
    parser.add_argument(
        "--reference-size",
        type=int,
        metavar="S",
        help="most pixels of each picture that the transformer sees: an area of S x S (default: the official rule)",
    )
    thought = parser.add_mutually_exclusive_group()
    thought.add_argument("--think", action="store_true", help="let the model think first; the thought goes to stderr")
    thought.add_argument("--thought", type=text_argument, default="", metavar="TEXT", help="draw from this thought")
    _add_max_new_tokens(parser, THOUGHT_TOKENS, "longest thought")
    parser.add_argument(
        "--count",
        type=int,
        default=1,
        metavar="N",
        help="pictures; of several each has the next seed and is FILE-1.png, FILE-2.png ... (default %(default)s)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="the picture to write")
    for scale, what in (("all", "--all-cfg"), ("part", "--part-cfg")):
        for end, default in (("start", 0.0), ("end", 1.0)):
            parser.add_argument(
                f"--{scale}-cfg-{end}",
                type=float,
                default=default,
                metavar="X",
                help=f"{end} of the part of the schedule, 0 to 1, where {what} works (default %(default)s)",
            )
    parser.add_argument(
        "--speed",
        choices=SPEEDS,
        default=QUALITY,
        help="fewer steps and less guidance, where these are left as they are: how far that shows is measured for the "
        "nano model alone; quality is official (default %(default)s)",
    )


def _add_ask(parser: argparse.ArgumentParser) -> None:
    _add_shared(parser, "the question, or what a --task is to heed; <image> marks a picture's place", required=False)
    parser.add_argument(
        "--task", choices=TASKS, default=AS_WRITTEN, help="a ready question in place of one (default %(default)s)"
    )
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="ask about each picture in it and write NAME.txt beside it"
    )
    parser.add_argument("--overwrite", action="store_true", help="with --folder: write texts that are there anew")
    _add_max_new_tokens(parser, ANSWER_TOKENS, "longest answer")
    parser.add_argument("--beams", type=int, default=1, metavar="N", help="beams of the search (default %(default)s)")


def _add_chat(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    chat_console.add_arguments(parser)


def _add_batch(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    batch.add_arguments(parser)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="checkpoint folder, released layout")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="such as ComfyUI/models")
    parser.add_argument(
        "--dtype",
        choices=(*FILE_DTYPES, *GGUF_DTYPES),
        default="bfloat16",
        help="fp8_scaled: one scale per matrix, as recent ComfyUI has it; fp8_scaled_old: its older spelling; "
        "int8: one scale per row; int8_convrot: with the columns rotated first; Q8_0 to Q4_K: GGUF, which wants the "
        "package gguf (default %(default)s)",
    )


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="checkpoint folder, released layout")
    parser.add_argument(
        "--lora",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="LoRAs to merge; not needed for one that a trainer has left in the folder",
    )
    parser.add_argument(
        "--strength",
        type=float,
        nargs="+",
        action="extend",
        default=[],
        metavar="S",
        help="one for each --lora, or one for all (default 1)",
    )
    parser.add_argument("--alpha", type=float, metavar="A", help="lora_alpha of a LoRA in the folder that states none")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new folder")


def _add_pairs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="pictures, each with a caption in NAME.txt beside it"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of pairs, made or gone on with")
    parser.add_argument(
        "--kind",
        choices=MAP_KINDS,
        default=MAP_KINDS[0],
        help="canny: edges, as ComfyUI's own node (default %(default)s)",
    )
    for name, default in zip(("low", "high"), MAP_THRESHOLDS):
        parser.add_argument(
            f"--{name}",
            type=float,
            default=default,
            metavar="X",
            help=f"{name} threshold of edges, as ComfyUI's Canny has it (default %(default)s)",
        )
    parser.add_argument(
        "--size",
        type=int,
        default=MAP_SIZE,
        metavar="S",
        help="maps are of pictures of S x S pixels of area at most (default %(default)s)",
    )


def _add_download(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--source",
        type=text_argument,
        default="huggingface",
        metavar="huggingface|modelscope|URL",
        help="where from; a URL is that of a mirror of Hugging Face (default %(default)s)",
    )
    parser.add_argument("--revision", type=text_argument, metavar="R", help="branch, tag or commit (default: newest)")
    parser.add_argument(
        "--to", type=Path, default=MODEL_FOLDER, metavar="DIR", help="folder to make (default %(default)s)"
    )


def _add_max_new_tokens(parser: argparse.ArgumentParser, default: int, what: str) -> None:
    parser.add_argument(
        "--max-new-tokens", type=int, default=default, metavar="N", help=f"{what} (default %(default)s)"
    )


def _add_shared(parser: argparse.ArgumentParser, prompt: str, required: bool = True) -> None:
    _add_model(parser)
    parser.add_argument("--prompt", type=text_argument, required=required, metavar="TEXT", help=prompt)
    parser.add_argument("--image", type=Path, action="append", default=[], metavar="FILE", help="a picture; repeatable")
    parser.add_argument("--system", type=text_argument, metavar="TEXT", help="replaces the default system message")


def lora_argument(text: str) -> tuple[Path, float]:
    """Returns a LoRA file and its strength, of FILE or FILE:STRENGTH."""
    file, _, number = text.rpartition(":")
    try:
        strength = float(number)
    except ValueError:
        return Path(text), 1.0
    if not file or Path(text).exists():
        return Path(text), 1.0
    if not math.isfinite(strength):
        raise argparse.ArgumentTypeError(f"strength {number} found, a number expected")
    return Path(file), strength


def _add_model(parser: argparse.ArgumentParser) -> None:
    """Adds what says which model is opened, where and how: for `_open`."""
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="PLACE",
        help="checkpoint folder, released layout or as in the hub's cache; a file of the transformer that `convert` "
        f"wrote; or {NANO}, the tiny model that comes with the pack",
    )
    parser.add_argument(
        "--lora",
        type=lora_argument,
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="a LoRA, at this strength (default 1); repeatable",
    )
    parser.add_argument("--mllm", type=Path, metavar="FILE", help="language model (default: beside --model FILE)")
    parser.add_argument("--vae", type=Path, metavar="FILE", help="VAE (default: beside --model FILE)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="arithmetic and weights; auto: bfloat16 on a GPU that has it, else float32 (default %(default)s)",
    )
    parser.add_argument(
        "--device",
        default="auto",
        metavar="D",
        help="torch device, such as cuda, mps or cpu; auto: the first of these that is there (default %(default)s)",
    )
