"""The sampler in one node, and its parts for the custom-sampling nodes."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..internvl_u.defaults import GUIDANCE, GUIDANCE_WITH_THOUGHT, STEPS, Guidance
from ..native import compat
from ..native.guidance import DualGuider, check_model, drawn_with_thought
from ..native.progress import show_note
from ..native.sampler import dpmpp_2m_flow, flow_sigmas, sample_latent
from .inputs import AS_TYPED, AUTOMATIC, SCALES, check_choice, checked, scale_input, seed_input
from .speed import NO_SPEED, chosen_speed, interval_inputs, speed_input

ALL_CFG_TIP = (
    "How strongly the words are followed (all_cfg of the official code). Higher: closer to the prompt, harder "
    "contrast. 4.5 is the official value, 3.5 after a thought."
)
PART_CFG_TIP = (
    "How strongly reference images are followed when editing (part_cfg of the official code). Without references it "
    "changes nothing. 2.0 is the official value, 1.5 after a thought."
)
SCALES_TIP = (
    f"automatic: after a thought all_cfg {GUIDANCE.all_cfg} and part_cfg {GUIDANCE.part_cfg}, where both are left as "
    f"they are, become {GUIDANCE_WITH_THOUGHT.all_cfg} and {GUIDANCE_WITH_THOUGHT.part_cfg}, the official values "
    "there; other numbers count. as typed: the numbers count always."
)
STEPS_TIP = "Denoising steps. More: finer and slower. 20 is the official value."
DENOISE_TIP = "1 draws from pure noise. Below 1 keeps that much less of the way: the incoming latent shows through."


def _all_cfg() -> io.Float.Input:
    return scale_input("all_cfg", GUIDANCE.all_cfg, ALL_CFG_TIP, display_name="prompt cfg")


def _part_cfg() -> io.Float.Input:
    return scale_input("part_cfg", GUIDANCE.part_cfg, PART_CFG_TIP, display_name="picture cfg")


def _scales() -> io.Combo.Input:
    return io.Combo.Input(
        "scales",
        options=list(SCALES),
        default=AUTOMATIC,
        optional=True,
        tooltip=SCALES_TIP,
        **compat.advanced(io.Combo.Input),
    )


def chosen_scales(scales: str, typed: Guidance, positive: io.Conditioning.Type) -> tuple[Guidance, str]:
    """Returns the scales to draw with, and a sentence where they are not the typed ones.

    Raises:
        ValueError: there is no such choice of scales.
    """
    check_choice("scales", scales, SCALES)
    if scales == AS_TYPED or typed != GUIDANCE or not drawn_with_thought(positive):
        return typed, ""
    taken = GUIDANCE_WITH_THOUGHT
    numbers = f"prompt cfg {taken.all_cfg} and picture cfg {taken.part_cfg} taken (all_cfg, part_cfg)"
    return taken, f"{numbers}, the official values after a thought"


def _tell(hidden: Any, *sentences: str) -> None:
    """Says below the node, and in the log, what was taken in the place of what is typed there."""
    told = "\n".join(filter(None, sentences))
    if told:
        show_note(hidden, told, log=True)


def _steps() -> io.Int.Input:
    return io.Int.Input("steps", default=STEPS, min=1, max=1000, tooltip=STEPS_TIP)


def _denoise() -> io.Float.Input:
    return io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=DENOISE_TIP)


def _conditionings() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="From Load InternVL-U, with LoRAs or patches in between if you like."),
        io.Conditioning.Input("positive", tooltip="From InternVL-U Encode: what to draw."),
        io.Conditioning.Input("negative", tooltip="From InternVL-U Encode: what guidance leads away from."),
    ]


class SampleLatent(io.ComfyNode):
    """Official solver, schedule and guidance in one node."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InternVLU_SampleLatent",
            display_name="InternVL-U Sampler",
            category="InternVL-U",
            description="Draws with the official solver (DPM-Solver++ 2M), schedule and dual guidance: on the "
            "same machine the same seed gives the official pipeline's picture.",
            inputs=[
                *_conditionings(),
                io.Latent.Input(
                    "latent_image",
                    tooltip="From Empty InternVL-U Latent or InternVL-U Encode; or a picture through VAE Encode, with "
                    "denoise below 1.",
                ),
                seed_input(
                    "Seed of the start noise, which is made on the CPU: a GPU draws from the same noise. The same seed "
                    "and settings give the same picture on the same machine."
                ),
                _steps(),
                _all_cfg(),
                _part_cfg(),
                _denoise(),
                _scales(),
                *interval_inputs(),
                speed_input(),
            ],
            outputs=[io.Latent.Output(tooltip="The drawn latent, for InternVL-U Decode or VAE Decode.")],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
            **compat.search_aliases(
                "sample",
                "ksampler",
                "text to image",
                "t2i",
                "image to image",
                "img2img",
                "image edit",
                "inpaint",
                "denoise",
                "draw",
                "cfg",
            ),
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: io.Model.Type,
        positive: io.Conditioning.Type,
        negative: io.Conditioning.Type,
        latent_image: io.Latent.Type,
        seed: int,
        steps: int,
        all_cfg: float,
        part_cfg: float,
        denoise: float,
        scales: str = AS_TYPED,
        all_cfg_start: float = 0.0,
        all_cfg_end: float = 1.0,
        part_cfg_start: float = 0.0,
        part_cfg_end: float = 1.0,
        speed: str = NO_SPEED,
    ) -> io.NodeOutput:
        limits = (all_cfg_start, all_cfg_end, part_cfg_start, part_cfg_end)
        way, on_speed = chosen_speed(speed, model, limits, steps)
        taken, on_scales = chosen_scales(scales, Guidance(all_cfg, part_cfg), positive)
        _tell(cls.hidden, on_scales, on_speed)
        settings = {"seed": seed, "steps": way.steps, "denoise": denoise, "intervals": way.intervals}
        return io.NodeOutput(sample_latent(model, positive, negative, latent_image, **settings, **taken._asdict()))


class CreateGuider(io.ComfyNode):
    """Dual guidance for SamplerCustomAdvanced."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InternVLU_CreateGuider",
            display_name="InternVL-U Guider",
            category="InternVL-U/custom sampling",
            description="Dual guidance with both strengths, for SamplerCustomAdvanced.",
            inputs=[*_conditionings(), _all_cfg(), _part_cfg(), _scales(), *interval_inputs(), speed_input()],
            outputs=[io.Guider.Output(tooltip="For the guider of SamplerCustomAdvanced.")],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
            **compat.search_aliases("cfg guider", "dual cfg", "guidance", "custom sampling"),
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: io.Model.Type,
        positive: io.Conditioning.Type,
        negative: io.Conditioning.Type,
        all_cfg: float,
        part_cfg: float,
        scales: str = AS_TYPED,
        all_cfg_start: float = 0.0,
        all_cfg_end: float = 1.0,
        part_cfg_start: float = 0.0,
        part_cfg_end: float = 1.0,
        speed: str = NO_SPEED,
    ) -> io.NodeOutput:
        check_model(model)
        guider = DualGuider(model)
        guider.set_conds(positive, negative)
        limits = (all_cfg_start, all_cfg_end, part_cfg_start, part_cfg_end)
        way, on_speed = chosen_speed(speed, model, limits)
        taken, on_scales = chosen_scales(scales, Guidance(all_cfg, part_cfg), positive)
        _tell(cls.hidden, on_scales, on_speed)
        guider.set_scales(*taken)
        guider.set_intervals(way.intervals)
        return io.NodeOutput(guider)


class SelectSampler(io.ComfyNode):
    """The official solver as a SAMPLER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InternVLU_SelectSampler",
            display_name="InternVL-U Solver",
            category="InternVL-U/custom sampling",
            description="DPM-Solver++ 2M for flow models, as the official pipeline has it, for SamplerCustomAdvanced.",
            inputs=[],
            outputs=[io.Sampler.Output(tooltip="For the sampler of SamplerCustomAdvanced.")],
            **compat.search_aliases("sampler", "ksampler select", "dpm++ 2m", "dpmpp 2m", "flow", "custom sampling"),
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(dpmpp_2m_flow())


class ScheduleSteps(io.ComfyNode):
    """The official schedule as SIGMAS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InternVLU_ScheduleSteps",
            display_name="InternVL-U Scheduler",
            category="InternVL-U/custom sampling",
            description="The official noise levels for a number of steps, for SamplerCustomAdvanced.",
            inputs=[
                _steps(),
                _denoise(),
                speed_input(),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Only for speed turbo: the MODEL with the LoRA of few steps on it, whose steps are taken.",
                ),
            ],
            outputs=[io.Sigmas.Output(tooltip="For the sigmas of SamplerCustomAdvanced.")],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
            **compat.search_aliases("sigmas", "schedule", "steps", "denoise", "custom sampling"),
        )

    @classmethod
    @checked
    def execute(
        cls, steps: int, denoise: float, speed: str = NO_SPEED, model: io.Model.Type | None = None
    ) -> io.NodeOutput:
        if model is not None:
            check_model(model)
        way, on_speed = chosen_speed(speed, model, steps=steps)
        _tell(cls.hidden, on_speed)
        return io.NodeOutput(flow_sigmas(way.steps, denoise))
