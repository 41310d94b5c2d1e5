"""Everything of ComfyUI that the pack uses, as one table, and what of it the running ComfyUI lacks.

Read in 0.3.75 and 0.33.0, and in the single files of up to about 0.39 that are public. Tests bind the calls below
against the ComfyUI that is installed, and hold the table to what the code uses.
"""

from __future__ import annotations

import importlib
import inspect
import logging

_logger = logging.getLogger("internvl_u")

NAMES = (
    "comfy.cli_args.args.fp32_unet",
    "comfy.hooks.EnumHookMode.MinVram",
    "comfy.conds.CONDRegular",
    "comfy.latent_formats.Wan21.latent_channels",
    "comfy.model_base.ModelType.FLOW",
    "comfy.model_base.HunyuanDiT",
    "comfy.model_base.QwenImage",
    "comfy.model_management",
    "comfy.model_patcher",
    "comfy.ops.disable_weight_init",
    "comfy.ops.manual_cast.Embedding",
    "comfy.ops.manual_cast.Linear.comfy_cast_weights",
    "comfy.ops.manual_cast.Linear",
    "comfy.patcher_extension.WrappersMP.CALC_COND_BATCH",
    "comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL",
    "comfy.patcher_extension.WrappersMP.OUTER_SAMPLE",
    "comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE",
    "comfy.quant_ops.QUANT_ALGOS",
    "comfy.utils.DISABLE_MMAP",
    "comfy.utils.PROGRESS_BAR_ENABLED",
    "comfy.weight_adapter.WeightAdapterBase",
    "comfy_api.latest.ComfyExtension.get_node_list",
    "comfy_api.latest.io.ComfyNode",
    "comfy_api.latest.io.Hidden.dynprompt",
    "comfy_api.latest.io.Hidden.extra_pnginfo",
    "comfy_api.latest.io.Hidden.unique_id",
    "folder_paths.get_input_directory",
    "folder_paths.get_temp_directory",
    "folder_paths.models_dir",
    "server.PromptServer",
)
"""Values, and classes that are only derived from or looked into."""

CALLS: dict[str, tuple[int, str]] = {
    "comfy.conds.CONDList": (1, ""),
    "comfy.conds.CONDRegular._copy_with": (2, ""),
    "comfy.float.stochastic_rounding": (2, "seed"),
    "comfy.ldm.modules.attention.optimized_attention": (4, "skip_reshape transformer_options"),
    "comfy.lora.load_lora": (2, ""),
    "comfy.model_base.BaseModel.__init__": (3, "device unet_model"),
    "comfy.model_base.BaseModel.extra_conds": (1, "noise device cross_attn"),
    "comfy.model_base.BaseModel.get_dtype": (1, ""),
    "comfy.model_base.BaseModel.process_latent_in": (2, ""),
    "comfy.model_base.BaseModel.process_timestep": (2, "x contexts"),
    "comfy.model_base.BaseModel.state_dict_for_saving": (2, ""),
    "comfy.model_management.get_torch_device": (0, ""),
    "comfy.model_management.intermediate_device": (0, ""),
    "comfy.model_management.load_models_gpu": (1, "memory_required"),
    "comfy.model_management.should_use_bf16": (1, ""),
    "comfy.model_management.text_encoder_device": (0, ""),
    "comfy.model_management.text_encoder_offload_device": (0, ""),
    "comfy.model_management.throw_exception_if_processing_interrupted": (0, ""),
    "comfy.model_management.unet_dtype": (0, "model_params supported_dtypes weight_dtype"),
    "comfy.model_management.unet_manual_cast": (3, ""),
    "comfy.model_management.unet_offload_device": (0, ""),
    "comfy.model_patcher.LowVramPatch": (2, ""),
    "comfy.model_patcher.ModelPatcher": (1, "load_device offload_device"),
    "comfy.model_patcher.ModelPatcher.add_patches": (3, ""),
    "comfy.model_patcher.ModelPatcher.add_wrapper_with_key": (4, ""),
    "comfy.model_patcher.ModelPatcher.clone": (1, ""),
    "comfy.model_patcher.ModelPatcher.get_combined_hook_patches": (2, ""),
    "comfy.model_patcher.ModelPatcher.load": (2, ""),
    "comfy.model_patcher.ModelPatcher.model_size": (1, ""),
    "comfy.model_patcher.ModelPatcher.partially_load": (4, ""),
    "comfy.model_patcher.ModelPatcher.partially_unload": (2, ""),
    "comfy.model_patcher.ModelPatcher.patch_hooks": (2, ""),
    "comfy.model_patcher.ModelPatcher.patch_weight_to_device": (2, ""),
    "comfy.model_patcher.ModelPatcher.unpatch_model": (3, ""),
    "comfy.model_sampling.CONST.noise_scaling": (5, ""),
    "comfy.model_sampling.ModelSamplingDiscreteFlow": (1, ""),
    "comfy.model_sampling.ModelSamplingDiscreteFlow.percent_to_sigma": (2, ""),
    "comfy.model_sampling.ModelSamplingDiscreteFlow.set_parameters": (1, "shift timesteps multiplier"),
    "comfy.ops.cast_bias_weight": (2, "bias_dtype device dtype offloadable"),
    "comfy.ops.manual_cast.Linear.forward_comfy_cast_weights": (2, ""),
    "comfy.ops.run_every_op": (0, ""),
    "comfy.ops.uncast_bias_weight": (4, ""),
    "comfy.patcher_extension.WrapperExecutor.new_class_executor": (3, ""),
    "comfy.patcher_extension.get_all_wrappers": (2, ""),
    "comfy.sample.fix_empty_latent_channels": (2, ""),
    "comfy.sample.prepare_noise": (3, ""),
    "comfy.sampler_helpers.convert_cond": (1, ""),
    "comfy.samplers.CFGGuider": (1, ""),
    "comfy.samplers.CFGGuider.predict_noise": (5, ""),
    "comfy.samplers.CFGGuider.sample": (5, "denoise_mask callback disable_pbar seed"),
    "comfy.samplers.CFGGuider.set_cfg": (2, ""),
    "comfy.samplers.CFGGuider.set_conds": (3, ""),
    "comfy.samplers.KSAMPLER": (1, ""),
    "comfy.samplers.calc_cond_batch": (5, ""),
    "comfy.samplers.cfg_function": (6, "model_options cond uncond"),
    "comfy.samplers.sampling_function": (8, ""),
    "comfy.sd.CLIP": (0, "no_init"),
    "comfy.sd.VAE": (0, "sd"),
    "comfy.sd.VAE.decode": (2, ""),
    "comfy.sd.VAE.encode": (2, ""),
    "comfy.sd.VAE.throw_exception_if_invalid": (1, ""),
    "comfy.supported_models_base.BASE": (1, ""),
    "comfy.supported_models_base.BASE.get_model": (2, "device"),
    "comfy.supported_models_base.BASE.inpaint_model": (1, ""),
    "comfy.supported_models_base.BASE.set_inference_dtype": (3, ""),
    "comfy.utils.ProgressBar": (1, ""),
    "comfy.utils.ProgressBar.update_absolute": (2, ""),
    "comfy.utils.calculate_parameters": (1, ""),
    "comfy.utils.load_torch_file": (1, "safe_load"),
    "comfy.utils.weight_dtype": (1, ""),
    "comfy_api.latest.io.Boolean.Input": (1, "default optional tooltip"),
    "comfy_api.latest.io.Boolean.Output": (0, "display_name tooltip"),
    "comfy_api.latest.io.Clip.Output": (0, "tooltip"),
    "comfy_api.latest.io.Combo.Input": (1, "default display_name optional options tooltip"),
    "comfy_api.latest.io.Conditioning.Input": (1, "tooltip"),
    "comfy_api.latest.io.Conditioning.Output": (0, "display_name tooltip"),
    "comfy_api.latest.io.Custom": (1, ""),
    "comfy_api.latest.io.Float.Input": (1, "default display_name max min optional round step tooltip"),
    "comfy_api.latest.io.Float.Output": (0, "display_name is_output_list tooltip"),
    "comfy_api.latest.io.Guider.Output": (0, "tooltip"),
    "comfy_api.latest.io.Image.Input": (1, "extra_dict lazy optional tooltip"),
    "comfy_api.latest.io.Image.Output": (0, "display_name tooltip"),
    "comfy_api.latest.io.Int.Input": (1, "control_after_generate default max min tooltip"),
    "comfy_api.latest.io.Int.Output": (0, "display_name is_output_list tooltip"),
    "comfy_api.latest.io.Latent.Input": (1, "tooltip"),
    "comfy_api.latest.io.Latent.Output": (0, "display_name tooltip"),
    "comfy_api.latest.io.Model.Input": (1, "optional tooltip"),
    "comfy_api.latest.io.Model.Output": (0, "tooltip"),
    "comfy_api.latest.io.NodeOutput": (4, "expand ui"),
    "comfy_api.latest.io.Sampler.Output": (0, "tooltip"),
    "comfy_api.latest.io.Schema": (
        0,
        "category description display_name enable_expand hidden inputs is_output_node node_id outputs",
    ),
    "comfy_api.latest.io.Sigmas.Output": (0, "tooltip"),
    "comfy_api.latest.io.String.Input": (
        1,
        "default force_input multiline optional placeholder tooltip",
    ),
    "comfy_api.latest.io.String.Output": (0, "display_name is_output_list tooltip"),
    "comfy_api.latest.io.Vae.Input": (1, "optional tooltip"),
    "comfy_api.latest.io.Vae.Output": (0, "tooltip"),
    "comfy_execution.graph.DynamicPrompt.get_display_node_id": (2, ""),
    "comfy_execution.graph_utils.ExecutionBlocker": (1, ""),
    "comfy_execution.utils.get_executing_context": (0, ""),
    "folder_paths.add_model_folder_path": (2, ""),
    "folder_paths.folder_names_and_paths.get": (2, ""),
    "folder_paths.get_filename_list": (1, ""),
    "folder_paths.get_folder_paths": (1, ""),
    "folder_paths.get_output_directory": (0, ""),
    "latent_preview.prepare_callback": (2, ""),
    "server.PromptServer.send_progress_text": (4, ""),
    "server.PromptServer.send_sync": (4, ""),
}
"""Calls: how many arguments go by place (the object of a method is one), and which go by name."""

OPTIONAL = {
    "comfy.model_patcher.CoreModelPatcher": "0.33: streams weights; before it, ModelPatcher",
    "comfy.model_patcher.ModelPatcher._load_list": "private: without it the largest layers are loaded first",
    "comfy.model_patcher.ModelPatcher.is_dynamic": "0.33",
    "comfy.model_management.archive_model_dtypes": "0.33",
    "comfy.model_management.cuda_device_context": "0.33: several GPUs",
    "comfy.model_management.get_gpu_device_options": "0.33: several GPUs",
    "comfy.model_management.resolve_gpu_device_option": "0.33: several GPUs",
    "comfy.model_patcher.ModelPatcher.deepclone_multigpu": "0.33: several GPUs",
    "comfy.storage.state_dict_fast_disk": "about 0.38: weights that are read from a fast disk and not kept in memory",
    "comfy.supported_models_base.BASE.quant_config": "0.33; before it, layer_quant_config",
}
"""What only some versions have, since which, and what is done without it: `compat` looks each up."""


def check() -> list[str]:
    """Logs what the running ComfyUI lacks of the table, in one line, and returns it."""
    lacking = [f"{name} is missing" for name in (*NAMES, *CALLS) if not _exists(name)]
    for name, (places, names) in CALLS.items():
        if _exists(name) and (refused := _refused(resolve(name), places, names.split())):
            lacking.append(f"{name}: {refused}")
    if lacking:
        _logger.error(
            "InternVL-U: ComfyUI %s is not one that this version of the pack knows: %s. What uses it will fail. Update "
            "InternVL-U, or report this line.",
            _version(),
            "; ".join(lacking),
        )
    return lacking


def resolve(name: str) -> object:
    """Returns what a dotted name stands for.

    Raises:
        ImportError, AttributeError: there is nothing of this name.
    """
    path, *parts = name.split(".")
    found = importlib.import_module(path)
    for part in parts:
        path = f"{path}.{part}"
        if inspect.ismodule(found) and not hasattr(found, part):
            importlib.import_module(path)
        found = getattr(found, part)
    return found


def _exists(name: str) -> bool:
    try:
        resolve(name)
    except (ImportError, AttributeError):
        return False
    return True


def _refused(function, places: int, names: list[str]) -> str:
    try:
        signature = inspect.signature(function)
        given = signature.bind_partial(*[None] * places, **dict.fromkeys(names)).arguments
    except TypeError as error:
        return str(error)
    except ValueError:  # no signature to be had
        return ""
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [p.name for p in signature.parameters.values() if p.default is p.empty and p.kind not in optional]
    missing = [name for name in required if name not in given]
    return f"{', '.join(missing)} must be given" if missing else ""


def _version() -> str:
    try:
        return importlib.import_module("comfyui_version").__version__
    except (ImportError, AttributeError):
        return "of unknown version"
