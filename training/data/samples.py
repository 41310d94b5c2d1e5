"""Samples for the transformer: images as latents, each with the context that the frozen language model gives.

Captions, thoughts and edits, and the two prompts that guidance compares with: the same three branches as in inference.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLQwenImage
from torch.nn.attention import SDPBackend, sdpa_kernel

from internvl_u import prompt
from internvl_u.images import ReferenceSizes, reference_pixels
from internvl_u.mllm import MLLM
from internvl_u.prompt import TokenizedPrompt
from internvl_u.rope import Layout
from internvl_u.tokenizer import Tokenizer

from ..mllm_model import IMAGE_SIZE, attention_bias, embed_tokens, special_rows, use_plain_attention
from ..vae_model import LATENTS_MEAN, LATENTS_STD, encode_frame
from . import captions, edits, riddles
from .scenes import (
    IMAGE_SIZES,
    Scene,
    any_scene,
    counted_scene,
    oversample_stars,
    random_scene,
    related_scene,
    render,
)
from .sft_data import ROW_LENGTH, Batch, PackedExample, Turn, collate

PROMPT_DROPOUT = 0.1
"""Share of samples that learn the unconditional prompt; of those with an image, as many learn the partial prompt."""
EDIT_SHARE = 0.65
"""Share of the scenes that are edited, in up to three samples each."""
JITTER_CHANCE = 0.1
"""Share of the images to edit that have their things off the grid."""
ROWS, CHUNK = 16, 32
"""Rows of the language model and images of the VAE that are computed at once."""
OUTPUT_SIZES = ReferenceSizes(smallest_area=64 * 64, largest_area=64 * 96, longest_side=128)
"""What the transformer draws: images of other sizes are scaled."""
SMALL_SIZES = {size: 1 for size in IMAGE_SIZES if OUTPUT_SIZES.fit(*size) == (64, 64)}
ALL_SIZES = dict.fromkeys(SMALL_SIZES, 1) | {(96, 64): 2, (64, 96): 2}
SMALL_SHARE = 0.75
"""Share of what is drawn without a reference that has one of the small sizes, whichever other sizes there are."""


@dataclass(frozen=True)
class Sample:
    """One training sample: the latent to be drawn, from what, and the scene that it shows."""

    latent: torch.Tensor  # [16, h, w]
    reference: torch.Tensor | None  # [16, h, w]
    context: torch.Tensor  # [tokens, width]
    layout: Layout
    scene: Scene


@dataclass(frozen=True)
class SampleSpec:
    """What a sample is made from: its prompt, the scene to be drawn, and the scene of its reference."""

    prompt: TokenizedPrompt
    scene: Scene
    before: Scene | None = None


class SampleBuilder:
    """Builds samples from seeds, with a frozen language model and VAE."""

    def __init__(self, model: MLLM, tokenizer: Tokenizer, vae: AutoencoderKLQwenImage):
        self.model, self.tokenizer, self.vae = model, tokenizer, vae
        self.device = model.special_token_embedding.weight.device
        self.rows = special_rows(tokenizer, model.language_model.config.vocab_size).to(self.device)
        self.grid = model.vision.grid
        use_plain_attention(model)

    @torch.no_grad()
    def build(self, rng: random.Random, count: int, sizes: dict[tuple[int, int], float]) -> list[Sample]:
        """Returns at least `count` samples; `sizes` are the odds of image sizes, for edits and beside `SMALL_SHARE`."""
        groups = self._specs(rng, count, sizes)
        specs = [spec for group in groups for spec in group]
        contexts = self.contexts(groups, rng)
        latents = self.latents([spec.scene for spec in specs])
        referring = [i for i, spec in enumerate(specs) if spec.before]
        references = dict(zip(referring, self.latents([specs[i].before for i in referring]), strict=True))
        return [
            Sample(latents[i], references.get(i), contexts[i], spec.prompt.layout, spec.scene)
            for i, spec in enumerate(specs)
        ]

    def _specs(self, rng: random.Random, count: int, sizes: dict[tuple[int, int], float]) -> list[list[SampleSpec]]:
        """Returns at least `count` specs in groups that share their reference."""
        groups: list[list[SampleSpec]] = []
        while sum(map(len, groups)) < count:
            editing = rng.random() < EDIT_SHARE
            odds = sizes if editing or rng.random() > SMALL_SHARE else SMALL_SIZES
            size = rng.choices(tuple(odds), odds.values())[0]
            # Edits come in groups of up to three.
            groups.append(self._edit_specs(rng, size) if editing else [self._caption_spec(rng, size)])
        return groups

    def _caption_spec(self, rng: random.Random, size: tuple[int, int]) -> SampleSpec:
        """Returns a sample of text to image."""
        if rng.random() < 0.2:
            riddle = riddles.random_riddle(rng, size)
            return SampleSpec(self._prompt(rng, riddle.text, riddle.thought), riddle.scene)
        make = rng.choices((random_scene, related_scene, counted_scene), (2, 7, 1))[0]
        scene = oversample_stars(rng, lambda: make(rng, None, size))
        thought = captions.describe(scene).capitalize() + "." if rng.random() < 0.15 else ""
        return SampleSpec(self._prompt(rng, captions.caption(rng, scene), thought), scene)

    def _edit_specs(self, rng: random.Random, size: tuple[int, int]) -> list[SampleSpec]:
        """Returns some samples of editing the same image."""
        scene = oversample_stars(rng, lambda: any_scene(rng, size, JITTER_CHANCE))
        specs = []
        for edit in edits.edits_of(rng, scene)[:3]:
            thought = edits.thought(edit) if rng.random() < 0.2 else ""
            tokenized = self._prompt(rng, edit.instruction, thought, images=1)
            specs.append(SampleSpec(tokenized, edit.after, edit.before if tokenized.images else None))
        return specs

    def _prompt(self, rng: random.Random, text: str, thought: str = "", images: int = 0) -> TokenizedPrompt:
        """Returns the conditional prompt, or at the chance of `PROMPT_DROPOUT` one of the others."""
        # What is handed on of a thought lacks its last token.
        ids = self.tokenizer.encode([thought])[0][:-1] if thought else None
        branches = prompt.branch_prompts(self.tokenizer, text, images=images, grid=self.grid, thought=ids)
        chance = rng.random()
        if chance < PROMPT_DROPOUT:
            return branches.unconditional
        return branches.partial if images and chance < 2 * PROMPT_DROPOUT else branches.conditional

    def contexts(self, groups: Sequence[Sequence[SampleSpec]], rng: random.Random) -> list[torch.Tensor]:
        """Returns the context [tokens, width] of every spec, group after group."""
        examples = [self._pack(row) for row in self._rows(groups)]
        found: dict[int, torch.Tensor] = {}
        for first in range(0, len(examples), ROWS):
            part = examples[first : first + ROWS]
            batch = collate([example for example, _ in part], IMAGE_SIZE, rng, augment=False)
            hidden = self._hidden(batch.to(self.device)).cpu()
            for row, (example, specs) in enumerate(part):
                start = len(example.prefix)
                for spec, turn in zip(specs, example.turns, strict=True):
                    shared = hidden[row, spec.prompt.user_start : len(example.prefix)]
                    found[id(spec)] = torch.cat([shared, hidden[row, start : start + len(turn.prompt)]])
                    start += len(turn.prompt)
        return [found[id(spec)] for group in groups for spec in group]

    def _rows(self, groups: Sequence[Sequence[SampleSpec]]) -> list[list[SampleSpec]]:
        """Returns the specs in rows: those of a row share their prefix, and fit into it."""
        rows: list[list[SampleSpec]] = []
        open_rows: dict[tuple, list[SampleSpec]] = {}
        for group in groups:
            for spec in group:
                # Equal prefixes: the same system turn, and the very same image.
                key = (spec.prompt.ids[: spec.prompt.user_start], spec.before if spec.prompt.images else None)
                row = open_rows.get(key)
                cut = _prefix_length(spec.prompt)
                if row is None or cut + sum(len(other.prompt.ids) - cut for other in (*row, spec)) > ROW_LENGTH:
                    row = open_rows[key] = []
                    rows.append(row)
                row.append(spec)
        return rows

    def _pack(self, specs: Sequence[SampleSpec]) -> tuple[PackedExample, Sequence[SampleSpec]]:
        first = specs[0]
        cut = _prefix_length(first.prompt)
        scenes = (first.before,) if first.prompt.images else ()
        turns = tuple(Turn(spec.prompt.ids[cut:], (), "") for spec in specs)
        return PackedExample(first.prompt.ids[:cut], first.prompt.images, scenes, turns), specs

    def _hidden(self, batch: Batch) -> torch.Tensor:
        """Returns the hidden states [B, T, 2 * width] that the transformer is given, bf16."""
        with torch.autocast(self.device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            embeddings = embed_tokens(self.model, self.rows, batch)
            _, states = self.model.language_model(
                embeddings, layers=(-1, -2), mask=attention_bias(batch.mask), positions=batch.positions
            )
        return states.bfloat16()

    def latents(self, scenes: Sequence[Scene]) -> list[torch.Tensor]:
        """Returns the normalised latents [16, h, w] of the scenes' images at the sizes of `OUTPUT_SIZES`."""
        result: list[torch.Tensor | None] = [None] * len(scenes)
        by_size: dict[tuple[int, int], list[int]] = {}
        for i, scene in enumerate(scenes):
            by_size.setdefault(OUTPUT_SIZES.fit(scene.width, scene.height), []).append(i)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (LATENTS_MEAN, LATENTS_STD))
        for indices in by_size.values():
            for first in range(0, len(indices), CHUNK):
                part = indices[first : first + CHUNK]
                images = torch.cat([reference_pixels(render(scenes[i]), OUTPUT_SIZES) for i in part])
                with torch.autocast(self.device.type, torch.bfloat16):
                    encoded = encode_frame(self.vae, images.to(self.device)).cpu()
                for i, latent in zip(part, (encoded - mean) / std, strict=True):
                    result[i] = latent
        return result


def _prefix_length(tokenized: TokenizedPrompt) -> int:
    return tokenized.images[-1].stop + 1 if tokenized.images else tokenized.user_start
