"""Stage 2: vision tower and language model learn to see, to answer and to think.

Beside the words that it writes, the vision tower learns for a while from an auxiliary head what lies in each of its
cells: without that, seeing begins only after tens of thousands of images.

    python -m training.mllm --tokenizer FOLDER --work FOLDER
"""

from __future__ import annotations

import argparse
import logging
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from internvl_u.mllm import MLLM
from internvl_u.tokenizer import Tokenizer

from .aux_heads import VisionAuxHead
from .data.scenes import any_scene, render
from .data.sft_data import Batch, ExampleBuilder, collate, vision_input
from .distributed import launch
from .mllm_model import IMAGE_SIZE, VISION, compile_layers, logits, new_model, special_rows
from .optim import EMA, make_optimizers
from .tokenizer import vocabulary_size
from .trainer import Losses, StepSchedule, Trainer, weighted_sum

NAME = "mllm"
COLUMNS = ("loss", "aux_loss", "exact", "one image", "two images", "riddle", "draw thought", "edit thought")
THOUGHTS = ("riddle", "draw thought", "edit thought")
EMA_DECAY = 0.9985
WARMUP_IMAGES = 48
"""Images per step while only seeing is learnt."""


@dataclass(frozen=True)
class LossWeights:
    """What each loss counts in the total."""

    aux_loss: float = 0.3
    """At first, beside the language loss; see `aux_weight`."""
    aux_fading: float = 1.5
    """The auxiliary loss is faded out linearly, and gone after the inverse of this share of the steps."""
    coverage_loss: float = 8.0
    cell_loss: float = 4.0
    cell_positive: float = 4.0
    """Of what is in a cell over what is not."""
    background_loss: float = 1.0
    offset_loss: float = 4.0
    size_loss: float = 0.5

    def aux_weight(self, progress: float) -> float:
        """Returns the weight at a `progress` (0 to 1) through the run: at the end the words alone decide."""
        return self.aux_loss * max(0.0, 1 - self.aux_fading * progress)


WEIGHTS = LossWeights()
logger = logging.getLogger("training.mllm")  # by its name as the main module, too


class MLLMStage:
    """The model with its auxiliary head, and the losses of each step."""

    def __init__(self, options: argparse.Namespace, rank: int = 0):
        self.options, self.rank, self.device = options, rank, torch.device(options.device)
        tokenizer, vocabulary = Tokenizer(options.tokenizer), vocabulary_size(options.tokenizer)
        self.model = new_model(tokenizer, vocabulary, options.seed)
        self.aux_head = VisionAuxHead(VISION.width, VISION.output_width, tokenizer)
        self.network = nn.ModuleDict({"model": self.model, "aux_head": self.aux_head}).to(self.device)
        self.rows = special_rows(tokenizer, vocabulary).to(self.device)
        self.examples = ExampleBuilder(tokenizer, VISION.grid)
        self.exact: dict[str, list[bool]] = defaultdict(list)

    def losses(self, step: int) -> Losses:
        """Returns the losses of a step: of seeing alone in the first ones, then of what is written as well."""
        options = self.options
        rng = random.Random(f"understand {options.seed} {step} {self.rank}")
        with torch.autocast(self.device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            if step < options.vision_warmup_steps:
                aux_loss = self.vision_loss(rng, WARMUP_IMAGES)
                return {"total": aux_loss, "loss": aux_loss, "aux_loss": aux_loss}
            loss = self.language_loss(rng)
            aux_loss = self.vision_loss(rng, options.aux_images) if options.aux_images else torch.zeros_like(loss)
            total = loss + WEIGHTS.aux_weight(step / options.steps) * aux_loss
        return {"total": total, "loss": loss, "aux_loss": aux_loss}

    def language_loss(self, rng: random.Random) -> torch.Tensor:
        """Returns the cross entropy of what is to be written in random examples, and notes which turns are right."""
        examples = [self.examples.example(rng) for _ in range(self.options.batch_size)]
        batch = collate(examples, IMAGE_SIZE, rng).to(self.device)
        predicted = logits(self.model, self.rows, batch)
        losses = functional.cross_entropy(predicted.float(), batch.targets, reduction="none")
        for kind, results in exact_matches(predicted, batch).items():
            self.exact[kind] += results
        return (losses * batch.weights).sum() / batch.weights.sum()

    def vision_loss(self, rng: random.Random, images: int) -> torch.Tensor:
        """Returns the auxiliary head's loss on so many random images."""
        scenes = tuple(any_scene(rng) for _ in range(images))
        pixels = torch.cat([vision_input(render(scene), IMAGE_SIZE, rng) for scene in scenes])
        patches = self.model.vision_model(pixels.to(self.device))
        embeddings = self.model.language_model.model.embed_tokens.weight
        features = self.model.mlp1(patches)
        return weighted_sum(self.aux_head.losses(patches, features, scenes, embeddings, WEIGHTS.cell_positive), WEIGHTS)

    def report(self, ema: EMA) -> dict[str, float]:
        """Returns the shares of turns that were predicted exactly since the last report, by what they ask."""

        def share(wanted) -> float:
            found = [result for kind, results in self.exact.items() if wanted(kind) for result in results]
            return sum(found) / max(len(found), 1)

        if self.rank == 0 and self.exact:
            shares = (f"{kind} {sum(found) / len(found):.2f}" for kind, found in sorted(self.exact.items()))
            logger.info("    %s", ", ".join(shares))
        without_image = (*THOUGHTS, "knowledge")
        row = {name: share(lambda kind, name=name: kind == name) for name in THOUGHTS} | {
            "exact": share(lambda kind: True),
            "one image": share(lambda kind: kind not in without_image and not kind.startswith("two")),
            "two images": share(lambda kind: kind.startswith("two")),
        }
        self.exact.clear()
        return row


def exact_matches(predicted: torch.Tensor, batch: Batch) -> dict[str, list[bool]]:
    """Returns by kind whether each turn would be written exactly right."""
    wrong = torch.zeros(len(batch.kinds), device=predicted.device).index_add(
        0, batch.turns, (predicted.argmax(-1) != batch.targets).float()
    )
    result = defaultdict(list)
    for kind, errors in zip(batch.kinds, wrong.tolist(), strict=True):
        result[kind].append(errors == 0)
    return result


def train(options: argparse.Namespace, rank: int = 0) -> MLLM:
    """Trains, going on from the work folder where it was left, and returns the averaged model."""
    torch.manual_seed(options.seed)
    stage = MLLMStage(options, rank)
    if options.init_from is not None:
        stage.network.load_state_dict(load_file(options.init_from), strict=False)
    trainer = Trainer(
        stage,
        make_optimizers(stage.network, options.lr),
        StepSchedule(options.lr, options.steps, options.log_every, options.stop_after),
        ema_decay=EMA_DECAY,
        work=options.work,
        name=NAME,
        columns=COLUMNS,
        rank=rank,
    )
    trainer.resume()
    if options.compile:
        compile_layers(stage.model)
    trainer.fit()
    return trainer.ema_network()["model"].cpu().eval()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--work", type=Path, required=True, help="folder for the log and the state to go on from")
    parser.add_argument("--init-from", type=Path, help="weights (model.*, aux_head.*) to begin with without a state")
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--stop-after", type=int, help="stop after this step; the next run goes on")
    parser.add_argument("--vision-warmup-steps", type=int, default=2500, help="first steps, of seeing alone")
    parser.add_argument("--aux-images", type=int, default=12, help="images per step for the auxiliary head afterwards")
    parser.add_argument("--batch-size", type=int, default=12, help="packed examples per step")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="of all workers together")
    parser.add_argument("--workers", type=int, default=2, help="processes that train together")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--log-every", type=int, default=100, help="steps between rows of the log, and states")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    launch(train, parse())
