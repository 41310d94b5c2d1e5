"""InternVL-U Chat and InternVL-U Add to History."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..internvl_u.chat import ROLES
from ..internvl_u.defaults import ANSWER_TOKENS, GUIDANCE, LARGEST, STEPS
from ..internvl_u.reply import ACTIONS, READS
from ..native import compat
from ..native.chat import Settings, add_turn, blocked, talk
from ..native.mllm import NativeMLLM
from .inputs import (
    AS_TYPED,
    AUTOMATIC,
    IMAGES,
    SCALES,
    check_choice,
    checked,
    history_input,
    history_output,
    image_inputs,
    scale_input,
    seed_input,
)
from .load import MLLM


class Chat(io.ComfyNode):
    """A conversation: each run answers one message, in words or with a picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InternVLU_Chat",
            display_name="InternVL-U Chat",
            category="InternVL-U",
            description="Talk with the model: each run takes your message and answers it, draws, or edits the last "
            "picture, with the turns before as context. The conversation is in the box and is saved with the workflow; "
            "its pictures are in output/InternVL-U/chat.",
            inputs=[
                MLLM.Input("mllm", tooltip="From Load InternVL-U."),
                *_action_inputs(),
                *_drawing_inputs(),
                _message_input(),
                *image_inputs(),
                history_input("The conversation before the one in the box: of another node."),
                io.String.Input(
                    "conversation",
                    default="",
                    optional=True,
                    tooltip="The turns in the box, as JSON; the page keeps it. Over the API give the one of the last "
                    "run, or nothing for a new conversation.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="The answer; of a picture what was thought before it."),
                io.Image.Output(
                    tooltip="The picture of this run, else the last one; before the first nothing runs on."
                ),
                history_output("The whole conversation, this run's turns included."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo, io.Hidden.dynprompt],
            is_output_node=True,
            **compat.search_aliases(
                "chat", "talk", "conversation", "assistant", "chatbot", "ask", "draw", "edit", "llm", "mllm", "vlm"
            ),
        )

    @classmethod
    @checked
    def execute(
        cls,
        mllm: NativeMLLM,
        message: str,
        action: str,
        reads: str,
        scales: str,
        all_cfg: float,
        part_cfg: float,
        model: io.Model.Type | None = None,
        vae: io.Vae.Type | None = None,
        history: Any = None,
        conversation: str = "",
        **values: Any,
    ) -> io.NodeOutput:
        images = [values.pop(name, None) for name in IMAGES]
        settings = Settings(**values, scales=chosen_scales(scales, all_cfg, part_cfg))
        given = {"conversation": conversation, "history": history, "action": action, "reads": reads}
        said = talk(mllm, model, vae, message, images, **given, settings=settings, hidden=cls.hidden)
        return io.NodeOutput(said.text, blocked(said.image()), said.history, ui=said.ui())


class AddToHistory(io.ComfyNode):
    """One turn more, for conversations out of single nodes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InternVLU_AddToHistory",
            display_name="InternVL-U Add to History",
            category="InternVL-U",
            description="Adds one turn to a conversation: a picture that was drawn, or something that somebody said.",
            inputs=[
                io.Combo.Input(
                    "role",
                    options=list(ROLES),
                    default=ROLES[1],
                    tooltip="Who says it. A picture that the model drew is the assistant's.",
                ),
                io.String.Input(
                    "text", multiline=True, default="", tooltip="What is said. May be empty where there is a picture."
                ),
                history_input("The conversation before. Nothing: a new one."),
                io.Image.Input("image", optional=True, tooltip="A picture of this turn. A batch counts as several."),
            ],
            outputs=[history_output("The conversation with this turn.")],
            **compat.search_aliases("chat", "conversation", "history", "turn", "message"),
        )

    @classmethod
    @checked
    def execute(cls, role: str, text: str, history: Any = None, image: io.Image.Type | None = None) -> io.NodeOutput:
        return io.NodeOutput(add_turn(history, role, text, [image]))


def chosen_scales(scales: str, all_cfg: float, part_cfg: float) -> tuple[float, float] | None:
    """Returns the typed scales, or None for the official ones.

    Raises:
        ValueError: `scales` is none of the choices.
    """
    check_choice("scales", scales, SCALES)
    return (all_cfg, part_cfg) if scales == AS_TYPED else None


def _action_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "action",
            options=list(ACTIONS),
            default=ACTIONS[0],
            tooltip="decide by itself: the model answers, or draws where it begins a picture of its own accord. The "
            "others say what to do. The last picture is the one given with the message, else the newest.",
        ),
        io.Combo.Input(
            "reads",
            options=list(READS),
            default=READS[0],
            tooltip="What the model reads before your message, as far as it fits. last picture alone: each "
            "message stands for itself; choose it for the nano model, which has not learned conversations.",
        ),
    ]


def _drawing_inputs() -> list[io.Input]:
    whole = compat.advanced(io.Int.Input)
    return [
        _side("width"),
        _side("height"),
        io.Int.Input(
            "steps", default=STEPS, min=1, max=1000, tooltip="Denoising steps. 20 is the official value.", **whole
        ),
        seed_input("Seed of the start noise of a picture."),
        io.Int.Input(
            "max_new_tokens",
            default=ANSWER_TOKENS,
            min=1,
            max=8192,
            tooltip="The longest answer or thought in tokens, about three quarters of a word each.",
            **whole,
        ),
        io.Combo.Input(
            "scales",
            options=list(SCALES),
            default=AUTOMATIC,
            tooltip="automatic: the official values, 4.5 and 2.0, after a thought 3.5 and 1.5. as typed: the two "
            "numbers below.",
            **compat.advanced(io.Combo.Input),
        ),
        scale_input("all_cfg", GUIDANCE.all_cfg, "How strongly the words are followed, for scales as typed."),
        scale_input("part_cfg", GUIDANCE.part_cfg, "How strongly the edited pictures are kept, for scales as typed."),
        io.Model.Input("model", optional=True, tooltip="Needed to draw: from Load InternVL-U."),
        io.Vae.Input("vae", optional=True, tooltip="Needed to draw: from Load InternVL-U."),
    ]


def _message_input() -> io.String.Input:
    return io.String.Input(
        "message",
        multiline=True,
        placeholder="your message",
        tooltip="What you say. It goes to the box when it was answered. A run without a message adds "
        "nothing and gives the last text and picture again.",
    )


def _side(name: str) -> io.Int.Input:
    tip = "Pixels of a new picture, rounded down to a multiple of 16. 0: the model's own size. An edit keeps its size."
    return io.Int.Input(name, default=0, min=0, max=LARGEST, tooltip=tip, **compat.advanced(io.Int.Input))
