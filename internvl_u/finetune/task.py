"""What a run learns from and with: the examples, read and cached, and the networks."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import cast

import torch

from ..load import load_mllm, load_mmdit
from ..mllm import MLLM
from ..mmdit import MMDiT
from ..pipeline import ImageRequest, Pipeline
from ..prefix import PrefixCache
from ..prompt import TokenizedPrompt
from .buckets import batches
from .cache import SampleCache, dataset_fingerprint
from .estimate import Estimate
from .examples import read_examples
from .kept import Kept
from .live import LiveSample
from .objective import TokenObjective
from .settings import TrainSettings
from .sheet import SAMPLES
from .stored import Branch, Sample, Samples, TextSample, TextSamples
from .train_estimate import estimate_run

PROGRESS = 100
"""Files of the cache between two lines of progress."""
KEPT_SAMPLES = 256 << 20
"""Bytes of samples that are kept in memory, so that they are read from disk once."""


class Task:
    """The examples of a run, read and checked when it is made; `load` fills the cache and loads the networks."""

    def __init__(self, settings: TrainSettings, device: torch.device, report: Callable[[str], object]):
        """Reads the examples.

        Raises:
            ValueError: there are none, or one cannot be learned from.
        """
        self.settings, self.device, self.report = settings, device, report
        self.dtype = getattr(torch, settings.dtype)
        sets = [read_examples(place, settings.trigger) for place in settings.data]
        repeats = settings.repeats or (1,) * len(sets)
        repeated = [(one, times) for some, times in zip(sets, repeats, strict=True) for one in some]
        self.examples = [one for one, _ in repeated]
        self.count = len(self.examples)
        drawn = [(one, times) for one, times in repeated if one.image is not None]
        told = [(one, times) for one, times in repeated if one.answer is not None or (self._language and one.thought)]
        if told and not self._language:
            raise ValueError(
                f"{told[0][0].name}: a question with an answer found, which the transformer does not learn from: add "
                "--train language, or leave it out"
            )
        self.held_back = _held_back(len(drawn), settings.validation, settings.seed)
        self._drawn, self._drawn_times = [one for one, _ in drawn], [times for _, times in drawn]
        self._told, self._told_times = [one for one, _ in told], [times for _, times in told]
        self.transformer: MMDiT | None = None
        self.mllm: MLLM | None = None
        self.pipeline = Pipeline(settings.model, dtype=self.dtype, device=device)
        self.cache = SampleCache(settings.folder / "cache", self.pipeline, settings.resolution, self._progress)
        self.fingerprint = dataset_fingerprint(self.examples)
        self.base = f"{self.pipeline.files.transformer.name} ({self.pipeline.root.name})"
        self._samples = Kept(lambda index: cast(Sample, self.samples[index]), _tensors, KEPT_SAMPLES)
        self._seen = PrefixCache()

    @property
    def _language(self) -> bool:
        return "language" in self.settings.parts

    def prepare(self) -> None:
        """Computes what is not cached yet."""
        settings = self.settings
        if sizes := self.cache.buckets.report(self._drawn):
            self.report(sizes)
        self.samples = self.cache.samples(self._drawn) if self._drawn else Samples((), ())
        self.texts = self.cache.text_samples(self._told) if self._told else TextSamples((), (), ())
        self.report(self.cache.summary())
        times = {index: count for index, count in enumerate(self._drawn_times) if index not in self.held_back}
        self._pictures = _Some(times, self.samples.shapes, settings.batch, settings.seed)
        told = dict(enumerate(self._told_times))
        self._texts = _Some(told, [0] * len(self.texts), settings.batch, settings.seed + 1)
        self.pipeline.forget()  # what made the cache

    def load(self) -> None:
        """Loads the networks that the run needs."""
        if self._drawn:
            self.transformer = load_mmdit(self.pipeline.files.transformer, dtype=self.dtype)
        if self._language:
            self.mllm = load_mllm(self.pipeline.files.language, dtype=self.dtype)

    def estimate(self) -> Estimate:
        """Returns what a step takes: memory with the largest of the examples, time with the usual ones.

        Raises:
            ValueError: an example cannot be learned from.
        """
        return estimate_run(self.settings, self.cache, self.examples, self.device)

    def _progress(self, kind: str, done: int, total: int) -> None:
        if done == total or done % PROGRESS == 0:
            self.report(f"{done} of {total} {kind} made")

    def pictures_at(self, number: int) -> list[int]:
        """Returns the samples of the batch of a number."""
        return self._pictures(number)

    def texts_at(self, number: int) -> list[int]:
        """Returns the texts of the batch of a number."""
        return self._texts(number)

    def drawn(self, indices: Sequence[int], tokens: TokenObjective | None) -> Sequence[Sample | LiveSample]:
        """Returns samples; where the language model learns, with contexts that it is learned through."""
        samples = [self._samples[index] for index in indices]
        if tokens is None or not self._language:
            return samples
        return [self._through(index, sample, tokens) for index, sample in zip(indices, samples, strict=True)]

    def text(self, index: int) -> tuple[torch.Tensor, tuple[int, ...]]:
        """Returns a text's embeddings [1, T, D], and the ids at its end that are learned."""
        assert self.mllm is not None
        sample = cast(TextSample, self.texts[index])
        embedded = self.pipeline.encoder.embed(
            self.mllm, sample.prompt, sample.features, device=self.device, dtype=self.dtype
        )
        return embedded, sample.prompt.ids[sample.target_start :]

    def _through(self, index: int, sample: Sample, tokens: TokenObjective) -> LiveSample:
        """Returns a sample with contexts as the language model makes them now."""
        model, encoder = self.mllm, self.pipeline.encoder
        assert model is not None
        request = self.cache.request(self.samples.examples[index])
        self.pipeline.use({"mllm": model})
        prompts = self.pipeline.branch_prompts(request)
        with torch.no_grad():  # the vision tower does not learn
            features = encoder.image_features(
                model, request.images, device=self.device, dtype=self.dtype, kept=self._seen
            )

        def context(prompt: TokenizedPrompt) -> Branch:
            seen = features if prompt.images else ()
            embedded = encoder.embed(model, prompt, seen, device=self.device, dtype=self.dtype)
            states = tokens.hidden(embedded, encoder.layers)[1]
            assert states is not None
            return states[0, prompt.user_start :], prompt.layout

        return LiveSample(sample.latent, sample.references, prompts, context)

    def sample_wishes(self) -> list[ImageRequest]:
        """Returns what the contact sheets show: the prompts of `--sample`, else a few examples, first those held back.

        Each has a seed of its own, which stays the same.
        """
        if self.settings.sample_prompts:
            size = self.cache.buckets.bucket(1, 1)
            return [ImageRequest(text, *size, seed=i) for i, text in enumerate(self.settings.sample_prompts)]
        order = [*self.held_back, *(i for i in range(len(self._drawn)) if i not in self.held_back)]
        chosen = list({self._drawn[i].text: self._drawn[i] for i in reversed(order)}.values())[::-1][:SAMPLES]
        wishes = []
        for seed, example in enumerate(chosen):
            width, height = self.cache.buckets.place(example).size
            wishes.append(dataclasses.replace(self.cache.request(example), width=width, height=height, seed=seed))
        return wishes


class _Some:
    """Which of some samples a batch has; of none it has none."""

    def __init__(self, times: Mapping[int, int], shapes: Sequence[Hashable], batch: int, seed: int):
        """`times` says how often each index comes in a round of all."""
        self._indices = [index for index, count in times.items() for _ in range(count)]
        self._batches = batches([shapes[i] for i in self._indices], batch, seed) if self._indices else None

    def __call__(self, number: int) -> list[int]:
        return [self._indices[place] for place in self._batches(number)] if self._batches else []


def _tensors(sample: Sample) -> list[torch.Tensor]:
    branches = (sample.conditional, sample.partial, sample.unconditional)
    return [sample.latent, *sample.references, *(one[0] for one in branches if one is not None)]


def _held_back(count: int, share: float, seed: int) -> list[int]:
    """Returns the examples that are not learned from, by a seed: at least one where a share is wanted."""
    wanted = min(count - 1, max(1, round(share * count))) if share and count > 1 else 0
    return sorted(random.Random(f"validation {seed}").sample(range(count), wanted))
