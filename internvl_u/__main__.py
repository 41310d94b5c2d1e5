"""The command line: `python -m internvl_u draw`, `ask` and `convert`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
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
    RELEASED_SIZE,
    REPOSITORY,
    SMALLEST,
    STEPS,
    THOUGHT_TOKENS,
)

if TYPE_CHECKING:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from .pipeline import ImageRequest, Pipeline

DTYPES = ("float32", "bfloat16")


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
    thought = parser.add_mutually_exclusive_group()
    thought.add_argument("--think", action="store_true", help="let the model think first; the thought goes to stderr")
    thought.add_argument("--thought", type=text_argument, default="", metavar="TEXT", help="draw from this thought")
    _add_max_new_tokens(parser, THOUGHT_TOKENS, "longest thought")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="the picture to write")
    parser.set_defaults(run=_draw)


def _add_ask(parser: argparse.ArgumentParser) -> None:
    _add_shared(parser, "the question; <image> marks a picture's place")
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


def _add_shared(parser: argparse.ArgumentParser, prompt: str) -> None:
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="checkpoint folder, released layout")
    parser.add_argument("--prompt", type=text_argument, required=True, metavar="TEXT", help=prompt)
    parser.add_argument("--image", type=Path, action="append", default=[], metavar="FILE", help="a picture; repeatable")
    parser.add_argument("--system", type=text_argument, metavar="TEXT", help="replaces the default system message")
    _add_device(parser)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="checkpoint folder, released layout")
    _add_device(parser)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="arithmetic and weights (default %(default)s)"
    )
    parser.add_argument("--device", default="cpu", metavar="D", help="torch device, such as cuda (default %(default)s)")


def _draw(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from .generation import GenerationConfig
    from .pipeline import ImageRequest
    from .results import check_target, save_image

    check_target(options.out)
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
    )
    if options.think:
        thought = pipeline.think(request, GenerationConfig(options.max_new_tokens))
        print(thought, file=sys.stderr)
        request = dataclasses.replace(request, thought=thought)
    info = _png_metadata(options, pipeline, request)
    with tqdm(total=request.steps, unit="step", desc="draw") as bar:
        image = pipeline.draw(request, lambda done: bar.update(done - bar.n))
    save_image(image, options.out, info)


def _ask(options: argparse.Namespace) -> None:
    from .generation import GenerationConfig
    from .results import write_text

    pipeline = _open(options)
    config = GenerationConfig(options.max_new_tokens, beams=options.beams)
    write_text(pipeline.answer(options.prompt, _images(options, pipeline), options.system, config), "answer")


def _convert(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from .convert import convert
    from .gguf_file import GGUF
    from .results import write_text

    with tqdm(unit="B", unit_scale=True, desc="convert") as bar:
        files = convert(options.model, options.out, options.dtype, bar.update)
    for file in files:
        if file.suffix == ".gguf":
            print(f"{file.name}: {GGUF(file).summary()}", file=sys.stderr)
    write_text("\n".join(map(str, files)), "list of files")


def _merge(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from .merge import merge
    from .numbers import is_finite
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
        done = merge(options.model, options.out, list(zip(options.lora, strengths)), options.alpha, bar.update)
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
    import torch

    from .pipeline import Pipeline

    check_model_name(str(options.model))
    return Pipeline(options.model, dtype=getattr(torch, options.dtype), device=options.device)


def _images(options: argparse.Namespace, pipeline: Pipeline) -> tuple[Image.Image, ...]:
    from PIL import Image, UnidentifiedImageError

    from .images import preprocessing_warnings, to_rgb

    images = []
    for file in options.image:
        try:
            with Image.open(file) as image:
                image.load()
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
            raise ValueError(f"--image {file} is not readable as a picture ({error})") from error
        for warning in preprocessing_warnings(image, pipeline.encoder.sizes):
            print(f"internvl_u: {file}: {warning}", file=sys.stderr)
        images.append(to_rgb(image))
    return tuple(images)


def _png_metadata(options: argparse.Namespace, pipeline: Pipeline, request: ImageRequest) -> PngInfo:
    from PIL.PngImagePlugin import PngInfo

    (width, height), guidance = pipeline.size(request), request.guidance
    settings = {name: getattr(request, name) for name in ("prompt", "system", "thought", "steps", "seed")}
    settings |= {"width": width, "height": height, **guidance._asdict(), "dtype": options.dtype}
    settings |= {"images": [shown_name(file.name) for file in options.image]}
    settings |= {"model": shown_name(options.model.absolute().name)}
    info = PngInfo()
    info.add_itxt("internvl_u", json.dumps(settings | {"version": __version__}, ensure_ascii=False))
    return info


if __name__ == "__main__":
    sys.exit(main())
