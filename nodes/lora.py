"""Load InternVL-U LoRA."""

from __future__ import annotations

from comfy_api.latest import io

from ..internvl_u.lora import files_of
from ..native import compat
from ..native.lora import apply_lora
from ..native.mllm import NativeMLLM
from ..native.progress import show_note
from . import model_folders
from .inputs import checked
from .load import MLLM


def _strength(what: str) -> io.Float.Input:
    tooltip = f"How strongly the {what} is changed. 1: as trained; 0: not at all; negative: the other way."
    return io.Float.Input(f"strength_{what.lower()}", default=1.0, min=-100.0, max=100.0, step=0.01, tooltip=tooltip)


class LoadLoRA(io.ComfyNode):
    """A LoRA file onto MODEL, MLLM or both."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InternVLU_LoadLoRA",
            display_name="Load InternVL-U LoRA",
            category="InternVL-U",
            description="Puts a LoRA on the flow transformer, the language model or both, whatever trainer has written "
            "it. Several of these nodes in a row add up. What of the file fits is shown on the node.",
            inputs=[
                io.Model.Input("model", optional=True, tooltip="From Load InternVL-U, or with a LoRA on it already."),
                MLLM.Input("mllm", optional=True, tooltip="From Load InternVL-U, or with a LoRA on it already."),
                io.Combo.Input(
                    "lora_name",
                    options=model_folders.lora_choices(),
                    tooltip="A .safetensors file in models/loras; extra model paths count too.",
                ),
                _strength("MODEL"),
                _strength("MLLM"),
            ],
            outputs=[
                io.Model.Output(tooltip="The flow transformer with the LoRA on it."),
                MLLM.Output(display_name="MLLM", tooltip="The language model with the LoRA on it."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
            **compat.search_aliases("lora", "load lora", "lora loader", "dora", "lokr", "style", "adapter"),
        )

    @classmethod
    def validate_inputs(cls, lora_name: str | None = None) -> bool | str:
        if lora_name is None:
            return True  # it comes over a link and is not known yet
        try:
            model_folders.find_lora(lora_name)
        except FileNotFoundError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None = None, **_: object) -> list[tuple[str, int, int]]:
        if lora_name is None:
            return []  # it comes over a link; what gives it is part of the cache's key
        states = [(file, file.stat()) for file in files_of(model_folders.find_lora(lora_name))]
        return [(str(file), state.st_mtime_ns, state.st_size) for file, state in states]

    @classmethod
    @checked
    def execute(
        cls,
        lora_name: str,
        strength_model: float,
        strength_mllm: float,
        model: io.Model.Type | None = None,
        mllm: NativeMLLM | None = None,
    ) -> io.NodeOutput:
        file = model_folders.find_lora(lora_name)
        model, mllm, report = apply_lora(model, mllm, file, strength_model, strength_mllm)
        show_note(cls.hidden, report)
        return io.NodeOutput(model, mllm, ui={"text": [report]})
