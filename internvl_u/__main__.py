"""The command line: `python -m internvl_u draw ...` and `python -m internvl_u ask ...`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from . import __version__

DTYPES = ("float32", "bfloat16")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, or 1 after a one-line error."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(f"internvl_u: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("internvl_u: interrupted", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("internvl_u", description="InternVL-U without ComfyUI.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")
    draw = commands.add_parser("draw", help="draw a picture from a text, or edit pictures")
    _common(draw, "what to draw or to change; may be empty; <image> marks a picture's place")
    draw.add_argument("--width", type=int, metavar="W", help="pixels, 16 to 4096 (default: the first picture's)")
    draw.add_argument("--height", type=int, metavar="H", help="pixels, 16 to 4096 (default: the first picture's)")
    draw.add_argument("--steps", type=int, default=20, metavar="N", help="denoising steps (default %(default)s)")
    draw.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the start noise (default %(default)s)")
    draw.add_argument(
        "--all-cfg", type=float, metavar="A", help="guidance of the words (default 4.5; 3.5 if it thinks)"
    )
    draw.add_argument(
        "--part-cfg", type=float, metavar="P", help="guidance of pictures (default 2.0; 1.5 if it thinks)"
    )
    thought = draw.add_mutually_exclusive_group()
    thought.add_argument("--think", action="store_true", help="let the model think first; the thought goes to stderr")
    thought.add_argument("--thought", default="", metavar="TEXT", help="draw from this thought")
    draw.add_argument(
        "--max-new-tokens", type=int, default=200, metavar="N", help="longest thought (default %(default)s)"
    )
    draw.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="the picture to write")
    draw.set_defaults(run=_draw)
    ask = commands.add_parser("ask", help="ask about pictures, or chat without any")
    _common(ask, "the question; <image> marks a picture's place")
    ask.add_argument(
        "--max-new-tokens", type=int, default=512, metavar="N", help="longest answer (default %(default)s)"
    )
    ask.add_argument("--beams", type=int, default=1, metavar="N", help="beams of the search (default %(default)s)")
    ask.set_defaults(run=_ask)
    shrink = commands.add_parser("convert", help="write single files for ComfyUI's model folders, smaller if wished")
    shrink.add_argument("--model", type=Path, required=True, metavar="DIR", help="checkpoint folder, released layout")
    shrink.add_argument("--out", type=Path, required=True, metavar="DIR", help="such as ComfyUI/models")
    shrink.add_argument(
        "--dtype",
        choices=("bfloat16", "fp8_e4m3fn", "fp8_scaled", "fp8_scaled_old"),
        default="bfloat16",
        help="fp8_scaled: a scale a matrix, as recent ComfyUI has it; fp8_scaled_old: its older spelling "
        "(default %(default)s)",
    )
    shrink.set_defaults(run=_convert)
    return parser


def _common(parser: argparse.ArgumentParser, prompt: str) -> None:
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="checkpoint folder, released layout")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help=prompt)
    parser.add_argument("--image", type=Path, action="append", default=[], metavar="FILE", help="a picture; repeatable")
    parser.add_argument("--system", metavar="TEXT", help="replaces the default system message")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="arithmetic and weights (default %(default)s)"
    )
    parser.add_argument("--device", default="cpu", metavar="D", help="torch device, such as cuda (default %(default)s)")


def _draw(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from .pipeline import Drawing
    from .writing import Writing

    if options.out.suffix.lower() != ".png":
        raise ValueError(f"--out {options.out} found, a name ending in .png expected")
    if not options.out.absolute().parent.is_dir():
        raise FileNotFoundError(f"no folder {options.out.absolute().parent} for --out. Make it first.")
    pipeline = _open(options)
    names = {field.name for field in dataclasses.fields(Drawing)} & vars(options).keys()
    drawing = Drawing(images=_images(options, pipeline), **{name: getattr(options, name) for name in names})
    if options.think:
        thought = pipeline.think(drawing, writing=Writing(options.max_new_tokens))
        print(thought, file=sys.stderr)
        drawing = dataclasses.replace(drawing, thought=thought)
    with tqdm(total=drawing.steps, unit="step", desc="draw") as bar:
        image = pipeline.draw(drawing, lambda done: bar.update(done - bar.n))
    image.save(options.out, pnginfo=_metadata(options, pipeline, drawing))


def _ask(options: argparse.Namespace) -> None:
    from .writing import Writing

    pipeline = _open(options)
    writing = Writing(options.max_new_tokens, beams=options.beams)
    print(pipeline.answer(options.prompt, _images(options, pipeline), options.system, writing=writing))


def _convert(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from .convert import convert

    with tqdm(unit="B", unit_scale=True, desc="convert") as bar:
        files = convert(options.model, options.out, options.dtype, bar.update)
    for file in files:
        print(file)


def _open(options: argparse.Namespace):
    import torch

    from .pipeline import Pipeline

    return Pipeline(options.model, dtype=getattr(torch, options.dtype), device=options.device)


def _images(options: argparse.Namespace, pipeline) -> tuple:
    from PIL import Image, UnidentifiedImageError

    from .picture import remarks, to_rgb

    images = []
    for file in options.image:
        try:
            with Image.open(file) as image:
                image.load()
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
            raise ValueError(f"--image {file} is not readable as a picture ({error})") from error
        for remark in remarks(image, pipeline.encoder.sizes):
            print(f"internvl_u: {file}: {remark}", file=sys.stderr)
        images.append(to_rgb(image))
    return tuple(images)


def _metadata(options: argparse.Namespace, pipeline, drawing):
    from PIL.PngImagePlugin import PngInfo

    (width, height), (all_cfg, part_cfg) = pipeline.size(drawing), drawing.scales
    settings = {name: getattr(drawing, name) for name in ("prompt", "system", "thought", "steps", "seed")}
    settings |= {"width": width, "height": height, "all_cfg": all_cfg, "part_cfg": part_cfg, "dtype": options.dtype}
    settings |= {"images": [file.name for file in options.image], "model": options.model.absolute().name}
    info = PngInfo()
    info.add_itxt("internvl_u", json.dumps(settings | {"version": __version__}, ensure_ascii=False))
    return info


if __name__ == "__main__":
    sys.exit(main())
