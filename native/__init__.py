"""InternVL-U as ComfyUI's own objects: everything that knows ComfyUI's model management."""

from . import host

host.check()  # before any module that needs what may be missing
