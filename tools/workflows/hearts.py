"""The captioned pictures that the training workflow learns from: web/hearts, and as a folder of ComfyUI's input folder.

20 hearts, which the nano model has never seen, and 20 pictures of what it knows, so that it forgets less. In web/hearts
the captions are one file, captions.json; the page (web/js/example_pictures.js) and this write a text for each picture.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from . import graphs

FOLDER = Path(__file__).resolve().parents[2] / "web" / "hearts"
CAPTIONS = "captions.json"


def put(input_folder: Path) -> None:
    """Writes pictures and captions where the workflow looks for them in ComfyUI's input folder."""
    folder = input_folder / graphs.HEARTS
    folder.mkdir(exist_ok=True)
    for name, caption in json.loads((FOLDER / CAPTIONS).read_text(encoding="utf-8")).items():
        shutil.copyfile(FOLDER / name, folder / name)
        (folder / name).with_suffix(".txt").write_text(caption, encoding="utf-8")
