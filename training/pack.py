"""The node pack under the name `pack`: its root is not put on the path, where `nodes` would hide ComfyUI's module."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parent.parent)]
