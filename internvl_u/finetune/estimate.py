"""Memory and time of a training step, before it starts, counted on the meta device, which computes nothing.

Forward and backward pass run on tensors without values, and what is alive is added up. Attention is counted as fused
kernels have it (FlashAttention, arXiv 2307.08691): saved are queries, keys, values, output and one number a row.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from ..attention import Attention, scaled_dot_product
from ..config import LanguageConfig, MMDiTConfig
from ..mmdit import TIME_WIDTH, MMDiT, RunBlock
from ..qwen3 import Layer, Qwen3
from ..rope import Grid, Span

OPTIMIZER_BYTES = {"adamw": 2.0, "adamw8bit": 0.5 + 2 / 256, "sgd": 0.0, "momentum": 1.0}
"""What an optimizer keeps of each trained value, as a multiple of four bytes."""
BACKWARD_OF_ATTENTION = 2.5
"""Products of the backward pass for one of the forward pass: five for two, as the scores are computed again."""
AddAdapters = Callable[[nn.Module], object]
"""Puts adapters into a network on the meta device; what requires gradients after it is trained."""
Inputs = TypeVar("Inputs")


@dataclass(frozen=True)
class Estimate:
    """What a training step takes. `memory` in bytes by kind; `seconds_a_step` is None where nothing was measured.

    "activations" are saved for the backward pass, "working" is alive beside them at the worst moment.
    """

    memory: dict[str, int] = field(default_factory=dict)
    operations: float = 0.0
    seconds_a_step: float | None = None

    @property
    def total(self) -> int:
        """All memory in bytes, without what libraries and a GPU's driver take for themselves."""
        return sum(self.memory.values())

    def describe(self, steps: int = 0) -> str:
        """Returns a sentence on memory and time, also of all `steps`."""
        parts = ", ".join(f"{name} {_gigabytes(size)}" for name, size in self.memory.items() if size)
        text = f"about {_gigabytes(self.total)} of memory ({parts}), {self.operations / 1e12:.3g} TFLOP a step"
        if self.seconds_a_step is None:
            return text
        whole = f", {_duration(self.seconds_a_step * steps)} for {steps} steps" if steps else ""
        return f"{text}, about {self.seconds_a_step:.2g} s a step{whole}"


class Counts(NamedTuple):
    """What is alive after the forward pass, what comes on top at the worst moment (bytes), and operations."""

    activations: int
    working: int
    operations: float


def estimate(
    config: MMDiTConfig,
    *,
    shape: Sequence[Grid],
    context_tokens: Sequence[int],
    dtype: torch.dtype,
    checkpointing: bool,
    optimizer: str = "adamw",
    add_adapters: AddAdapters | None = None,
    arithmetic: float | None = None,
) -> Estimate:
    """Returns what a step of training the transformer takes.

    `shape` are the (rows, columns) of the latent and of its references, as in `Samples.shapes`; `context_tokens` are
    those of each sample of the batch. With `checkpointing` each block is computed again in the backward pass. Without
    `add_adapters` all weights are trained. `arithmetic` is in operations a second; see `measured_arithmetic`.

    Raises:
        ValueError: the optimizer is unknown.
    """
    model = MMDiT(config, device="meta", dtype=dtype)
    step = _DrawingStep(model, shape, context_tokens, dtype)
    attention = _CountedAttention()
    run_block = block_runner(attention, checkpointing)
    return _estimate(
        model, step.inputs, lambda given: step.loss(given, run_block), attention, optimizer, add_adapters, arithmetic
    )


def estimate_language(
    config: LanguageConfig,
    *,
    tokens: int,
    targets: int,
    dtype: torch.dtype,
    checkpointing: bool,
    optimizer: str = "adamw",
    add_adapters: AddAdapters | None = None,
    arithmetic: float | None = None,
) -> Estimate:
    """Returns what a step of training the language model takes on a text of `tokens`, the last `targets` to be learned.

    With `checkpointing` each layer is computed again in the backward pass. For the rest see `estimate`.

    Raises:
        ValueError: the optimizer is unknown.
    """
    model = Qwen3(config, device="meta", dtype=dtype)
    attention = _CountedAttention()
    for layer in cast("Iterable[Layer]", model.model.layers):
        layer.self_attn.attend = attention.causal
        if checkpointing:
            layer.forward = _checkpointed(layer.forward)

    def inputs() -> torch.Tensor:
        return torch.empty(1, tokens, config.hidden_size, device="meta", dtype=dtype)

    def loss(embedded: torch.Tensor) -> torch.Tensor:
        hidden, _ = model(embedded)
        logits = model.lm_head(hidden[0, -targets - 1 : -1])
        return functional.cross_entropy(logits.float(), torch.zeros(targets, dtype=torch.long, device="meta"))

    return _estimate(model, inputs, loss, attention, optimizer, add_adapters, arithmetic)


def block_runner(attention: Attention, checkpointing: bool) -> RunBlock:
    """Returns what runs a block of the transformer; see `mmdit.RunBlock`."""

    def run(index, block, image, text, modulation, packing, image_tokens):
        call = _checkpointed(block) if checkpointing else block
        return call(image, text, modulation, packing, attention, image_tokens)

    return run


def count(
    model: nn.Module,
    inputs: Callable[[], Inputs],
    loss: Callable[[Inputs], torch.Tensor],
    attention: _CountedAttention | None = None,
) -> Counts:
    """Returns what a forward and a backward pass take, of `loss(inputs())`; the gradients are there already.

    Weights and gradients are not in it; inputs are among the activations.
    """
    own = []
    for weight in model.parameters():
        own.append(weight)
        if weight.requires_grad:
            weight.grad = torch.zeros_like(weight)
            own.append(weight.grad)
    with _Counter(own) as counter:
        given = inputs()
        value = loss(given)
        activations = counter.live - value.untyped_storage().nbytes()  # which is as large as a latent on the CPU
        value.backward()
        del given
    more = attention.operations if attention is not None else 0
    return Counts(activations, counter.peak - activations, counter.operations + more)


def measured_arithmetic(
    config: MMDiTConfig,
    *,
    shape: Sequence[Grid],
    context_tokens: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """Returns how many operations a second a device makes in a training step of the transformer.

    Two blocks of it are run; their weights are random and not trained, as under adapters.
    """
    small = replace(config, layers=2)

    def backwards(step: _DrawingStep, attention: Attention) -> Callable[[list[Any]], torch.Tensor]:
        def loss(given: list[Any]) -> torch.Tensor:
            given[0][0].requires_grad_()
            return step.loss(given, block_runner(attention, False))

        return loss

    attention, counted = _CountedAttention(), MMDiT(small, device="meta", dtype=dtype).requires_grad_(False)
    step = _DrawingStep(counted, shape, context_tokens, dtype)
    operations = count(counted, step.inputs, backwards(step, attention), attention).operations
    model = MMDiT(small, device=device, dtype=dtype).requires_grad_(False)
    step = _DrawingStep(model, shape, context_tokens, dtype)
    loss, seconds = backwards(step, scaled_dot_product), math.inf
    for _ in range(3):
        given = step.inputs()
        start = time.perf_counter()
        loss(given).backward()
        given[0][0].grad.sum().item()  # waits for a GPU
        seconds = min(seconds, time.perf_counter() - start)
    return operations / seconds


class _DrawingStep:
    """The inputs of a step of training the transformer, without meaning, and its loss."""

    def __init__(self, model: MMDiT, shape: Sequence[Grid], context_tokens: Sequence[int], dtype: torch.dtype):
        self.model, self.shape, self.context_tokens, self.dtype = model, shape, context_tokens, dtype
        self.device = next(model.parameters()).device

    def inputs(self) -> list[Any]:
        """Returns latents, references and target, sinusoids, and branches."""
        config, batch = self.model.config, len(self.context_tokens)
        factory: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        contexts = [torch.randn(count, config.context_width, **factory) for count in self.context_tokens]
        branches = [self.model.branch(one, (Span(len(one)),), self.shape[0], self.shape[1:]) for one in contexts]
        grids = (*self.shape, self.shape[0])
        latents = [torch.randn(batch, config.channels, *grid, **factory) for grid in grids]
        return [latents, torch.randn(batch, TIME_WIDTH, device=self.device), branches]

    def loss(self, given: list[Any], run_block: RunBlock) -> torch.Tensor:
        (noisy, *references, target), sinusoids, branches = given
        velocity = self.model(noisy, sinusoids, branches, references, run_block)
        return functional.mse_loss(velocity.float(), target.float())


class _CountedAttention:
    """Attention on the meta device that saves what the fused kernels do, and adds up its operations."""

    def __init__(self):
        self.operations = 0.0

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Returns what `attention.scaled_dot_product` does; see `attention.Attention`."""
        return self._attend(query, key, value, 1.0).transpose(1, 2).flatten(2)

    def causal(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns what `qwen3.attend` does without a mask; half of the scores are not computed."""
        repeats = query.shape[1] // keys.shape[1]
        keys, values = (one.repeat_interleave(repeats, dim=1) for one in (keys, values))
        return self._attend(query, keys, values, 0.5)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, share: float) -> torch.Tensor:
        batch, heads, rows, width = query.shape
        operations = 4.0 * batch * heads * rows * key.shape[2] * width * share

        def add(times: float) -> None:
            self.operations += operations * times

        return cast(torch.Tensor, _Fused.apply(query, key, value, add))


class _Fused(torch.autograd.Function):
    """Attention without arithmetic: what it saves, and what its gradients are as large as."""

    @staticmethod
    def forward(ctx, query, key, value, add):
        add(1.0)
        output = torch.empty_like(query)  # laid out as the CPU's kernel does
        sums = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        ctx.add = add
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx, *gradients):
        ctx.add(BACKWARD_OF_ATTENTION)
        return *(torch.empty_like(one) for one in ctx.saved_tensors[:3]), None


class _Counter(TorchDispatchMode):
    """Adds up the bytes of what is alive, without the storages of `own`, and the operations of what is computed."""

    def __init__(self, own: Iterable[torch.Tensor]):
        super().__init__()
        self.live = self.peak = 0
        self.operations = 0.0
        self._known: dict[int, weakref.ref] = {}
        self._own = [tensor.untyped_storage() for tensor in own]
        self._own_ids = {id(storage) for storage in self._own}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            self.operations += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._own_ids or key in self._known:
            return
        size = storage.nbytes()

        def gone(_: object) -> None:
            self.live -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


def _estimate(
    model: nn.Module,
    inputs: Callable[[], Inputs],
    loss: Callable[[Inputs], torch.Tensor],
    attention: _CountedAttention,
    optimizer: str,
    add_adapters: AddAdapters | None,
    arithmetic: float | None,
) -> Estimate:
    if optimizer not in OPTIMIZER_BYTES:
        raise ValueError(f"optimizer {optimizer!r} found, one of {', '.join(OPTIMIZER_BYTES)} expected")
    if add_adapters is not None:
        model.requires_grad_(False)
        add_adapters(model)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    size = sum(weight.nbytes for weight in trained)
    counted = count(model, inputs, loss, attention)
    memory = {
        "weights": sum(weight.nbytes for weight in model.parameters()) - size,
        "adapters" if add_adapters is not None else "trained weights": size,
        "gradients": size,
        "optimizer": round(4 * OPTIMIZER_BYTES[optimizer] * sum(weight.numel() for weight in trained)),
        "activations": counted.activations,
        "working": counted.working,
    }
    seconds = counted.operations / arithmetic if arithmetic else None
    return Estimate(memory, counted.operations, seconds)


def _checkpointed(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
