"""A model in the layout of the hub's cache."""

import os
import shutil


def in_hub_cache(model, root, name="models--InternVL-U--InternVL-U", revision="0123456789abcdef"):
    """Lays a model out as huggingface_hub does: files are links to blobs whose names have no ending."""
    cache = root / name
    (cache / "blobs").mkdir(parents=True, exist_ok=True)
    (cache / "refs").mkdir(exist_ok=True)
    (cache / "refs" / "main").write_text(revision)
    for number, file in enumerate(sorted(file for file in model.rglob("*") if file.is_file())):
        blob = cache / "blobs" / f"{revision}{number:03}"
        shutil.copy(file, blob)
        link = cache / "snapshots" / revision / file.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return cache
