"""The command line: `python -m internvl_u draw`, `ask`, `convert` and more; installed, it is `internvl-u`."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__, chat_console
from .console import check_model_name, shown_name, text_argument, usable_streams
from .defaults import (
    ANSWER_TOKENS,
    FILE_DTYPES,
    GGUF_DTYPES,
    GUIDANCE,
    GUIDANCE_WITH_THOUGHT,
    LARGEST,
    MODEL_FOLDER,
    MOST_PICTURES,
    NANO,
    NANO_NOTE,
    RELEASED_SIZE,
    REPOSITORY,
    SMALLEST,
    STEPS,
    THOUGHT_TOKENS,
)
from .tasks import AS_WRITTEN, TASKS, question_for

if TYPE_CHECKING:
    from PIL import Image

    from .pipeline import ImageRequest, Pipeline


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, or 1 after a one-line error."""
    with usable_streams():
        return _run(_parser().parse_args(arguments))


def _run(options: argparse.Namespace) -> int:
    try:
        signal.signal(signal.SIGTERM, _terminate)
    except ValueError:
        pass  # not in the main thread
    try:
        options.run(options)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(f"internvl_u: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("internvl_u: interrupted", file=sys.stderr)
        return 1
    return 0


def _terminate(number: int, frame: object) -> None:
    """Leaves through every `finally`, so that no half-written file stays."""
    sys.exit(128 + number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("internvl_u", description="InternVL-U without ComfyUI.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_draw(commands.add_parser("draw", help="draw a picture from a text, or edit pictures"))
    _add_chat(commands.add_parser("chat", help="a conversation: questions, answers, pictures and changes of them"))
    _add_ask(commands.add_parser("ask", help="ask about pictures, or chat without any"))
    _add_convert(commands.add_parser("convert", help="write single files for ComfyUI's model folders"))
    _add_merge(commands.add_parser("merge", help="write a checkpoint folder with LoRAs merged into its weights"))
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
    parser.set_defaults(run=_draw)


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
    parser.set_defaults(run=_ask)


def _add_chat(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    chat_console.add_arguments(parser)
    parser.set_defaults(run=lambda options: chat_console.run(options, _open(options)))


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
    parser.set_defaults(run=_convert)


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
    parser.set_defaults(run=_merge)


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
    parser.set_defaults(run=_download)


def _add_max_new_tokens(parser: argparse.ArgumentParser, default: int, what: str) -> None:
    parser.add_argument(
        "--max-new-tokens", type=int, default=default, metavar="N", help=f"{what} (default %(default)s)"
    )


def _add_shared(parser: argparse.ArgumentParser, prompt: str, required: bool = True) -> None:
    _add_model(parser)
    parser.add_argument("--prompt", type=text_argument, required=required, metavar="TEXT", help=prompt)
    parser.add_argument("--image", type=Path, action="append", default=[], metavar="FILE", help="a picture; repeatable")
    parser.add_argument("--system", type=text_argument, metavar="TEXT", help="replaces the default system message")


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


def _draw(options: argparse.Namespace) -> None:
    from .generation import GenerationConfig
    from .pipeline import ImageRequest
    from .results import check_target

    outs = _numbered(options.out, options.count)
    for out in outs:
        check_target(out)
    pipeline = _open(options)
    request = ImageRequest(
        options.prompt,
        options.width,
        options.height,
        options.steps,
        options.seed,
        all_cfg=options.all_cfg,
        part_cfg=options.part_cfg,
        system=options.system,
        images=_images(options, pipeline),
        thought=options.thought,
        negative_prompt=options.negative_prompt,
        reference_size=options.reference_size,
    )
    if options.think:
        thought = pipeline.think(request, GenerationConfig(options.max_new_tokens))
        print(thought, file=sys.stderr)
        request = dataclasses.replace(request, thought=thought)
    _draw_files(pipeline, request, outs, options)


def _draw_files(pipeline: Pipeline, request: ImageRequest, outs: Sequence[Path], options: argparse.Namespace) -> None:
    """Draws a picture for each file, with a seed each."""
    from tqdm import tqdm

    from .picture_texts import picture_texts
    from .results import save_image

    wishes = [dataclasses.replace(request, seed=request.seed + number) for number in range(len(outs))]
    infos = [picture_texts(pipeline, wish, options.image, options.model) for wish in wishes]
    with tqdm(total=request.steps * len(outs), unit="step", desc="draw") as bar:
        whole = 0

        def show(done: int) -> None:
            bar.update(whole + done - bar.n)

        drawn = pipeline.draw_several(request, [wish.seed for wish in wishes], show)
        for out, info, image in zip(outs, infos, drawn, strict=True):
            save_image(image, out, info)
            whole += request.steps


def _numbered(out: Path, count: int) -> list[Path]:
    """Returns the names of `count` files: the one of a single file, else with -1, -2 ... before its ending.

    Raises:
        ValueError: the count is out of range.
    """
    if not 1 <= count <= MOST_PICTURES:
        raise ValueError(f"--count {count} found, 1 to {MOST_PICTURES} expected")
    return [out] if count == 1 else [out.with_name(f"{out.stem}-{n}{out.suffix}") for n in range(1, count + 1)]


def _ask(options: argparse.Namespace) -> None:
    from .folder import ask_of_each, pictures_in
    from .generation import GenerationConfig
    from .results import write_text

    if options.prompt is None and options.task == AS_WRITTEN:
        raise ValueError("neither --prompt nor --task found, one of them expected")
    if options.folder and options.image:
        raise ValueError("--folder and --image found, one of them expected")
    question = question_for(options.task, options.prompt or "")
    config = GenerationConfig(options.max_new_tokens, beams=options.beams)
    pictures = pictures_in(options.folder) if options.folder else ()
    pipeline = _open(options)
    if pictures:
        files = ask_of_each(pictures, pipeline, question, options.system, config, options.overwrite)
        if files:
            write_text("\n".join(files), "list of files")
    else:
        write_text(pipeline.answer(question, _images(options, pipeline), options.system, config), "answer")


def _convert(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from .convert import convert
    from .gguf_file import GGUF
    from .places import checkpoint_folder
    from .results import write_text

    with tqdm(unit="B", unit_scale=True, desc="convert") as bar:
        files = convert(checkpoint_folder(options.model), options.out, options.dtype, bar.update)
    for file in files:
        if file.suffix == ".gguf":
            print(f"{file.name}: {GGUF(file).summary()}", file=sys.stderr)
    write_text("\n".join(map(str, files)), "list of files")


def _merge(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from .merge import merge
    from .numbers import is_finite
    from .places import checkpoint_folder
    from .results import write_text

    check_model_name(str(options.model))
    strengths = options.strength or [1.0]
    if not all(map(is_finite, [*strengths, *filter(None, [options.alpha])])):
        raise ValueError("--strength or --alpha that is infinite or not a number found, a number expected")
    if len(strengths) == 1:
        strengths *= len(options.lora)
    if len(strengths) != len(options.lora):
        raise ValueError(f"{len(strengths)} of --strength found for {len(options.lora)} of --lora, one each expected")
    with tqdm(unit="B", unit_scale=True, desc="merge") as bar:
        done = merge(
            checkpoint_folder(options.model), options.out, list(zip(options.lora, strengths)), options.alpha, bar.update
        )
    print("\n".join(f"internvl_u: {report}" for report in done.reports), file=sys.stderr)
    write_text("\n".join(map(str, done.files)), "list of files")


def _download(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from .download import download
    from .results import write_text

    target = options.to.absolute()
    print(f"internvl_u: {REPOSITORY} from {options.source} to {shown_name(str(target))}", file=sys.stderr)

    def show(done: int, total: int) -> None:
        if total:
            bar.total = total
            bar.update(done - bar.n)

    try:
        with tqdm(unit="B", unit_scale=True, desc="download") as bar:
            download(target, options.source, options.revision, show)
    except KeyboardInterrupt:
        print("internvl_u: what was fetched is kept; the same command goes on from there", file=sys.stderr)
        raise
    write_text(str(target), "folder's name")


def _open(options: argparse.Namespace) -> Pipeline:
    from .devices import chosen_device, chosen_dtype
    from .pipeline import Pipeline
    from .places import is_nano

    for flag, place in (("--model", options.model), ("--mllm", options.mllm), ("--vae", options.vae)):
        if place is not None:
            check_model_name(str(place), flag)
    device = chosen_device(options.device)
    dtype = chosen_dtype(options.dtype, device)
    pipeline = Pipeline(options.model, dtype=dtype, device=device, mllm=options.mllm, vae=options.vae)
    if is_nano(pipeline.root):
        print(f"internvl_u: {NANO_NOTE}", file=sys.stderr)
    return pipeline


def _images(options: argparse.Namespace, pipeline: Pipeline) -> tuple[Image.Image, ...]:
    from .images import open_image, preprocessing_warnings, scaling_remarks, to_rgb

    images, sizes = [], pipeline.encoder.sizes
    for file in options.image:
        image = open_image(file, f"--image {file}")
        for warning in (*preprocessing_warnings(image, sizes), *scaling_remarks(image, sizes)):
            print(f"internvl_u: {file}: {warning}", file=sys.stderr)
        images.append(to_rgb(image))
    return tuple(images)


if __name__ == "__main__":
    sys.exit(main())
