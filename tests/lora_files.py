"""One change of a few layers, written the way of each trainer: files for the tests of LoRA."""

import torch

LAYERS = (
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.1.attn.to_out.0",
    "transformer_blocks.0.txt_mlp.net.2",
    "img_in",
)
LANGUAGE_LAYERS = ("language_model.model.layers.0.self_attn.q_proj", "language_model.model.layers.1.mlp.down_proj")
RANK, STRENGTH = 4, 0.7


def random_change(shapes, layers, size=0.05, seed=3):
    """Returns a layer's two matrices by its name: what is added is up @ down."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for layer in layers:
        rows, columns = shapes[f"{layer}.weight"]
        up, down = torch.randn(rows, RANK, generator=generator), torch.randn(RANK, columns, generator=generator)
        result[layer] = size * up, down
    return result


def _peft(prefix, middle="", name=str):
    def write(layer, up, down, weight):
        return {
            f"{prefix}{name(layer)}.lora_A{middle}.weight": down,
            f"{prefix}{name(layer)}.lora_B{middle}.weight": up,
        }

    return write


def _kohya(prefix, name=lambda layer: layer.replace(".", "_")):
    def write(layer, up, down, weight):
        key = prefix + name(layer)
        return {
            f"{key}.lora_down.weight": down,
            f"{key}.lora_up.weight": up / 2,
            f"{key}.alpha": torch.tensor(2.0 * RANK),
        }

    return write


def _own(prefix):
    """What `python -m internvl_u train` writes: ComfyUI's names, with the scale beside them."""
    plain = _peft(prefix)

    def write(layer, up, down, weight):
        return plain(layer, up / 2, down, weight) | {f"{prefix}{layer}.alpha": torch.tensor(2.0 * RANK)}

    return write


def _loha(layer, up, down, weight):
    key, (rows, columns) = "lycoris_" + layer.replace(".", "_"), weight.shape
    left, right = torch.zeros(rows, RANK), torch.zeros(RANK, columns)
    left[:, 0], right[0] = 1, 1
    matrices = {"w1_a": up, "w1_b": down, "w2_a": left, "w2_b": right}
    return {f"{key}.hada_{name}": value for name, value in matrices.items()} | {f"{key}.alpha": torch.tensor(4.0)}


def _lokr(layer, up, down, weight):
    key = "lycoris_" + layer.replace(".", "_")
    matrices = {"lokr_w1": torch.ones(1, 1), "lokr_w2_a": up, "lokr_w2_b": down, "alpha": torch.tensor(4.0)}
    return {f"{key}.{name}": value for name, value in matrices.items()}


def _lokr_whole(layer, up, down, weight):
    """ComfyUI and LyCORIS let alpha count for nothing then."""
    key = "diffusion_model." + layer
    matrices = {"lokr_w1": torch.ones(1, 1), "lokr_w2": up @ down, "alpha": torch.tensor(7.0)}
    return {f"{key}.{name}": value for name, value in matrices.items()}


def _dora_rows(layer, up, down, weight):
    """Magnitudes that are the changed weight's own norms change nothing more; PEFT stores them flat."""
    norms = (weight + up @ down).norm(dim=1)
    return _peft("base_model.model.")(layer, up, down, weight) | {
        f"base_model.model.{layer}.lora_magnitude_vector": norms
    }


def _dora_of_lycoris(layer, up, down, weight):
    key, norms = "lycoris_" + layer.replace(".", "_"), (weight + up @ down).norm(dim=1, keepdim=True)
    return _kohya("lycoris_")(layer, up, down, weight) | {f"{key}.dora_scale": norms}


def _dora_columns(layer, up, down, weight):
    norms = (weight + up @ down).norm(dim=0, keepdim=True)
    return _kohya("transformer.", str)(layer, up, down, weight) | {f"transformer.{layer}.dora_scale": norms}


def _difference(layer, up, down, weight):
    return {f"diffusion_model.{layer}.diff": up @ down}


SPELLINGS = {
    "ComfyUI, ai-toolkit": _peft("diffusion_model."),
    "ours": _own("diffusion_model."),
    "diffusers": _peft("transformer."),
    "diffusers with an adapter's name": _peft("transformer.", ".default"),
    "bare": _peft(""),
    "PEFT": _peft("base_model.model."),
    "PEFT with an adapter's name": _peft("base_model.model.", ".style"),
    "PEFT of the whole checkpoint": _peft("base_model.model.generation_decoder.decoder."),
    "the checkpoint's": _peft("decoder."),
    "the checkpoint's with its folder": _peft("generation_decoder.decoder.", ".default"),
    "a saved checkpoint's": _peft("model.diffusion_model."),
    "kohya, musubi": _kohya("lora_unet_"),
    "OneTrainer": _kohya("transformer.", str),
    "OneTrainer, older": _kohya("lora_transformer_"),
    "LyCORIS": _kohya("lycoris_"),
    "LyCORIS LoHa": _loha,
    "LyCORIS LoKr": _lokr,
    "LoKr of a whole matrix": _lokr_whole,
    "PEFT DoRA": _dora_rows,
    "LyCORIS DoRA": _dora_of_lycoris,
    "OneTrainer DoRA": _dora_columns,
    "the difference itself": _difference,
}
ONLY_OURS = {
    "PEFT with an adapter's name",
    "PEFT of the whole checkpoint",
    "the checkpoint's",
    "the checkpoint's with its folder",
    "a saved checkpoint's",
    "OneTrainer, older",
    "PEFT DoRA",
    "LyCORIS DoRA",
}
"""Those that ComfyUI's own loaders do not take, or in which they compute something else."""


def _inside(layer):
    return layer.removeprefix("language_model.")


LANGUAGE_SPELLINGS = {
    "the checkpoint's": _peft(""),
    "ours": _own("text_encoders."),
    "the checkpoint's with its folder": _peft("vlm."),
    "PEFT of the language model": _peft("base_model.model.", name=_inside),
    "PEFT within the MLLM": _peft("language_model.base_model.model.", ".default", _inside),
    "PEFT of the whole checkpoint": _peft("base_model.model.vlm.", ".default"),
    "transformers": _peft("", name=_inside),
    "kohya": _kohya("lora_te_"),
    "kohya of the language model": _kohya("lora_te1_", lambda layer: _inside(layer).replace(".", "_")),
    "kohya of its layers": _kohya(
        "lora_te_", lambda layer: layer.removeprefix("language_model.model.").replace(".", "_")
    ),
    "diffusers": _peft("text_encoder.", name=_inside),
    "LyCORIS LoKr": _lokr,
    "LyCORIS LoHa": _loha,
    "PEFT DoRA": _dora_rows,
}


def written(change, spelling, weights):
    """Returns the tensors of a file; `weights` by name are those that the change is for."""
    file = {}
    for layer, (up, down) in change.items():
        file |= spelling(layer, up, down, weights[f"{layer}.weight"].float())
    return {name: tensor.contiguous() for name, tensor in file.items()}
