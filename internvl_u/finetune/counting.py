"""What a forward and a backward pass take, counted on the meta device, which computes nothing.

They run on tensors without values, and what is alive is added up. Attention is counted as the fused kernels have it
(FlashAttention, arXiv 2307.08691): saved are queries, keys, values, output and one number a row.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

BACKWARD_OF_ATTENTION = 2.5
"""Products of the backward pass for one of the forward pass: five for two, as the scores are computed again."""


class Counts(NamedTuple):
    """What is alive after the forward pass, what comes on top at the worst moment (bytes), and operations."""

    activations: int
    working: int
    operations: float


def count(model: nn.Module, loss: Callable[[], torch.Tensor]) -> Counts:
    """Returns what a forward and a backward pass take; the gradients are there already, as when they are accumulated.

    Weights and gradients are not counted, nor what lies on another device than they.
    """
    own = []
    for weight in model.parameters():
        own.append(weight)
        if weight.requires_grad:
            weight.grad = torch.zeros_like(weight)
            own.append(weight.grad)
    with _FusedAttention() as attention, _Counter(own) as counter:
        value = loss()
        activations = counter.live - value.untyped_storage().nbytes()  # which may be as large as a latent
        value.backward()
    return Counts(activations, counter.peak - activations, counter.operations + attention.operations)


def count_forward(model: nn.Module, compute: Callable[[], torch.Tensor]) -> Counts:
    """Returns what a forward pass takes of which nothing is kept for a backward pass."""
    with torch.no_grad(), _FusedAttention() as attention, _Counter(model.parameters()) as counter:
        compute()
    return Counts(0, counter.peak, counter.operations + attention.operations)


class _FusedAttention:
    """Attention that saves what the fused kernels do, in the place of torch's own on the meta device, while it lasts.

    A mode of torch's would not reach what a checkpoint computes again inside the backward pass.
    """

    def __init__(self):
        self.operations = 0.0
        self._original = functional.scaled_dot_product_attention

    def __enter__(self) -> _FusedAttention:
        functional.scaled_dot_product_attention = self
        return self

    def __exit__(self, *error: object) -> None:
        functional.scaled_dot_product_attention = self._original

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **how: Any) -> torch.Tensor:
        if not query.is_meta:
            return self._original(query, key, value, **how)
        batch, heads, rows, width = query.shape
        share = 0.5 if how.get("is_causal") else 1.0  # half of the scores are not computed
        once = 4.0 * batch * heads * rows * key.shape[2] * width * share

        def add(times: float) -> None:
            self.operations += once * times

        return cast(torch.Tensor, _Fused.apply(query, key, value, add))


class _Fused(torch.autograd.Function):
    """Attention without arithmetic: what it saves, and what its gradients are as large as."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, add: Callable[[float], None]):
        add(1.0)
        output = torch.empty_like(query)  # laid out as by the CPU's kernel
        sums = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        ctx.add = add
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor):
        ctx.add(BACKWARD_OF_ATTENTION)
        return *(torch.empty_like(one) for one in ctx.saved_tensors[:3]), None


class _Counter(TorchDispatchMode):
    """Adds up the bytes of what is alive, without the storages of `own`, and the operations of what is computed."""

    def __init__(self, own: Iterable[torch.Tensor]):
        super().__init__()
        self.live = self.peak = 0
        self.operations = 0.0
        self._known: dict[int, weakref.ref] = {}
        own = list(own)
        self._device = own[0].device
        self._own = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in own)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            self.operations += flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device == self._device:
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._own or key in self._known:
            return
        size = storage.nbytes()

        def gone(_: object) -> None:
            self.live -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)
