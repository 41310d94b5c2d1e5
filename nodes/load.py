"""Load InternVL-U."""

from __future__ import annotations

from comfy_api.latest import io

from ..internvl_u.defaults import NANO_NOTE
from ..internvl_u.download import download
from ..native import compat
from ..native.clip import CLIP
from ..native.dtypes import PRECISIONS
from ..native.load import load
from ..native.progress import DownloadProgress, show_note_on_current
from . import model_folders
from .inputs import checked
from .model_folders import AUTO

MLLM = io.Custom("INTERNVL_U_MLLM")


class AnyName(list):
    """Choices of a list whose other names a run refuses itself, with what to do: ComfyUI would only say the choices."""

    def __contains__(self, name: object) -> bool:
        return True


class LoadModel(io.ComfyNode):
    """A checkpoint folder or single files to MODEL, MLLM, VAE and CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        folded = compat.advanced(io.Combo.Input)
        return io.Schema(
            node_id="InternVLU_LoadModel",
            display_name="Load InternVL-U",
            category="InternVL-U",
            description="Loads a checkpoint folder as released, or the smaller single files that `python -m internvl_u "
            "convert` writes. The weights stay mapped on disk until they are needed; ComfyUI moves and offloads them.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=model_folders.choices(),
                    tooltip="A folder in models/InternVL-U or models/diffusers, or a converted file in "
                    "models/diffusion_models; extra model paths count too. nano is a tiny model in the pack that "
                    "shows how everything works. Where the released model is not there, the last choices "
                    "download it, when the node runs; nothing else does.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="auto",
                    tooltip="How the weights are kept: auto takes the files' own (bf16 in the release). fp8_e4m3fn "
                    "halves the memory and changes the picture a little; fp32 doubles it.",
                ),
                io.Combo.Input(
                    "mllm_name",
                    options=AnyName([AUTO, *model_folders.language_files()]),
                    default=AUTO,
                    optional=True,
                    tooltip="The language model. auto: of the same folder, or the converted file of the same kind in "
                    "models/text_encoders.",
                    **folded,
                ),
                io.Combo.Input(
                    "vae_name",
                    options=AnyName([AUTO, *model_folders.files(model_folders.VAE_KEY)]),
                    default=AUTO,
                    optional=True,
                    tooltip="The VAE. auto: of the same folder, or the converted file in models/vae, or "
                    "qwen_image_vae.safetensors there, which is the same VAE.",
                    **folded,
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The flow transformer, with dual guidance built in."),
                MLLM.Output(display_name="MLLM", tooltip="The multimodal language model: for Encode, Think, Answer."),
                io.Vae.Output(tooltip="The Qwen-Image VAE, for Encode with pictures and for Decode."),
                io.Clip.Output(
                    tooltip="The language model once more, for ComfyUI's own nodes: Generate Text, CLIP Text Encode, "
                    "Load LoRA, Make Training Dataset. The help page says which work."
                ),
            ],
            **compat.search_aliases(
                "internvl",
                "internvl-u",
                "internvlu",
                "load model",
                "checkpoint",
                "unified model",
                "text to image",
                "t2i",
                "image edit",
                "mllm",
                "vlm",
            ),
        )

    @classmethod
    def validate_inputs(cls, model_name: str | None = None) -> bool | str:
        # ComfyUI says an error once for each input that is named here. What becomes of the other two, a run says.
        if model_name is None:
            return True  # it comes over a link and is not known yet
        try:
            model_folders.check_model(model_name)
        except FileNotFoundError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(
        cls,
        model_name: str | None = None,
        precision: str | None = None,
        mllm_name: str | None = AUTO,
        vae_name: str | None = AUTO,
    ) -> list[tuple[str, int, int]]:
        if model_name is None or mllm_name is None or vae_name is None:
            return []  # it comes over a link; what gives it is part of the cache's key
        try:
            return model_folders.fingerprint(model_folders.find(model_name, mllm_name, vae_name))
        except FileNotFoundError:
            return []  # the run says so

    @classmethod
    @checked
    def execute(cls, model_name: str, precision: str, mllm_name: str = AUTO, vae_name: str = AUTO) -> io.NodeOutput:
        found = model_folders.find(model_name, mllm_name, vae_name)
        source = model_folders.source_asked_for(model_name)
        if source is not None:
            download(found.transformer, source, progress=DownloadProgress())
        if model_folders.is_nano_choice(model_name):
            show_note_on_current(NANO_NOTE)
        model, mllm, vae = load(found.transformer, precision, found.language, found.vae)
        return io.NodeOutput(model, mllm, vae, CLIP(mllm))
