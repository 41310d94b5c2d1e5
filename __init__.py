"""InternVL-U for ComfyUI: nodes that draw with OpenGVLab's unified 4B model as native ComfyUI objects."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Returns the extension with all nodes; ComfyUI calls it once at start."""
    from .nodes import InternVLUExtension

    return InternVLUExtension()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
