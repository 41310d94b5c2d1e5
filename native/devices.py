"""Which device the MLLM works on. ComfyUI's Select Device nodes choose those of MODEL, VAE and CLIP."""

from __future__ import annotations

import re

import comfy.model_management as mm

from . import compat
from .mllm import NativeMLLM, check_mllm

DEFAULT = "default"
_CHOICE = re.compile(r"default|cpu|gpu:\d+")


def select_device(mllm: NativeMLLM, choice: str) -> tuple[NativeMLLM, str]:
    """Returns an MLLM that works on "default", "cpu" or "gpu:N", and a sentence where this machine has no such GPU.

    Then it is the MLLM that was given, as ComfyUI's nodes have it: a workflow may come from a larger machine.

    Raises:
        ValueError: it is no MLLM of ours, or no such choice.
        FileNotFoundError: its files, which are read once more for another GPU, are there no more.
    """
    check_mllm(mllm)
    if not _CHOICE.fullmatch(choice):
        raise ValueError(f"device {choice!r} found, one of {', '.join(compat.device_choices())} expected")
    chosen, before = compat.chosen_device(choice), mllm.patcher.load_device
    if chosen is None and choice != DEFAULT:
        return mllm, f"device {choice} is not on this machine: the language model stays on {before}"
    load_device, offload_device = mm.text_encoder_device(), mm.text_encoder_offload_device()
    if chosen is not None:
        load_device, offload_device = chosen, chosen if chosen.type == "cpu" else offload_device
    if load_device == before:
        return mllm, ""
    return mllm.over(compat.patcher_on(mllm.patcher, load_device, offload_device)), ""
