"""The command line: `python -m internvl_u draw --model DIR --prompt TEXT --out FILE.png`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
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
    draw = commands.add_parser("draw", help="draw a picture from a text")
    draw.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="checkpoint folder in the released layout"
    )
    draw.add_argument("--prompt", required=True, metavar="TEXT", help="what to draw; may be empty")
    draw.add_argument("--width", type=int, default=1024, metavar="W", help="pixels, 16 to 4096 (default %(default)s)")
    draw.add_argument("--height", type=int, default=1024, metavar="H", help="pixels, 16 to 4096 (default %(default)s)")
    draw.add_argument("--steps", type=int, default=20, metavar="N", help="denoising steps (default %(default)s)")
    draw.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the start noise (default %(default)s)")
    draw.add_argument(
        "--all-cfg", type=float, default=4.5, metavar="A", help="guidance of the words (default %(default)s)"
    )
    draw.add_argument(
        "--part-cfg", type=float, default=2.0, metavar="P", help="guidance of reference images (default %(default)s)"
    )
    draw.add_argument("--system", metavar="TEXT", help="replaces the default system message")
    draw.add_argument("--dtype", choices=DTYPES, default="float32", help="arithmetic and weights (default %(default)s)")
    draw.add_argument("--device", default="cpu", metavar="D", help="torch device, such as cuda (default %(default)s)")
    draw.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="the picture to write")
    draw.set_defaults(run=_draw)
    return parser


def _draw(options: argparse.Namespace) -> None:
    import torch
    from tqdm import tqdm

    from .pipeline import Drawing, Pipeline

    if options.out.suffix.lower() != ".png":
        raise ValueError(f"--out {options.out} found, a name ending in .png expected")
    if not options.out.absolute().parent.is_dir():
        raise FileNotFoundError(f"no folder {options.out.absolute().parent} for --out. Make it first.")
    names = ("prompt", "width", "height", "steps", "seed", "all_cfg", "part_cfg", "system")
    drawing = Drawing(**{name: getattr(options, name) for name in names})
    pipeline = Pipeline(options.model, dtype=getattr(torch, options.dtype), device=options.device)
    with tqdm(total=drawing.steps, unit="step", desc="draw") as bar:
        image = pipeline.draw(drawing, lambda done: bar.update(done - bar.n))
    settings = asdict(drawing) | {
        "dtype": options.dtype,
        "model": options.model.absolute().name,
        "version": __version__,
    }
    image.save(options.out, pnginfo=_metadata(settings))


def _metadata(settings: dict):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("internvl_u", json.dumps(settings, ensure_ascii=False))
    return info


if __name__ == "__main__":
    sys.exit(main())
