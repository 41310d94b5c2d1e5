"""What a network's layers are made of: torch's own, or ComfyUI's operations, which cast and offload their weights."""

from __future__ import annotations

from typing import Any

Operations = Any
"""`torch.nn`, or anything with its `Linear`, `Conv2d`, `Embedding`, `LayerNorm` and `RMSNorm`."""
