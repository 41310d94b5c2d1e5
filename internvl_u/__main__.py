"""The command line: `python -m internvl_u draw`, `ask`, `convert` and more; installed, it is `internvl-u`."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import chat_console
from .arguments import make_parser
from .console import check_model_name, check_places, shown_name, usable_streams
from .defaults import (
    MOST_PICTURES,
    NANO_NOTE,
    REPOSITORY,
)
from .tasks import AS_WRITTEN, question_for

if TYPE_CHECKING:
    from PIL import Image

    from .pipeline import ImageRequest, Pipeline


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, or 1 after a one-line error."""
    with usable_streams():
        return _run(make_parser().parse_args(arguments))


def _run(options: argparse.Namespace) -> int:
    try:
        signal.signal(signal.SIGTERM, _terminate)
    except ValueError:
        pass  # not in the main thread
    try:
        _COMMANDS[options.command](options)
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
        all_cfg_start=options.all_cfg_start,
        all_cfg_end=options.all_cfg_end,
        part_cfg_start=options.part_cfg_start,
        part_cfg_end=options.part_cfg_end,
        speed=options.speed,
    )
    if options.think:
        thought = pipeline.think(request, GenerationConfig(options.max_new_tokens))
        print(thought, file=sys.stderr)
        request = dataclasses.replace(request, thought=thought)
    _draw_files(pipeline, pipeline.settled(request), outs, options)


def _draw_files(pipeline: Pipeline, request: ImageRequest, outs: Sequence[Path], options: argparse.Namespace) -> None:
    """Draws a picture for each file, with a seed each."""
    from tqdm import tqdm

    from .picture_texts import picture_texts
    from .results import save_image

    wishes = [dataclasses.replace(request, seed=request.seed + number) for number in range(len(outs))]
    infos = [picture_texts(pipeline, wish, options.image, options.model) for wish in wishes]
    steps = request.way.steps
    with tqdm(total=steps * len(outs), unit="step", desc="draw") as bar:
        whole = 0

        def show(done: int) -> None:
            bar.update(whole + done - bar.n)

        drawn = pipeline.draw_several(request, [wish.seed for wish in wishes], show)
        for out, info, image in zip(outs, infos, drawn, strict=True):
            save_image(image, out, info)
            whole += steps


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


def _train(options: argparse.Namespace) -> None:
    from .finetune.command import run
    from .results import write_text

    if files := run(options):
        write_text("\n".join(map(str, files)), "list of files")


def _pairs(options: argparse.Namespace) -> None:
    from .finetune import pairs
    from .finetune.maps import Thresholds
    from .results import write_text

    thresholds = Thresholds(options.low, options.high)
    write_text(pairs.run(options.folder, options.out, options.kind, thresholds, options.size), "folder's name")


def _distill(options: argparse.Namespace) -> None:
    from .finetune.distill_command import run
    from .results import write_text

    write_text("\n".join(map(str, run(options))), "list of files")


def _batch(options: argparse.Namespace) -> None:
    from .batch.command import run
    from .results import write_text

    write_text(run(options), "name of the manifest")


def _open(options: argparse.Namespace) -> Pipeline:
    from .devices import chosen_device, chosen_dtype
    from .pipeline import Pipeline
    from .places import is_nano

    check_places(options.model, options.mllm, options.vae)
    device = chosen_device(options.device)
    dtype = chosen_dtype(options.dtype, device)
    pipeline = Pipeline(
        options.model, dtype=dtype, device=device, mllm=options.mllm, vae=options.vae, loras=options.lora
    )
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


def _chat(options: argparse.Namespace) -> None:
    chat_console.run(options, _open(options))


_COMMANDS = {
    "draw": _draw,
    "chat": _chat,
    "ask": _ask,
    "convert": _convert,
    "merge": _merge,
    "train": _train,
    "pairs": _pairs,
    "distill": _distill,
    "batch": _batch,
    "download": _download,
}


if __name__ == "__main__":
    sys.exit(main())
