"""InternVL-U Select MLLM Device."""

from __future__ import annotations

from comfy_api.latest import io

from ..native import compat
from ..native.devices import DEFAULT, select_device
from ..native.mllm import NativeMLLM
from ..native.progress import show_note_on_current
from .inputs import checked
from .load import MLLM


class SelectMLLMDevice(io.ComfyNode):
    """An MLLM on another device."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InternVLU_SelectMLLMDevice",
            display_name="InternVL-U Select MLLM Device",
            category="InternVL-U",
            description="Chooses the device that the language model works on, as ComfyUI's Select Model Device and "
            "Select VAE Device do for the other two parts: a second GPU, or the CPU. Put it behind Load InternVL-U and "
            "its LoRAs. Where the GPU of that number is missing, everything stays as it is.",
            inputs=[
                MLLM.Input("mllm", tooltip="From Load InternVL-U, or with a LoRA on it already."),
                io.Combo.Input(
                    "device",
                    options=compat.device_choices(),
                    default=DEFAULT,
                    tooltip="default: where ComfyUI puts text encoders. cpu: slow, and takes no graphics memory. "
                    "gpu:N: the GPU of this number, from 0 (ComfyUI 0.33 and newer, where there are several).",
                ),
            ],
            outputs=[
                MLLM.Output(display_name="MLLM", tooltip="The language model: for Encode, Think, Answer and Chat.")
            ],
            **compat.search_aliases("device", "select device", "multi gpu", "second gpu", "cpu", "mllm"),
        )

    @classmethod
    def validate_inputs(cls, device: str = DEFAULT) -> bool:
        return True  # a workflow of a machine with more GPUs runs here all the same

    @classmethod
    @checked
    def execute(cls, mllm: NativeMLLM, device: str = DEFAULT) -> io.NodeOutput:
        selected, note = select_device(mllm, device)
        if note:
            show_note_on_current(note)
        return io.NodeOutput(selected)
