"""Load InternVL-U."""

from __future__ import annotations

from comfy_api.latest import io

from . import model_folders

MLLM = io.Custom("INTERNVL_U_MLLM")
NONE_FOUND = "no model found"
PRECISIONS = ("auto", "fp32", "bf16", "fp8_e4m3fn")


class LoadModel(io.ComfyNode):
    """A checkpoint folder to MODEL, MLLM and VAE."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="InternVLU_LoadModel",
            display_name="Load InternVL-U",
            category="InternVL-U",
            description="Loads a checkpoint in the released folder layout. The weights stay mapped on disk until "
            "they are needed; ComfyUI moves and offloads them by itself.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=list(model_folders.available()) or [NONE_FOUND],
                    tooltip="A folder in models/InternVL-U, models/diffusers or their extra model paths.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="auto",
                    tooltip="How the weights are kept: auto takes the files' own (bf16 in the release). fp8_e4m3fn "
                    "halves the memory and changes the picture a little; fp32 doubles it.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The flow transformer, with dual guidance built in."),
                MLLM.Output(display_name="MLLM", tooltip="The multimodal language model: for the Encode node."),
                io.Vae.Output(tooltip="The Qwen-Image VAE."),
            ],
        )

    @classmethod
    def validate_inputs(cls, model_name):
        try:
            model_folders.find(model_name)
        except FileNotFoundError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, model_name, precision):
        files = sorted(model_folders.find(model_name).rglob("*.*"))
        stats = [(str(file), file.stat()) for file in files if file.is_file()]
        return [(name, stat.st_mtime_ns, stat.st_size) for name, stat in stats]

    @classmethod
    def execute(cls, model_name, precision) -> io.NodeOutput:
        from .native import load

        return io.NodeOutput(*load(model_folders.find(model_name), precision))
