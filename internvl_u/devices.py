"""Where the library computes when nobody says where, and in which dtype."""

from __future__ import annotations

import torch

AUTO = "auto"
DTYPES = (AUTO, "float32", "bfloat16")


def chosen_device(name: str) -> torch.device:
    """Returns the device of a name; of "auto" CUDA (ROCm too), else Apple's GPU, else the CPU.

    Raises:
        RuntimeError: torch knows none of this name.
    """
    if name != AUTO:
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def chosen_dtype(name: str, device: torch.device) -> torch.dtype:
    """Returns the dtype of a name; of "auto" bfloat16 on a GPU that computes in it, else float32."""
    if name != AUTO:
        return getattr(torch, name)
    return torch.bfloat16 if _has_bfloat16(device) else torch.float32


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return False  # float32 is what results on a CPU are compared in
    try:
        one = torch.ones(1, 1, dtype=torch.bfloat16, device=device)
        return bool((one @ one).float().item() == 1)
    except (TypeError, RuntimeError):
        return False
