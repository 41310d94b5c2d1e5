"""What the transformer learns from: pictures as latents, each with the context that the frozen language model gives.

Captions, thoughts and edits, and the two prompts that guidance compares with: the same three branches as in drawing.
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

from . import edits, riddles, words, world
from .codec import LATENTS_MEAN, LATENTS_STD, encode_flat
from .lessons import Ending, Lesson, batch
from .understand import IMAGE, attention_bias, embedded, special_rows
from .world import Scene

DROP = 0.1
"""Share of samples that learn the unconditional prompt; of those with a picture, as many learn the partial prompt."""
EDITS = 0.65
"""Share of the scenes that are edited, in up to three samples each."""
ROW = 288
LOOSE = 0.1
"""Share of the pictures to edit that have their things off the grid."""
DRAWN = ReferenceSizes(smallest_area=64 * 64, largest_area=64 * 96, longest_side=128)
"""What the transformer draws: pictures of other sizes are scaled."""
SIZES_SMALL = {size: 1 for size in world.PICTURES if DRAWN.fit(*size) == (64, 64)}
SIZES_ALL = dict.fromkeys(SIZES_SMALL, 1) | {(96, 64): 2, (64, 96): 2}
USUAL = 0.75
"""Share of what is drawn without a picture that has one of the small sizes, whichever other sizes there are."""


@dataclass(frozen=True)
class Study:
    """One sample: what is to be drawn, from what, and what it shows."""

    latent: torch.Tensor  # [16, h, w]
    reference: torch.Tensor | None  # [16, h, w]
    context: torch.Tensor  # [tokens, width]
    layout: Layout
    scene: Scene


@dataclass(frozen=True)
class Plan:
    """A sample before anything is computed: its prompt, and its scenes."""

    ids: TokenizedPrompt
    scene: Scene
    before: Scene | None = None


class Studio:
    """Makes samples from seeds, with a frozen language model and VAE."""

    def __init__(self, model: MLLM, tokenizer: Tokenizer, coder: AutoencoderKLQwenImage):
        self.model, self.tokenizer, self.coder = model, tokenizer, coder
        self.device = model.special_token_embedding.weight.device
        self.rows = special_rows(tokenizer, model.language_model.config.vocab_size).to(self.device)
        self.grid = model.vision.grid
        model.language_model.config._attn_implementation = "eager"

    @torch.no_grad()
    def studies(self, rng: random.Random, count: int, sizes: dict[tuple[int, int], float]) -> list[Study]:
        """Returns at least `count` samples; `sizes` are the odds of each picture size, for edits and beside `USUAL`."""
        plans: list[list[Plan]] = []  # those of one list share their pictures
        made = 0
        while made < count:
            editing = rng.random() < EDITS
            odds = sizes if editing or rng.random() > USUAL else SIZES_SMALL
            size = rng.choices(tuple(odds), odds.values())[0]
            # Edits come in groups of up to three.
            group = self._edits(rng, size) if editing else [self._caption(rng, size)]
            plans.append(group)
            made += len(group)
        flat = [plan for group in plans for plan in group]
        contexts = self.contexts(plans, rng)
        latents = self.latents([plan.scene for plan in flat])
        places = [i for i, plan in enumerate(flat) if plan.before]
        references = dict(zip(places, self.latents([flat[i].before for i in places]), strict=True))
        return [
            Study(latents[i], references.get(i), contexts[i], plan.ids.layout, plan.scene)
            for i, plan in enumerate(flat)
        ]

    def _caption(self, rng: random.Random, size: tuple[int, int]) -> Plan:
        """Returns a sample of drawing."""
        if rng.random() < 0.2:
            riddle = riddles.random_riddle(rng, size)
            return Plan(self._prompt(rng, riddle.text, riddle.thought), riddle.scene)
        make = rng.choices((world.random_scene, world.related_scene, world.counted_scene), (2, 7, 1))[0]
        scene = world.starry(rng, lambda: make(rng, None, size))
        thought = words.plain_scene(scene).capitalize() + "." if rng.random() < 0.15 else ""
        return Plan(self._prompt(rng, words.caption(rng, scene), thought), scene)

    def _edits(self, rng: random.Random, size: tuple[int, int]) -> list[Plan]:
        """Some samples of editing the same picture."""
        scene = world.starry(rng, lambda: world.any_scene(rng, size, LOOSE))
        plans = []
        for edit in edits.edits_of(rng, scene)[:3]:
            thought = edits.thought(edit) if rng.random() < 0.2 else ""
            ids = self._prompt(rng, edit.instruction, thought, pictures=1)
            plans.append(Plan(ids, edit.after, edit.before if ids.images else None))
        return plans

    def _prompt(self, rng: random.Random, text: str, thought: str = "", pictures: int = 0) -> TokenizedPrompt:
        """Returns the conditional prompt, or at the chance of `DROP` one of the others."""
        # What is handed on of a thought lacks its last token.
        ids = self.tokenizer.encode([thought])[0][:-1] if thought else None
        branches = prompt.branch_prompts(self.tokenizer, text, images=pictures, grid=self.grid, thought=ids)
        chance = rng.random()
        if chance < DROP:
            return branches.unconditional
        return branches.partial if pictures and chance < 2 * DROP else branches.conditional

    def contexts(self, groups: Sequence[Sequence[Plan]], rng: random.Random) -> list[torch.Tensor]:
        """Returns the context [tokens, width] of every plan, group after group."""
        lessons = [self._lesson(row) for row in self._rows(groups)]
        found: dict[int, torch.Tensor] = {}
        for first in range(0, len(lessons), 16):
            some = lessons[first : first + 16]
            data = batch([lesson for lesson, _ in some], IMAGE, rng, ROW, clean=True)
            hidden = self._hidden(data.to(self.device)).cpu()
            for row, (lesson, plans) in enumerate(some):
                start = len(lesson.shared)
                for plan, ending in zip(plans, lesson.endings, strict=True):
                    shared = hidden[row, plan.ids.user_start : len(lesson.shared)]
                    found[id(plan)] = torch.cat([shared, hidden[row, start : start + len(ending.rest)]])
                    start += len(ending.rest)
        return [found[id(plan)] for group in groups for plan in group]

    def _rows(self, groups: Sequence[Sequence[Plan]]) -> list[list[Plan]]:
        """Cuts the plans into rows that share their beginning and fit into one row."""
        rows: list[list[Plan]] = []
        open_rows: dict[tuple, list[Plan]] = {}
        for group in groups:
            for plan in group:
                # Equal beginnings: the same system turn, and the very same picture.
                key = (plan.ids.ids[: plan.ids.user_start], plan.before if plan.ids.images else None)
                row = open_rows.get(key)
                cut = _cut(plan.ids)
                if row is None or cut + sum(len(p.ids.ids) - cut for p in (*row, plan)) > ROW:
                    row = open_rows[key] = []
                    rows.append(row)
                row.append(plan)
        return rows

    def _lesson(self, plans: Sequence[Plan]) -> tuple[Lesson, Sequence[Plan]]:
        first = plans[0]
        cut = _cut(first.ids)
        scenes = (first.before,) if first.ids.images else ()
        endings = tuple(Ending(plan.ids.ids[cut:], (), "") for plan in plans)
        return Lesson(first.ids.ids[:cut], first.ids.images, scenes, endings), plans

    def _hidden(self, data) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            given = embedded(self.model, self.rows, data)
            states = self.model.language_model.model(
                inputs_embeds=given,
                attention_mask=attention_bias(data.mask),
                position_ids=data.positions,
                use_cache=False,
                output_hidden_states=True,
            ).hidden_states
        return torch.cat([states[-1], states[-2]], dim=-1).bfloat16()

    def latents(self, scenes: Sequence[Scene]) -> list[torch.Tensor]:
        """Returns the normalised latents [16, h, w] of the scenes' pictures at the sizes of `DRAWN`."""
        result: list[torch.Tensor | None] = [None] * len(scenes)
        by_size: dict[tuple[int, int], list[int]] = {}
        for i, scene in enumerate(scenes):
            by_size.setdefault(DRAWN.fit(scene.width, scene.height), []).append(i)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (LATENTS_MEAN, LATENTS_STD))
        for places in by_size.values():
            for first in range(0, len(places), 32):
                some = places[first : first + 32]
                pictures = torch.cat([reference_pixels(world.draw(scenes[i]), DRAWN) for i in some])
                with torch.autocast(self.device.type, torch.bfloat16):
                    coded = encode_flat(self.coder, pictures.to(self.device)).cpu()
                for i, latent in zip(some, (coded - mean) / std, strict=True):
                    result[i] = latent
        return result


def _cut(ids: TokenizedPrompt) -> int:
    return ids.images[-1].stop + 1 if ids.images else ids.user_start
