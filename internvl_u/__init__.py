"""InternVL-U (arXiv 2603.09877): the model and its inference in plain torch, without ComfyUI."""

__version__ = "0.1.0"
