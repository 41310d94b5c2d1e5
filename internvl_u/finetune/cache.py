"""What is learned from, computed once and kept on disk: latents, contexts, and what is seen in pictures.

A file's name is the hash of all that it is made of: the model's files, the text, the pictures, their sizes. So what is
there is right, whoever asks for it, and what has changed is made anew. Each file is written whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .. import __version__
from ..checkpoint import open_checkpoint
from ..encoder import check_length
from ..files import digest_of
from ..images import fit_reference, latent_size
from ..pipeline import ImageRequest, Pipeline
from ..prompt import SYSTEM_ANSWER, drawing_system, generation_prompt
from ..rope import Grid
from ..tokenizer import IM_END
from ..weights import SMALL
from .buckets import Buckets, Placed, Size, fill
from .examples import Example
from .pictures import Picture
from .stored import (
    CONDITIONAL,
    PARTIAL,
    UNCONDITIONAL,
    SampleFiles,
    Samples,
    TextSample,
    TextSamples,
    is_whole,
    save,
    save_contexts,
)

VERSION = 1
"""Of what is in the files."""
LATENTS, CONTEXTS, FEATURES = "latents", "contexts", "features"
"""Folders of the cache."""
Report = Callable[[str, int, int], object]
"""(folder, how many are made, how many are to be made)"""
Make = Callable[[], Image.Image]


class SampleCache:
    """A folder of what a pipeline makes of examples. Several datasets, sizes and models may share one."""

    def __init__(
        self,
        folder: Path,
        pipeline: Pipeline,
        resolution: int | None = None,
        report: Report = lambda kind, done, total: None,
    ):
        """`resolution` is the side in pixels of a square of the area that pictures are learned at; see `Buckets`.

        Raises:
            ValueError: `resolution` is out of range.
            OSError: the folder cannot be made.
        """
        encoder = pipeline.encoder
        self.folder, self.pipeline, self.report = folder, pipeline, report
        self.buckets = Buckets.of_resolution(resolution, encoder.default_size, encoder.sizes)
        self.made, self.found = Counter(), Counter()
        """How many files of each folder were made, and how many were there."""
        own = {"version": [VERSION, __version__], "dtype": str(pipeline.dtype)}
        self._language = own | {"model": _fingerprint(pipeline.files.language, "vlm")}
        self._vae = own | {"model": _fingerprint(pipeline.files.vae, "vae")}
        for kind in (LATENTS, CONTEXTS, FEATURES):
            (folder / kind).mkdir(parents=True, exist_ok=True)

    def samples(self, examples: Sequence[Example]) -> Samples:
        """Returns the samples of the examples that have a picture to draw, in their order; makes what is not there.

        Raises:
            ValueError: an example cannot be learned from: a picture is unreadable, a text too long. Nothing is made.
            OSError: there is no room on the disk.
        """
        drawn = [one for one in examples if one.image is not None]
        placed = [self.buckets.place(one) for one in drawn]
        files = [self._files(*one) for one in zip(drawn, placed, strict=True)]
        latents: dict[Path, tuple[Example, Make]] = {}
        contexts: dict[Path, Example] = {}
        needed = 0
        for example, how, one in zip(drawn, placed, files, strict=True):
            images = zip((one.latent, *one.references), self._images(example, how), one.shape, strict=True)
            for file, image, (rows, columns) in images:
                if file not in latents and self._is_missing(file, LATENTS):
                    latents[file], needed = (example, image), needed + 64 * rows * columns
            if one.contexts not in contexts and self._is_missing(one.contexts, CONTEXTS, one.unconditional):
                contexts[one.contexts], needed = example, needed + self._context_bytes(example)
        _check_readable(image for _, image in latents.values())
        self._check_room(needed)
        self._make(LATENTS, latents, lambda file, one: self._make_latent(file, *one))
        unconditional = {one.contexts: one.unconditional for one in files}
        self._make(CONTEXTS, contexts, lambda file, one: self._make_contexts(file, unconditional[file], one))
        return Samples(drawn, files)

    def text_samples(self, examples: Sequence[Example]) -> TextSamples:
        """Returns what the language model learns of examples: answers, and thoughts before drawing.

        Raises:
            ValueError: an example cannot be learned from: a picture is unreadable, a text too long. Nothing is made.
            OSError: there is no room on the disk.
        """
        written = [one for one in examples if one.answer is not None or one.thought]
        samples = [self._text_sample(one) for one in written]
        files, missing = [], {}
        for example in written:
            files.append([self._file(FEATURES, self._language, [one.digest]) for one in example.references])
            for file, picture in zip(files[-1], example.references, strict=True):
                if file not in missing and self._is_missing(file, FEATURES):
                    missing[file] = picture
        _check_readable(picture.open for picture in missing.values())
        self._make(FEATURES, missing, lambda file, picture: save(file, {"features": self._features(picture)}))
        return TextSamples(written, samples, files)

    def summary(self) -> str:
        """Returns a sentence on what was there and what was made."""
        kinds = [kind for kind in (LATENTS, CONTEXTS, FEATURES) if self.made[kind] + self.found[kind]]
        told = (f"{self.found[kind]} {kind} were there, {self.made[kind]} were made" for kind in kinds)
        return f"cache {self.folder}: {'; '.join(told)}"

    def request(self, example: Example) -> ImageRequest:
        """Returns an example with a picture to draw as the pipeline is asked for it.

        Raises:
            ValueError: a picture is unreadable.
        """
        return self.request_with(example, self.buckets.images(example)[1])

    def request_with(self, example: Example, images: tuple[Image.Image, ...] | None = None) -> ImageRequest:
        """Returns an example as the pipeline is asked for it, with references that are opened already.

        Without `images` it has as many as the example, and nothing is seen in them: for counting tokens.
        """
        if images is None:
            images = (Image.new("RGB", (1, 1)),) * len(example.references)
        thought = ""
        if example.thought:  # what the transformer is handed of it lacks its last token
            tokenizer = self.pipeline.encoder.tokenizer
            written, _ = tokenizer.encode([example.thought])
            thought = tokenizer.decode_thought((*written, tokenizer.special[IM_END]))
        return ImageRequest(example.text, images=images, thought=thought)

    def _files(self, example: Example, placed: Placed) -> SampleFiles:
        assert example.image is not None
        digests = [one.digest for one in example.references]
        sizes = [placed.size, *self._reference_sizes(example, placed)]
        kept = [True, *placed.cropped]
        latents = [
            self._file(LATENTS, self._vae, [picture.digest, size, "cut" if cut else "whole"])
            for picture, size, cut in zip((example.image, *example.references), sizes, kept, strict=True)
        ]
        seen = [[one, placed.size if cut else None] for one, cut in zip(digests, placed.cropped, strict=True)]
        return SampleFiles(
            latents[0],
            tuple(latents[1:]),
            self._file(CONTEXTS, self._language, [example.text, example.thought, seen]),
            self._file(CONTEXTS, self._language, [UNCONDITIONAL, bool(seen)]),
            self.shape(example),
        )

    def shape(self, example: Example) -> tuple[Grid, ...]:
        """Returns the (rows, columns) of the latents of an example with a picture to draw, and of its references.

        Raises:
            ValueError: a picture is unreadable.
        """
        placed = self.buckets.place(example)
        sizes = [placed.size, *self._reference_sizes(example, placed)]
        return tuple(latent_size(*size) for size in sizes)

    def _reference_sizes(self, example: Example, placed: Placed) -> list[Size]:
        """Returns the (width, height) at which the transformer sees each reference."""
        fit = self.buckets.references.fit
        pairs = zip(example.references, placed.cropped, strict=True)
        return [placed.size if cut else fit(*one.size) for one, cut in pairs]

    def _images(self, example: Example, placed: Placed) -> list[Make]:
        """Returns what opens each picture, at the size at which the transformer sees it."""
        assert example.image is not None

        def cut(picture: Picture) -> Make:
            return lambda: fill(picture.open(), placed.size)

        def whole(picture: Picture) -> Make:
            return lambda: fit_reference(picture.open(), self.buckets.references)

        pairs = zip(example.references, placed.cropped, strict=True)
        return [cut(example.image), *(cut(one) if is_cut else whole(one) for one, is_cut in pairs)]

    def _make_latent(self, file: Path, example: Example, image: Make) -> None:
        try:
            save(file, {"latent": self.pipeline.encode(image())[0].float()})
        except RuntimeError as error:
            raise RuntimeError(f"{example.name}: {error}") from error

    def _make_contexts(self, file: Path, unconditional: Path, example: Example) -> None:
        try:
            contexts = self.pipeline.encode_contexts(self.request(example))
        except RuntimeError as error:
            raise RuntimeError(f"{example.name}: {error}") from error
        branches = {CONDITIONAL: contexts.conditional}
        if contexts.partial is not None:
            branches[PARTIAL] = contexts.partial
        save_contexts(file, branches)
        if not unconditional.exists() or not is_whole(unconditional):
            save_contexts(unconditional, {UNCONDITIONAL: contexts.unconditional})

    def _context_bytes(self, example: Example) -> int:
        """Returns the bytes of an example's contexts; makes sure, before anything is made, that its text fits."""
        try:
            prompts = self.pipeline.branch_prompts(self.request_with(example))
        except ValueError as error:
            raise ValueError(f"{example.name}: {error}") from error
        tokens = sum(len(one.ids) - one.user_start for one in (prompts.conditional, prompts.partial))
        config, layers = self.pipeline._mllm().language_model.config, self.pipeline.encoder.layers
        return tokens * config.hidden_size * len(layers) * self.pipeline.dtype.itemsize

    def text_sample(self, example: Example, grid: int) -> TextSample:
        """Returns what the language model learns of an example, without features; an image has `grid` ** 2 tokens.

        Raises:
            ValueError: the text has more placeholders than there are images.
        """
        count, tokenizer = len(example.references), self.pipeline.encoder.tokenizer
        system = drawing_system(count) if example.answer is None else SYSTEM_ANSWER
        said = example.thought if example.answer is None else example.answer
        prompt = generation_prompt(tokenizer, example.text, system=system, images=count, grid=grid)
        target = (*tokenizer.encode([said])[0], tokenizer.special[IM_END])
        return TextSample(replace(prompt, ids=(*prompt.ids, *target)), len(prompt.ids), ())

    def _text_sample(self, example: Example) -> TextSample:
        """Returns `text_sample`, made sure to fit into the model's context."""
        model = self.pipeline._mllm()
        try:
            sample = self.text_sample(example, model.vision.grid)
            check_length(model, sample.prompt)
        except ValueError as error:
            raise ValueError(f"{example.name}: {error}") from error
        return sample

    @torch.inference_mode()
    def _features(self, picture: Picture) -> torch.Tensor:
        pipeline = self.pipeline
        where: dict[str, Any] = {"device": pipeline.device, "dtype": pipeline.dtype}
        return pipeline.encoder.image_features(pipeline._mllm(), (picture.open(),), **where)[0]

    def _file(self, kind: str, made_by: Mapping[str, object], made_of: Sequence[object]) -> Path:
        text = json.dumps([kind, made_by, made_of], sort_keys=True)
        return self.folder / kind / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"

    def _is_missing(self, file: Path, kind: str, *others: Path) -> bool:
        missing = not all([is_whole(one) for one in (file, *others)])
        self.found[kind] += not missing
        return missing

    def _make(self, kind: str, missing: Mapping[Path, Any], make: Callable[[Path, Any], object]) -> None:
        for count, (file, what) in enumerate(missing.items(), 1):
            make(file, what)
            self.made[kind] += 1
            self.report(kind, count, len(missing))

    def _check_room(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"{self.folder} has room for {free / 1e9:.3g} GB, {needed / 1e9:.3g} GB expected for what is learned "
                "from: make room or give another folder"
            )


def dataset_fingerprint(examples: Sequence[Example]) -> str:
    """Returns the SHA-256 of all that is learned from, as hex digits: texts and pictures, in their order.

    Raises:
        ValueError: a picture cannot be read.
    """
    whole = hashlib.sha256()
    for one in examples:
        image = one.image and one.image.digest
        what = [one.text, image, [reference.digest for reference in one.references], one.thought, one.answer]
        whole.update(json.dumps(what).encode() + b"\n")
    return whole.hexdigest()


def _check_readable(images: Iterable[Make]) -> None:
    """Opens all pictures, so that the last of them is not found to be broken after hours."""
    for image in images:
        image()


def _fingerprint(place: Path, part: str) -> list[list[object]]:
    """Returns what tells a part's files from those of another model: hashes; of large files size and time."""
    checkpoint = open_checkpoint(place)
    files = checkpoint.files()
    if place.is_dir():
        also = [place / "generation_decoder" / "config.json"] if part == "vlm" else []
        folders = {place / part, *([place / "processor"] if part == "vlm" else [])}
        files = [file for file in files if file.parent in folders or file in also]
    found = []
    for file in files:
        state = file.stat()
        large = state.st_size > SMALL
        found.append([file.name, state.st_size, state.st_mtime_ns if large else digest_of(file)])
    return found
