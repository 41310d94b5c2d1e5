"""InternVL-U as ComfyUI's own objects. The only place that speaks with ComfyUI's model management."""
