"""The nodes. Ids and input names are frozen: saved workflows depend on them."""

from comfy_api.latest import ComfyExtension, io

from ..native.copies import is_second_copy
from . import model_folders
from .chat import AddToHistory, Chat
from .decode import DecodeLatent
from .device import SelectMLLMDevice
from .encode import EncodePrompt
from .latent import CreateLatent
from .load import LoadModel
from .lora import LoadLoRA
from .sample import CreateGuider, SampleLatent, ScheduleSteps, SelectSampler
from .series import JudgePicture, ListPrompts, ListScales, PickFrames
from .think import AnswerQuestion, WriteThought

NODES = [
    LoadModel,
    LoadLoRA,
    EncodePrompt,
    CreateLatent,
    SampleLatent,
    CreateGuider,
    SelectSampler,
    ScheduleSteps,
    DecodeLatent,
    WriteThought,
    AnswerQuestion,
    ListPrompts,
    ListScales,
    PickFrames,
    JudgePicture,
    Chat,
    AddToHistory,
    SelectMLLMDevice,
]

model_folders.register()


class InternVLUExtension(ComfyExtension):
    """What ComfyUI asks for the list of nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [] if is_second_copy("InternVLU_LoadModel", NODES) else NODES
