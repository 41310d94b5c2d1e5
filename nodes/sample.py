"""The sampler in one node, and its parts for the custom-sampling nodes."""

from __future__ import annotations

from comfy_api.latest import io

from ..internvl_u.defaults import GUIDANCE, STEPS
from ..native.guidance import DualGuider, check_model
from ..native.sampler import dpmpp_2m_flow, flow_sigmas, sample_latent
from .inputs import checked, seed_input

ALL_CFG_TIP = (
    "How strongly the words are followed. Higher: closer to the prompt, harder contrast. 4.5 is the official value."
)
PART_CFG_TIP = (
    "How strongly reference images are followed when editing. Without references it changes nothing. 2.0 is the "
    "official value."
)
STEPS_TIP = "Denoising steps. More: finer and slower. 20 is the official value."
DENOISE_TIP = "1 draws from pure noise. Below 1 keeps that much less of the way: the incoming latent shows through."


def _all_cfg() -> io.Float.Input:
    return _scale("all_cfg", GUIDANCE.all_cfg, ALL_CFG_TIP)


def _part_cfg() -> io.Float.Input:
    return _scale("part_cfg", GUIDANCE.part_cfg, PART_CFG_TIP)


def _scale(name: str, default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=default, min=0.0, max=100.0, step=0.1, round=0.01, tooltip=tooltip)


def _steps() -> io.Int.Input:
    return io.Int.Input("steps", default=STEPS, min=1, max=1000, tooltip=STEPS_TIP)


def _denoise() -> io.Float.Input:
    return io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=DENOISE_TIP)


def _conditionings() -> list[io.Input]:
    return [
        io.Model.Input("model"),
        io.Conditioning.Input("positive", tooltip="From InternVL-U Encode."),
        io.Conditioning.Input("negative", tooltip="From InternVL-U Encode."),
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
                io.Latent.Input("latent_image"),
                seed_input(
                    "Seed of the start noise, which is made on the CPU: a GPU draws from the same noise. The same seed "
                    "and settings give the same picture on the same machine."
                ),
                _steps(),
                _all_cfg(),
                _part_cfg(),
                _denoise(),
            ],
            outputs=[io.Latent.Output()],
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
    ) -> io.NodeOutput:
        settings = {"seed": seed, "steps": steps, "all_cfg": all_cfg, "part_cfg": part_cfg, "denoise": denoise}
        return io.NodeOutput(sample_latent(model, positive, negative, latent_image, **settings))


class CreateGuider(io.ComfyNode):
    """Dual guidance for SamplerCustomAdvanced."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InternVLU_CreateGuider",
            display_name="InternVL-U Guider",
            category="InternVL-U/custom sampling",
            description="Dual guidance with both strengths, for SamplerCustomAdvanced.",
            inputs=[*_conditionings(), _all_cfg(), _part_cfg()],
            outputs=[io.Guider.Output()],
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
    ) -> io.NodeOutput:
        check_model(model)
        guider = DualGuider(model)
        guider.set_conds(positive, negative)
        guider.set_scales(all_cfg, part_cfg)
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
            outputs=[io.Sampler.Output()],
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
            inputs=[_steps(), _denoise()],
            outputs=[io.Sigmas.Output()],
        )

    @classmethod
    @checked
    def execute(cls, steps: int, denoise: float) -> io.NodeOutput:
        return io.NodeOutput(flow_sigmas(steps, denoise))
