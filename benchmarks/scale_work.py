"""What a million pictures are made of: operations that are counted, and times that this machine measures."""

from __future__ import annotations

import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from io import BytesIO
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from internvl_u.config import LanguageConfig, VisionConfig
from internvl_u.pipeline import ImageRequest, Pipeline
from internvl_u.qwen3 import Qwen3
from internvl_u.vae import StandaloneVAE, vae_shapes
from internvl_u.vision import VisionTower

from .operations import count
from .random_weights import IMAGE_SIZE, LANGUAGE, VAE_WIDTH
from .workload import LAYOUTS, RELEASED

NANO = Path(__file__).resolve().parent.parent / "demo" / "internvl-u-nano"
TOWER = VisionConfig(1024, 24, 16, 4096, 14, IMAGE_SIZE, 1e-6, 0.5, LANGUAGE["hidden_size"])
TERA = 1e12
LEVELS = {1: "fastest", 4: "ComfyUI's Save Image", 6: "this library, Pillow's default"}
"""The levels of PNG's compression that are measured."""


@cache
def count_picture(mode: str, pixels: int, steps: int = 20) -> Mapping[str, float]:
    """Returns the operations of a picture at the released size by what they are for, in units of 1e12.

    Counted on tensors without data. Of an edit's picture also what reads the picture, of the same size.
    """
    bf16 = torch.bfloat16
    with torch.device("meta"):
        language = Qwen3(LanguageConfig(**LANGUAGE), dtype=bf16)
        vae = StandaloneVAE({name: torch.empty(shape, dtype=bf16) for name, shape in vae_shapes(VAE_WIDTH).items()})
        latents = torch.empty(1, RELEASED.channels, pixels // 8, pixels // 8, dtype=bf16)
        image = torch.empty(1, 3, pixels, pixels, dtype=bf16)
        width = LANGUAGE["hidden_size"]
        words = [torch.empty(1, sum(span.count for span in layout), width, dtype=bf16) for layout in LAYOUTS[mode]]
    found = {"steps": steps * count(mode, pixels), "decode": _operations(lambda: vae.decode(latents))}
    found["text"] = sum(_operations(lambda branch=branch: language(branch)) for branch in words)
    if mode == "edit":
        found["look"] = _operations(lambda: vae.encode(image)) + _look()
    return found | {"all": sum(found.values())}


def token_bytes() -> int:
    """Returns the bytes of bf16 weights that writing a token reads: the language model without its table of tokens."""
    with torch.device("meta"):
        model = Qwen3(LanguageConfig(**LANGUAGE), dtype=torch.bfloat16)
    table = model.model.embed_tokens.weight.nbytes
    return sum(weights.nbytes for weights in model.parameters()) - table


def _look() -> float:
    with torch.device("meta"):
        tower = VisionTower(TOWER, dtype=torch.bfloat16)
        pixels = torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.bfloat16)
    return _operations(lambda: tower(pixels))


def _operations(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        run()
    return counter.get_total_flops() / TERA


def make_pictures(pixels: int, seed: int = 0) -> dict[str, Image.Image]:
    """Returns stand-ins for what a model draws: flat shapes, a soft and a sharp picture.

    The latter two are random fields whose amplitudes fall with the frequency as f^-1.6 and, as those of sharp
    photographs, as 1/f.
    """
    random = numpy.random.default_rng(seed)
    rows, columns = numpy.mgrid[:pixels, :pixels]
    flat = numpy.full((pixels, pixels, 3), 240, numpy.uint8)
    flat[(rows - pixels / 3) ** 2 + (columns - pixels / 3) ** 2 < (pixels / 5) ** 2] = (200, 30, 30)
    found = {"flat": flat, "soft": _picture(random, pixels, 1.6), "sharp": _picture(random, pixels, 1.0)}
    return {name: Image.fromarray(values) for name, values in found.items()}


def _picture(random: numpy.random.Generator, pixels: int, fall: float) -> numpy.ndarray:
    """Returns a picture [pixels, pixels, 3] that is mostly grey with some colour."""
    frequency = numpy.hypot(numpy.fft.fftfreq(pixels)[:, None], numpy.fft.rfftfreq(pixels)[None])
    frequency[0, 0] = numpy.inf
    grey, colours = (_field(random, frequency**fall, count) for count in (1, 3))
    return (128 + 45 * grey + 12 * colours).clip(0, 255).astype(numpy.uint8)


def _field(random: numpy.random.Generator, falls: numpy.ndarray, count: int) -> numpy.ndarray:
    """Returns random fields [pixels, pixels, count] of variance 1, their amplitudes divided by `falls`."""
    shape = (count, *falls.shape)
    waves = (random.normal(size=shape) + 1j * random.normal(size=shape)) / falls
    field = numpy.fft.irfft2(waves, s=(falls.shape[0],) * 2)
    return numpy.moveaxis(field / field.std(axis=(1, 2), keepdims=True), 0, -1)


def encoded(picture: Image.Image, level: int) -> bytes:
    """Returns a picture as a PNG file."""
    file = BytesIO()
    picture.save(file, format="PNG", compress_level=level)
    return file.getvalue()


def timed(run: Callable[[], object], repeats: int, clock: Callable[[], float]) -> tuple[float, float, float]:
    """Returns the median, the shortest and the longest of some calls, in seconds; one more goes before."""
    times = []
    for _ in range(repeats + 1):
        start = clock()
        run()
        times.append(clock() - start)
    return statistics.median(times[1:]), min(times[1:]), max(times[1:])


def file_rows(pixels: int, repeats: int) -> list[dict]:
    """Returns what it takes to make, to check and to write the files of one picture, and one part of a manifest.

    Encoding and hashing in a core's own time, so that other programs count little; writing by the clock on the wall.
    """
    rows, wall = [], time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name, picture in make_pictures(pixels).items():
            for level in LEVELS:
                data = encoded(picture, level)
                rows.append(_row(f"PNG, {name}, level {level}", partial(encoded, picture, level), repeats, len(data)))
        rows.append(_row("sha256 of the sharp one", lambda: hashlib.sha256(data).digest(), repeats, len(data)))
        rows.append(_row("write, fsync and rename it", lambda: _write(place / "a.png", data), repeats, len(data), wall))
        rows += _part_rows(place, repeats)
    return rows


def _row(
    what: str, run: Callable[[], object], repeats: int, size: int, clock: Callable[[], float] = time.process_time
) -> dict:
    middle, least, most = timed(run, repeats, clock)
    return {"what": what, "ms": 1e3 * middle, "least": 1e3 * least, "most": 1e3 * most, "MB": size / 1e6}


def _write(file: Path, data: bytes) -> None:
    unfinished = file.with_suffix(".part")
    with unfinished.open("wb") as target:
        target.write(data)
        target.flush()
        os.fsync(target.fileno())
    os.replace(unfinished, file)


def _part_rows(place: Path, repeats: int) -> list[dict]:
    """Returns a row for a manifest's part of eight pictures; none where pyarrow is not installed."""
    try:
        from pyarrow import Table, parquet
    except ImportError:
        return []
    row = {"name": "a" * 20, "file": "b" * 60, "sha256": "c" * 64, "settings": "d" * 300, "digest": "e" * 64}
    row |= {"bytes": 1, "width": 1024, "height": 1024, "seed": 1, "seconds": 1.0, "started": 1.0, "text": ""}
    file = place / "part.parquet"

    def write() -> None:
        made = Table.from_pylist([row | {"seed": seed} for seed in range(8)])
        parquet.write_table(made, place / "part.tmp")
        os.replace(place / "part.tmp", file)

    write()
    size, wall = file.stat().st_size, time.perf_counter
    return [
        _row("a part of the manifest, 8 rows", write, repeats, size, wall),
        _row("reading that", lambda: parquet.read_table(file), repeats, size, wall),
    ]


def spread(pictures: int, pixels: int = 64) -> list[float]:
    """Returns how long pictures of the nano model take to draw, relative to their mean, one after the other."""
    pipeline = Pipeline(NANO, dtype=torch.float32, device=torch.device("cpu"))
    times = []
    for seed in range(pictures + 2):
        start = time.perf_counter()
        pipeline.draw(ImageRequest("a red circle", pixels, pixels, 20, seed=seed))
        times.append(time.perf_counter() - start)
    usual = statistics.mean(times[2:])
    return [one / usual for one in times[2:]]
