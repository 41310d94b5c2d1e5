"""Draw the pictures of the help pages: each node as it is usually wired, in a real ComfyUI page.

    python tests/tools/make_wiring.py --url http://127.0.0.1:8188 [--chromium /usr/bin/chromium]

Writes web/docs/NODE.jpg, which web/docs/NODE.md shows with `![...](NODE.jpg)`. Needs what make_workflows.py needs.
"""

from __future__ import annotations

import argparse
import shutil

from make_workflows import ROOT, build, open_page, thumbnail
from playwright.sync_api import sync_playwright

WIDTH, QUALITY = 800, 80  # pixels, JPEG: each file stays below 60 kB

# Node type: the workflow, and the nodes of it that are shown.
PARTS = {
    "InternVLU_LoadModel": ("text_to_image", "load encode sample decode"),
    "InternVLU_EncodePrompt": ("edit", "load image encode sample"),
    "InternVLU_CreateLatent": ("text_to_image", "latent sample"),
    "InternVLU_SampleLatent": ("text_to_image", "load latent encode sample decode"),
    "InternVLU_CreateGuider": ("text_to_image_custom_sampling", "load encode guider sample"),
    "InternVLU_SelectSampler": ("text_to_image_custom_sampling", "noise guider solver steps sample"),
    "InternVLU_ScheduleSteps": ("text_to_image_custom_sampling", "noise guider solver steps sample"),
    "InternVLU_DecodeLatent": ("text_to_image", "load sample decode save"),
    "InternVLU_WriteThought": ("think_then_draw", "load prompt think encode"),
    "InternVLU_AnswerQuestion": ("ask_about_a_picture", "load image answer preview"),
}
SIZES = {
    "encode": (280, 290),
    "think": (300, 560),
    "answer": (300, 560),
    "image": (260, 330),
    "prompt": (260, 110),
    "preview": (220, 120),
}
MARK = """
type => {
  const {color, bgcolor} = LGraphCanvas.node_colors.blue;
  Object.assign(app.graph._nodes.find(node => node.type === type), {color, bgcolor});
}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="a running ComfyUI")
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="the browser's program")
    args = parser.parse_args()

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.chromium, args=["--no-sandbox", "--disable-gpu"])
        page = open_page(browser, args.url)
        for node, (workflow, names) in PARTS.items():
            build(page, workflow, names.split(), SIZES, nano=True)
            page.evaluate(MARK, node)
            thumbnail(page, ROOT / "web" / "docs" / f"{node}.jpg", WIDTH, QUALITY)
        browser.close()


if __name__ == "__main__":
    main()
