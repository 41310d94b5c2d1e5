"""Lists that what follows is run for, frames of a video, and a judge for chains that draw again."""

from __future__ import annotations

from comfy_api.latest import io

from ..internvl_u.series import read_prompts, read_scales, scale_grid
from ..native import compat
from ..native.images import pick_frames
from ..native.judge import judge
from ..native.mllm import NativeMLLM
from ..native.progress import show_note
from .inputs import checked
from .load import MLLM

CATEGORY = "InternVL-U/series"


class ListPrompts(io.ComfyNode):
    """A text to a list of prompts: what follows is run once for each."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InternVLU_ListPrompts",
            display_name="InternVL-U Prompts",
            category=CATEGORY,
            description="Many prompts in one run: what follows is run once for each. One prompt a line, a CSV table "
            "with a column prompt (and name, seed), or a JSON list. Connect name to filename_prefix of Save Image.",
            inputs=[
                io.String.Input(
                    "text",
                    multiline=True,
                    placeholder="one prompt a line\nor CSV: prompt,name,seed\nor JSON: [...]",
                    tooltip="One prompt a line; or CSV whose first line names the columns, of which prompt, name and "
                    "seed are read; or a JSON list of texts or of objects with these keys.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="prompt", is_output_list=True, tooltip="Each prompt, in order."),
                io.String.Output(
                    display_name="name",
                    is_output_list=True,
                    tooltip="A name for the picture's file: the column's, or the prompt's first words. All differ.",
                ),
                io.Int.Output(display_name="index", is_output_list=True, tooltip="0, 1, 2 and so on."),
                io.Int.Output(display_name="seed", is_output_list=True, tooltip="The column's; without one the index."),
            ],
            **compat.search_aliases("batch", "prompts", "prompt list", "prompts from file", "csv", "json", "queue"),
        )

    @classmethod
    @checked
    def execute(cls, text: str) -> io.NodeOutput:
        prompts = read_prompts(text)
        names, seeds = [one.name for one in prompts], [one.seed for one in prompts]
        return io.NodeOutput([one.prompt for one in prompts], names, list(range(len(prompts))), seeds)


class ListScales(io.ComfyNode):
    """Guidance scales to the lists of a grid."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        tip = "Numbers with commas between, such as 4.5, 3.5, 2."
        return io.Schema(
            node_id="InternVLU_ListScales",
            display_name="InternVL-U Scales",
            category=CATEGORY,
            description="A grid of guidance scales: the sampler is run once for each pair. Pictures come row by row, a "
            "row for each part_cfg, as Image Grid of ComfyUI puts them together.",
            inputs=[
                io.String.Input("all_cfg", default="2.5, 3.5, 4.5, 6", tooltip=f"{tip} A column of the grid for each."),
                io.String.Input("part_cfg", default="2", tooltip=f"{tip} A row of the grid for each."),
            ],
            outputs=[
                io.Float.Output(display_name="all_cfg", is_output_list=True, tooltip="To all_cfg of the sampler."),
                io.Float.Output(display_name="part_cfg", is_output_list=True, tooltip="To part_cfg of the sampler."),
                io.String.Output(
                    display_name="label", is_output_list=True, tooltip="Of each picture: for its file or to draw on it."
                ),
                io.Int.Output(display_name="columns", tooltip="How many pictures a row of the grid has."),
            ],
            **compat.search_aliases("grid", "xy plot", "cfg", "guidance", "compare settings"),
        )

    @classmethod
    @checked
    def execute(cls, all_cfg: str, part_cfg: str) -> io.NodeOutput:
        columns = read_scales(all_cfg, "all_cfg")
        grid = scale_grid(columns, read_scales(part_cfg, "part_cfg"))
        labels = [f"all_cfg {pair.all_cfg:g} part_cfg {pair.part_cfg:g}" for pair in grid]
        return io.NodeOutput([pair.all_cfg for pair in grid], [pair.part_cfg for pair in grid], labels, len(columns))


class PickFrames(io.ComfyNode):
    """Frames of a video to as many as the model can look at."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InternVLU_PickFrames",
            display_name="InternVL-U Frames",
            category=CATEGORY,
            description="Picks evenly spaced pictures of a batch, the first and the last among them: of a video's "
            "frames from Get Video Components, to ask InternVL-U Answer about it.",
            inputs=[
                io.Image.Input("images", tooltip="A batch, such as the frames of a video."),
                io.Int.Input(
                    "count",
                    default=8,
                    min=1,
                    max=64,
                    tooltip="How many pictures go on. Each is 256 tokens for the model to read: more take longer. 1 "
                    "takes the middle one.",
                ),
            ],
            outputs=[io.Image.Output(display_name="images", tooltip="The picked ones, as a batch.")],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
            **compat.search_aliases("video", "frames", "sample frames", "every nth", "video captioning"),
        )

    @classmethod
    @checked
    def execute(cls, images: io.Image.Type, count: int) -> io.NodeOutput:
        picked, report = pick_frames(images, count)
        show_note(cls.hidden, report)
        return io.NodeOutput(picked)


class JudgePicture(io.ComfyNode):
    """A picture as it is, or where the model says no another one, which is drawn only then."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InternVLU_JudgePicture",
            display_name="InternVL-U Judge",
            category=CATEGORY,
            description="Asks the model whether a picture is right. Yes: the picture goes on. No: the one of "
            "otherwise, which is drawn only then; several of these nodes in a row draw until it is right.",
            inputs=[
                MLLM.Input("mllm", tooltip="From Load InternVL-U."),
                io.Image.Input("image", tooltip="The picture to look at. A batch is judged as one."),
                io.String.Input(
                    "question",
                    multiline=True,
                    placeholder="is there a red circle to the left of a blue square?",
                    tooltip="A question to be answered with yes or no, in English or Chinese.",
                ),
                io.Image.Input(
                    "otherwise",
                    optional=True,
                    lazy=True,
                    extra_dict={"rawLink": True},
                    tooltip="Goes on in place of a picture that is not right: another drawing, or the next judge. What "
                    "leads to it is run only then, unless it ends in a node that shows or saves something.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The picture that is right, or the last one there is."),
                io.Boolean.Output(display_name="right", tooltip="Whether the answer begins with yes."),
                io.String.Output(display_name="answer", tooltip="What the model said of the picture."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo, io.Hidden.dynprompt],
            enable_expand=True,
            **compat.search_aliases("judge", "verify", "check image", "loop", "retry", "draw until", "vqa"),
        )

    @classmethod
    @checked
    def execute(
        cls, mllm: NativeMLLM, image: io.Image.Type, question: str, otherwise: list | None = None
    ) -> io.NodeOutput:
        right, answer = judge(mllm, question, image, cls.hidden)
        if right or otherwise is None:
            return io.NodeOutput(image, right, answer)
        # `otherwise` is a link and no picture yet: ComfyUI runs what it leads to, and puts the result in its place.
        return io.NodeOutput(otherwise, right, answer, expand={})
