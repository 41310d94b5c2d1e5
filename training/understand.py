"""Stage 2: vision tower and language model learn to look, answer and think.

Beside the words that it writes, the vision tower is told for a while what lies in each of its cells (two linear heads
that are not kept): without that, seeing begins only after tens of thousands of pictures.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from internvl_u.config import MLLMConfig, VisionConfig
from internvl_u.mllm import MLLM
from internvl_u.tokenizer import ROW_TOKENS, Tokenizer

from . import world
from .layouts import COLOURS, SHAPES, THINGS, grounds, shares
from .lessons import Batch, Teacher, batch, pixels_of
from .log import Log, load_state, save_state
from .optimiser import Averaged, optimisers, restore, set_rates, state_of
from .together import average_gradients, start
from .tokenizer import size
from .world import Scene

IMAGE, PATCH, GRID = 112, 14, 4
VISION = VisionConfig(
    width=128,
    layers=3,
    heads=4,
    mlp_width=512,
    patch_size=PATCH,
    image_size=IMAGE,
    eps=1e-6,
    downsample=0.5,
    output_width=192,
)
MEANINGS = (*SHAPES, *COLOURS, *world.SIZES, "left", "right", "top", "bottom", "centre")
"""What a cell can be told to hold; each is a word."""
COLUMNS = ("step", "seconds", "loss", "cells", "right", "one", "two", "riddle", "draw thought", "edit thought")


def language_config(tokenizer: Tokenizer, vocabulary: int) -> dict:
    """Returns the configuration of the nano Qwen3."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": vocabulary - 1,
        "eos_token_id": tokenizer.special["<|im_end|>"],
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 192,
        "initializer_range": 0.02,
        "intermediate_size": 512,
        "max_position_embeddings": 4096,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 6,
        "num_hidden_layers": 4,
        "num_key_value_heads": 3,
        "pad_token_id": tokenizer.special["<|im_end|>"] + 1,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 4096,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocabulary,
    }


def new_model(tokenizer: Tokenizer, vocabulary: int, seed: int = 0) -> MLLM:
    """Returns the nano model with random weights."""
    model = MLLM(MLLMConfig(VISION, language_config(tokenizer, vocabulary)), device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        with torch.no_grad():
            if name.endswith(("ls1", "ls2")):
                weight.fill_(1.0)
            elif "norm" in name or name == "mlp1.0.weight":
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
            elif name.endswith("bias"):
                weight.zero_()
            elif weight.ndim == 2 and "embed" not in name:
                weight.normal_(0, weight.shape[1] ** -0.5 * 0.7, generator=generator)
            else:
                weight.normal_(0, 0.02, generator=generator)
    with torch.no_grad():
        model.mlp1[0].bias.zero_()
    return model


class Cells(nn.Module):
    """What lies under each patch and in each cell of the vision tower, and the background; only for training.

    What lies in a cell is told by likeness to the embeddings of the words for it. So a cell becomes something like the
    words "small red circle top left", which the language model can already look up.
    """

    def __init__(self, patches: int, width: int, tokenizer: Tokenizer):
        super().__init__()
        self.under = nn.Linear(patches, THINGS)
        self.place = nn.Linear(width, 2)
        self.size = nn.Linear(width, len(world.SIZES))
        names = (*MEANINGS, *world.BACKGROUNDS)
        self.scale = nn.Parameter(torch.full((len(names),), 8.0))
        self.bias = nn.Parameter(torch.full((len(names),), -2.0))
        self.words = [tokenizer.encode([f" {name}"])[0][-1] for name in names]

    def loss(
        self, patches: torch.Tensor, features: torch.Tensor, scenes: Sequence[Scene], table: torch.Tensor
    ) -> torch.Tensor:
        """Returns the loss of the patches [N, patches, P] and features [N, cells, W] of the scenes' pictures.

        `table` are the embeddings [vocabulary, W].
        """
        covered = shares(scenes, 2 * GRID, 2 * GRID).to(patches.device)
        under = functional.binary_cross_entropy_with_logits(self.under(patches).float(), covered)
        meanings = functional.normalize(table.detach()[self.words].float(), dim=-1)
        likeness = functional.normalize(features.float(), dim=-1) @ meanings.T * self.scale + self.bias
        things, ground = likeness.split((len(MEANINGS), len(world.BACKGROUNDS)), dim=-1)
        # What is there counts more than what is not: most cells are empty.
        weight = torch.full((len(MEANINGS),), 4.0, device=things.device)
        told = functional.binary_cross_entropy_with_logits(things, _cells(scenes).to(things), pos_weight=weight)
        here, places, sizes = (tensor.to(features.device) for tensor in _centres(scenes))
        found = features[here[:, 0], here[:, 1]]
        off = (self.place(found).float() - places).abs().mean()
        grown = functional.cross_entropy(self.size(found).float(), sizes)
        below = functional.cross_entropy(ground.mean(1), grounds(scenes).to(ground.device))
        return 8 * under + 4 * told + below + 4 * off + 0.5 * grown


def _centres(scenes: Sequence[Scene]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The picture and cell of each thing [T, 2], its place [T, 2] in 0..1 of the picture, its size's number [T]."""
    here, places, sizes = [], [], []
    for i, scene in enumerate(scenes):
        for thing in scene.things:
            here.append((i, int(thing.y * GRID) * GRID + int(thing.x * GRID)))
            places.append((thing.x, thing.y))
            sizes.append(tuple(world.SIZES).index(thing.size))
    return torch.tensor(here), torch.tensor(places), torch.tensor(sizes)


def _cells(scenes: Sequence[Scene]) -> torch.Tensor:
    wanted = torch.zeros(len(scenes), GRID * GRID, len(MEANINGS))
    for i, scene in enumerate(scenes):
        for thing in scene.things:
            cell = int(thing.y * GRID) * GRID + int(thing.x * GRID)
            column, row = ((value > 1 / 3) + (value > 2 / 3) for value in (thing.x, thing.y))
            where = (
                (("left", "", "right")[column], ("top", "", "bottom")[row]) if (column, row) != (1, 1) else ("centre",)
            )
            for meaning in (thing.shape, thing.colour, thing.size, *where):
                if meaning:
                    wanted[i, cell, MEANINGS.index(meaning)] = 1
    return wanted


def embedded(model: MLLM, rows: torch.Tensor, data: Batch) -> torch.Tensor:
    """Returns the batch's embeddings [B, T, width], its pictures' features in place.

    `rows` [vocabulary] is the special row of each token, -1 where it has none.
    """
    table = model.language_model.get_input_embeddings()(data.ids)
    row = rows[data.ids]
    result = torch.where((row >= 0)[..., None], model.special_token_embedding(row.clamp(min=0)), table)
    if not len(data.pictures):
        return result
    features = model.image_features(data.pixels)
    cells = torch.arange(features.shape[1], device=features.device)
    where = data.pictures[:, 0, None] * data.ids.shape[1] + data.pictures[:, 1, None] + cells
    flat = result.flatten(0, 1).index_copy(0, where.flatten(), features.flatten(0, 1).to(result.dtype))
    return flat.view_as(result)


def special_rows(tokenizer: Tokenizer, vocabulary: int) -> torch.Tensor:
    """Returns the special row of each token [vocabulary], -1 where it has none."""
    rows = torch.full((vocabulary,), -1)
    for row, name in enumerate(ROW_TOKENS):
        rows[tokenizer.special[name]] = row
    return rows


def attention_bias(mask: torch.Tensor) -> torch.Tensor:
    """Returns what is added to the attention's scores for a mask of where to look."""
    kind = mask.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def logits(model: MLLM, rows: torch.Tensor, data: Batch) -> torch.Tensor:
    """Returns the logits [M, vocabulary] of the tokens to be written."""
    given = embedded(model, rows, data)
    hidden = model.language_model.model(
        inputs_embeds=given, attention_mask=attention_bias(data.mask), position_ids=data.positions, use_cache=False
    ).last_hidden_state
    return model.language_model.lm_head(hidden.flatten(0, 1)[data.sources])


def right(predicted: torch.Tensor, data: Batch) -> dict[str, list[bool]]:
    """Returns by kind whether each ending would be written exactly right."""
    wrong = torch.zeros(len(data.kinds), device=predicted.device).index_add(
        0, data.owners, (predicted.argmax(-1) != data.targets).float()
    )
    result = defaultdict(list)
    for kind, errors in zip(data.kinds, wrong.tolist(), strict=True):
        result[kind].append(errors == 0)
    return result


def look(model: MLLM, cells: Cells, rng: random.Random, pictures: int = 48) -> torch.Tensor:
    """Returns the loss of seeing alone, on so many pictures."""
    scenes = tuple(world.any_scene(rng) for _ in range(pictures))
    pixels = torch.cat([pixels_of(world.draw(scene), IMAGE, rng) for scene in scenes])
    patches = model.vision_model(pixels.to(model.special_token_embedding.weight.device))
    table = model.language_model.get_input_embeddings().weight
    return cells.loss(patches, model.mlp1(patches), scenes, table)


def compile_layers(model: MLLM) -> None:
    """Has the layers compiled: most of their time is spent on what is fused then."""
    model.language_model.config._attn_implementation = "eager"  # torch's own attention is slow backwards on the CPU
    for layer in model.language_model.model.layers:
        layer.compile(dynamic=False)
    for layer in model.vision_model.encoder.layers:
        layer.compile(dynamic=True)


def train(options: argparse.Namespace, rank: int = 0) -> MLLM:
    """Trains, going on from the work folder where it was left, and returns the averaged model."""
    torch.manual_seed(options.seed)
    tokenizer = Tokenizer(options.tokenizer)
    vocabulary = size(options.tokenizer)
    model, cells = new_model(tokenizer, vocabulary, options.seed), Cells(VISION.width, VISION.output_width, tokenizer)
    rows, teacher = special_rows(tokenizer, vocabulary), Teacher(tokenizer, VISION.grid)
    device = torch.device(options.device)
    both, rows = nn.ModuleDict({"model": model, "cells": cells}).to(device), rows.to(device)
    steppers, average = optimisers(both, options.rate), Averaged(both, 0.9985)
    file, first, seconds = options.work / "understand.safetensors", 0, 0.0
    log = Log(options.work / "understand.csv", COLUMNS)
    if (state := load_state(file)) is not None:
        tensors, facts = state
        restore(both, average, steppers, tensors)
        first, seconds = facts["step"], facts["seconds"]
        if rank == 0:
            log.cut(first)
    elif options.begin is not None:
        both.load_state_dict(load_file(options.begin), strict=False)
        average = Averaged(both, 0.9985)
    if options.compile:
        compile_layers(model)
    begun, seen, losses = time.monotonic() - seconds, defaultdict(list), []
    for step in range(first, options.until or options.steps):
        rng = random.Random(f"understand {options.seed} {step} {rank}")
        set_rates(steppers, options.rate, step, options.steps)
        with torch.autocast(device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            if step < options.look:
                told = look(model, cells, rng)
                total = loss = told
            else:
                data = batch([teacher.lesson(rng) for _ in range(options.batch)], IMAGE, rng).to(device)
                predicted = logits(model, rows, data)
                each = functional.cross_entropy(predicted.float(), data.targets, reduction="none")
                loss = (each * data.weights).sum() / data.weights.sum()
                told = look(model, cells, rng, options.glance) if options.glance else torch.zeros_like(loss)
                # The heads only help seeing to begin; at the end the words alone decide.
                total = loss + 0.3 * max(0.0, 1 - 1.5 * step / options.steps) * told
                for kind, results in right(predicted, data).items():
                    seen[kind] += results
        for stepper in steppers:
            stepper.zero_grad(set_to_none=True)
        total.backward()
        average_gradients(both)
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
        average.update(step)
        losses.append((loss.item(), told.item()))
        if rank == 0 and ((step + 1) % options.log_every == 0 or step + 1 == options.steps):
            _report(log, step + 1, time.monotonic() - begun, losses, seen)
            seen, losses = defaultdict(list), []
            save_state(file, state_of(both, average, steppers), {"step": step + 1, "seconds": time.monotonic() - begun})
    both.load_state_dict(average.weights)
    return model.cpu().eval()


def _report(log: Log, step: int, seconds: float, losses: list, seen: dict[str, list[bool]]) -> None:
    def share(wanted) -> float:
        found = [result for kind, results in seen.items() if wanted(kind) for result in results]
        return sum(found) / max(len(found), 1)

    apart = ("riddle", "draw thought", "edit thought", "knowledge")
    row = {name: share(lambda kind, name=name: kind == name) for name in apart[:3]}
    row |= {
        "right": share(lambda kind: True),
        "one": share(lambda kind: kind not in apart and not kind.startswith("two")),
        "two": share(lambda kind: kind.startswith("two")),
        "loss": sum(loss for loss, _ in losses) / len(losses),
        "cells": sum(told for _, told in losses) / len(losses),
    }
    log.append(step=step, seconds=seconds, **row)
    print(f"{step} steps, {seconds:.0f} s, " + ", ".join(f"{name} {value:.3f}" for name, value in row.items()))
    print("   ", ", ".join(f"{kind} {sum(r) / len(r):.2f}" for kind, r in sorted(seen.items())), flush=True)


def parse() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--work", type=Path, required=True, help="folder for the log and the state to go on from")
    parser.add_argument("--begin", type=Path, help="weights (model.*, cells.*) to begin with where there is no state")
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--until", type=int, help="stop after this step; the next run goes on")
    parser.add_argument("--look", type=int, default=2500, help="first steps, of seeing alone")
    parser.add_argument("--glance", type=int, default=12, help="pictures looked at beside the lessons of a step")
    parser.add_argument("--batch", type=int, default=12, help="lessons a step")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="of all workers together")
    parser.add_argument("--workers", type=int, default=2, help="processes that train together")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--log-every", type=int, default=100)
    return parser.parse_args()


if __name__ == "__main__":
    start(train, parse())
