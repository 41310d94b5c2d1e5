"""Stage 3: the transformer learns to draw and to edit, by flow matching on the frozen VAE's latents.

Times are mostly logit-normal, and shifted by 3, as the model is sampled. Beside the velocity, an auxiliary head reads
from inside the transformer where each token lies and what will lie under it: composing begins sooner.

    python -m training.mmdit --tokenizer FOLDER --vae FOLDER --work FOLDER
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage
from torch import nn
from torch.nn import functional

from internvl_u.mllm import MLLM
from internvl_u.mmdit import MMDiT
from internvl_u.tokenizer import Tokenizer

from . import mllm, mllm_model
from .aux_heads import LayoutAuxHead
from .checkpointing import load_ema
from .data.replay_buffer import ReplayBuffer, bucket_of
from .data.samples import ALL_SIZES, SMALL_SIZES, Sample, SampleBuilder
from .distributed import launch
from .mmdit_model import (
    CONFIG,
    RotaryCache,
    RunBlock,
    add_noise,
    collate,
    compile_blocks,
    new_model,
    predict_velocity,
    run_padded_block,
)
from .optim import EMA, make_optimizers
from .tokenizer import vocabulary_size
from .trainer import Losses, StepSchedule, Trainer, weighted_sum

NAME = "mmdit"
COLUMNS = ("loss", "aux_loss")
EMA_DECAY = 0.999


@dataclass(frozen=True)
class LossWeights:
    """What each loss counts in the total."""

    aux_loss: float = 0.1
    """Beside the velocity's; the following are its parts."""
    coverage_loss: float = 4.0
    background_loss: float = 1.0
    offset_loss: float = 1.0
    position_loss: float = 1.0


WEIGHTS = LossWeights()


class SampleSource:
    """A replay buffer that is refreshed now and then with new samples of the frozen language model and VAE."""

    def __init__(self, options: argparse.Namespace, rank: int):
        self.options, self.rank = options, rank
        self.mllm_state = options.work / f"{mllm.NAME}.safetensors"
        self.builder = make_sample_builder(options.tokenizer, options.vae, torch.device(options.device))
        self.loaded: float | None = None
        self.reload_ema()
        self.buffer = ReplayBuffer(options.buffer_size)

    def draw(self, rng: random.Random, step: int) -> list[Sample]:
        """Returns the samples of a step."""
        options = self.options
        sizes = SMALL_SIZES if step < options.small_share * options.steps else ALL_SIZES
        if not self.buffer.samples:
            self.buffer.add(self.builder.build(rng, options.buffer_size // 4, sizes))
        if step % options.refresh_every == 0:
            if options.reload_ema:
                self.reload_ema()
            self.buffer.add(self.builder.build(rng, options.new_samples, sizes))
        # Equal in all workers, so that all draw from the same bucket.
        shared_rng = random.Random(f"shelf {options.seed} {step}")
        return self.buffer.draw(rng, options.tokens_per_step, shared_rng)

    def reload_ema(self) -> None:
        """Gives the language model the averaged weights of its stage's state, where these are not what it has."""
        changed = self.mllm_state.stat().st_mtime if self.mllm_state.exists() else None
        if changed is None or changed != self.loaded:
            self.builder.model.load_state_dict(load_ema(self.mllm_state))
            self.loaded = changed


class MMDiTStage:
    """The transformer with its auxiliary head, and the losses of each step."""

    def __init__(self, options: argparse.Namespace, rank: int = 0):
        self.options, self.rank, self.device = options, rank, torch.device(options.device)
        self.source = SampleSource(options, rank)
        self.model = new_model(options.seed)
        self.aux_head = LayoutAuxHead(CONFIG.width)
        self.network = nn.ModuleDict({"model": self.model, "aux_head": self.aux_head}).to(self.device)
        self.rotary_cache = RotaryCache(self.model)
        self.compiled_block = compile_blocks(self.model) if options.compile else run_padded_block

    def losses(self, step: int) -> Losses:
        """Returns the losses of a step: the velocity's mean squared error, and the auxiliary head's."""
        rng = random.Random(f"draw {self.options.seed} {step} {self.rank}")
        samples = self.source.draw(rng, step)
        batch = collate(samples, self.rotary_cache)
        generator = torch.Generator().manual_seed(rng.getrandbits(40))
        noisy, timestep, target = (tensor.to(self.device) for tensor in add_noise(batch.latents, generator))
        batch = batch.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            velocity, inner = predict_velocity(self.model, noisy, timestep, batch, self.run_block(samples))
        loss = functional.mse_loss(velocity.float(), target)
        rows, columns = (side // CONFIG.patch_size for side in batch.latents.shape[-2:])
        scenes = [sample.scene for sample in samples]
        aux_loss = weighted_sum(self.aux_head.losses(inner, scenes, (rows, columns)), WEIGHTS)
        return {"total": loss + WEIGHTS.aux_loss * aux_loss, "loss": loss, "aux_loss": aux_loss}

    def run_block(self, samples: list[Sample]) -> RunBlock:
        """Returns what runs a block: compiled, but for the longest contexts and for buckets that are not full yet.

        Those would be compiled for their size of the day.
        """
        bucket = bucket_of(samples[0])
        is_full = len(samples) == bucket.batch_size(self.options.tokens_per_step)
        return self.compiled_block if is_full and not bucket.is_longest else run_padded_block

    def report(self, ema: EMA) -> dict[str, float]:
        """Returns nothing beside the losses."""
        return {}


def make_sample_builder(tokenizer: Path, vae: Path, device: torch.device) -> SampleBuilder:
    """Returns the sample builder of a tokenizer and a trained VAE; its language model has no trained weights yet."""
    encoder = Tokenizer(tokenizer)
    model: MLLM = mllm_model.new_model(encoder, vocabulary_size(tokenizer))
    autoencoder = AutoencoderKLQwenImage.from_pretrained(vae, torch_dtype=torch.float32)
    return SampleBuilder(model.eval().to(device), encoder, autoencoder.eval().to(device))


def train(options: argparse.Namespace, rank: int = 0) -> MMDiT:
    """Trains, going on from the work folder where it was left, and returns the averaged model."""
    torch.manual_seed(options.seed)
    stage = MMDiTStage(options, rank)
    trainer = Trainer(
        stage,
        make_optimizers(stage.network, options.lr),
        StepSchedule(options.lr, options.steps, options.log_every),
        ema_decay=EMA_DECAY,
        work=options.work,
        name=NAME,
        columns=COLUMNS,
        rank=rank,
    )
    trainer.resume()
    trainer.fit()
    return trainer.ema_network()["model"].cpu().eval()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--vae", type=Path, required=True, help="folder of the trained VAE")
    parser.add_argument("--work", type=Path, required=True, help="folder for the log and the state to go on from")
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--tokens-per-step", type=int, default=4608, help="about how many")
    parser.add_argument("--lr", type=float, default=4e-3, help="highest learning rate")
    parser.add_argument("--small-share", type=float, default=0.7, help="share of the steps with squares alone")
    parser.add_argument("--buffer-size", type=int, default=16384, help="samples in the replay buffer")
    parser.add_argument("--refresh-every", type=int, default=10, help="steps between new samples")
    parser.add_argument("--new-samples", type=int, default=60, help="how many each time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="of all workers together")
    parser.add_argument("--workers", type=int, default=2, help="processes that train together")
    parser.add_argument(
        "--reload-ema", action="store_true", help="the language model is still learning: keep up with it"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--log-every", type=int, default=200, help="steps between rows of the log, and states")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    launch(train, parse())
