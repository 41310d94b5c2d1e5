"""Writes a checkpoint folder of random weights in the released layout, at the released size or with fewer layers.

Names, shapes, speed and memory are those of the real model; its pictures are noise. The tokenizer is the tests' small
one, the table of embeddings has the released number of rows. The model never ends a text: the rows of `lm_head` that
would are zero.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from internvl_u import vae
from internvl_u.checkpoint import Folder
from internvl_u.config import VisionConfig
from internvl_u.mmdit import MMDiT
from internvl_u.tokenizer import ROW_TOKENS, Tokenizer
from internvl_u.vision import Projector, VisionTower

from .report import make_parser, show
from .workload import RELEASED

TEMPLATE = Path(__file__).resolve().parent.parent / "tests" / "data" / "checkpoint"
"""The tiny checkpoint of the tests."""
DTYPES = {"bfloat16": "BF16", "float32": "F32"}
CHUNK = 4 << 20
"""Values made at once."""
SPREAD = 0.02
VISION = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
LANGUAGE = {
    "hidden_size": 2048,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 6144,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}
IMAGE_SIZE = 448
IMAGE_TOKENS = 256
VAE_WIDTH = 96
CONFIG_FILES = (
    "vlm/config.json",
    "generation_decoder/config.json",
    "vae/config.json",
    "processor/processor_config.json",
)
Shapes = dict[str, tuple[int, ...]]


def write_checkpoint(
    folder: Path,
    *,
    dtype: str = "bfloat16",
    shards: int = 1,
    mmdit_layers: int = RELEASED.layers,
    language_layers: int = LANGUAGE["num_hidden_layers"],
    vision_layers: int = VISION["num_hidden_layers"],
    language: Mapping | None = None,
    seed: int = 0,
) -> dict[str, int]:
    """Writes the folder and returns the number of values of each part. Values go to disk a piece at a time.

    `language` are other sizes of Qwen3 than the released ones, by their names in its configuration. The transformer
    does not follow them: such a folder writes, and does not draw.

    Raises:
        FileExistsError: the folder is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: give an empty or a new folder")
    configs = released_configs(mmdit_layers, language_layers, vision_layers, dtype, language)
    for name in ("processor", "scheduler"):
        shutil.copytree(TEMPLATE / name, folder / name, dirs_exist_ok=True)
    shutil.copy(TEMPLATE / "model_index.json", folder)
    for name, config in configs.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")

    generator = torch.Generator().manual_seed(seed)
    parts = {
        "vlm": (mllm_shapes(configs["vlm/config.json"]), "model", shards),
        "generation_decoder": (mmdit_shapes(mmdit_layers), "model", shards),
        "vae": (vae_shapes(configs["vae/config.json"]), "diffusion_pytorch_model", 1),
    }
    for part, (shapes, stem, count) in parts.items():
        write_part(folder / part, shapes, stem, count, dtype, generator)
    silence(folder)
    return {part: sum(map(math.prod, shapes.values())) for part, (shapes, *_) in parts.items()}


def is_scale(name: str, shape: Sequence[int]) -> bool:
    """Tells whether a tensor is the scale of a norm."""
    return name.endswith(".gamma") or (len(shape) == 1 and name.endswith(".weight"))


def random_values(count: int, generator: torch.Generator) -> torch.Tensor:
    """Returns normal values, fp32, small enough that activations stay finite in bf16."""
    return torch.randn(count, generator=generator).mul_(SPREAD)


@torch.no_grad()
def fill_randomly(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Fills a model in memory by the same rule, scales of norms with ones, and returns it."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if is_scale(name, tensor.shape):
            tensor.fill_(1)
        else:
            tensor.copy_(random_values(tensor.numel(), generator).view_as(tensor))
    return model.eval().requires_grad_(False)


def released_configs(
    mmdit_layers: int = RELEASED.layers,
    language_layers: int = LANGUAGE["num_hidden_layers"],
    vision_layers: int = VISION["num_hidden_layers"],
    dtype: str = "bfloat16",
    language: Mapping | None = None,
) -> dict[str, dict]:
    """Returns the test checkpoint's JSON files by name, with the released sizes, or those of `language`."""
    vlm, drawing, vae, processor = (json.loads((TEMPLATE / name).read_text(encoding="utf-8")) for name in CONFIG_FILES)
    sizes = LANGUAGE | (language or {})
    width = sizes["hidden_size"]
    vlm["force_image_size"] = IMAGE_SIZE
    vlm["vision_config"] |= VISION | {"num_hidden_layers": vision_layers, "image_size": IMAGE_SIZE}
    vlm["llm_config"] |= sizes | {"num_hidden_layers": language_layers}
    drawing["decoder_config"] |= {
        "attention_head_dim": RELEASED.head_dim,
        "axes_dims_rope": list(RELEASED.rope_axes),
        "joint_attention_dim": RELEASED.context_width,
        "num_attention_heads": RELEASED.heads,
        "num_layers": mmdit_layers,
    }
    drawing |= {"gen_image_height": 512, "gen_image_width": 512, "visual_input_hidden_size": width}
    drawing |= {"input_hidden_size": RELEASED.context_width, "output_hidden_size": RELEASED.context_width}
    for config in (vlm, vlm["llm_config"], drawing):
        config["torch_dtype"] = dtype
    vae["base_dim"] = VAE_WIDTH
    processor["image_seq_length"] = IMAGE_TOKENS
    processor["image_processor_kwargs"]["size"] = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    pictures = {"min_dynamic_patch": 4096, "max_dynamic_patch": 16384, "max_length": 1024}
    processor["image_gen_processor_kwargs"] |= pictures
    return dict(zip(CONFIG_FILES, (vlm, drawing, vae, processor)))


def mllm_shapes(config: Mapping) -> Shapes:
    """Returns the shapes below `vlm/`."""
    stated, language = config["vision_config"], config["llm_config"]
    vision = VisionConfig(
        width=stated["hidden_size"],
        layers=stated["num_hidden_layers"],
        heads=stated["num_attention_heads"],
        mlp_width=stated["intermediate_size"],
        patch_size=stated["patch_size"],
        image_size=stated["image_size"],
        eps=stated["layer_norm_eps"],
        downsample=config["downsample_ratio"],
        output_width=language["hidden_size"],
    )
    parts = {"vision_model": VisionTower(vision, device="meta"), "mlp1": Projector(vision, device="meta")}
    shapes = {f"{part}.{name}": shape for part, module in parts.items() for name, shape in _shapes(module).items()}
    shapes |= {f"language_model.{name}": shape for name, shape in language_shapes(language).items()}
    return shapes | {"special_token_embedding.weight": (len(ROW_TOKENS), language["hidden_size"])}


def language_shapes(config: Mapping) -> Shapes:
    """Returns the shapes of a Qwen3 of these sizes, by transformers' names."""
    width, inner, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    layer = {
        "input_layernorm": (width,),
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "self_attn.q_norm": (size,),
        "self_attn.k_norm": (size,),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (config["vocab_size"], width)}


def mmdit_shapes(layers: int) -> Shapes:
    """Returns the shapes below `generation_decoder/`, with the one tensor that only training uses."""
    with torch.device("meta"):
        blocks = MMDiT(type(RELEASED)(**vars(RELEASED) | {"layers": layers}))
    shapes = {f"decoder.{name}": shape for name, shape in _shapes(blocks).items()}
    return shapes | {"encoder_padding_token": (RELEASED.context_width,)}


def vae_shapes(config: Mapping) -> Shapes:
    """Returns the shapes below `vae/`."""
    return vae.vae_shapes(config["base_dim"])


def write_part(folder: Path, shapes: Shapes, stem: str, shards: int, dtype: str, generator: torch.Generator) -> None:
    """Writes a part's weights into `shards` safetensors files, with an index where there are several."""
    groups = _split(shapes, shards)
    names = [f"{stem}-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    if len(groups) == 1:
        names = [f"{stem}.safetensors"]
    for name, group in zip(names, groups):
        _write_file(folder / name, group, dtype, generator)
    if len(groups) > 1:
        size = sum(map(math.prod, shapes.values())) * getattr(torch, dtype).itemsize
        weight_map = {tensor: name for name, group in zip(names, groups) for tensor in group}
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def silence(folder: Path) -> None:
    """Zeroes the rows of `lm_head` that would end a text, in the files: such a model writes on and on."""
    stops = Tokenizer(Folder(folder).tokenizer()).stops
    for file in (folder / "vlm").glob("*.safetensors"):
        with file.open("r+b") as target:
            length = int.from_bytes(target.read(8), "little")
            head = json.loads(target.read(length)).get("language_model.lm_head.weight")
            if head is not None:
                first, end = head["data_offsets"]
                row = (end - first) // head["shape"][0]
                for token in stops:
                    target.seek(8 + length + first + token * row)
                    target.write(bytes(row))


def _write_file(file: Path, shapes: Shapes, dtype: str, generator: torch.Generator) -> None:
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * getattr(torch, dtype).itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as target:
        target.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape in shapes.items():
            for chunk in _chunks(name, shape, generator):
                target.write(chunk.to(getattr(torch, dtype)).view(torch.uint8).numpy().data)


def _chunks(name: str, shape: Sequence[int], generator: torch.Generator) -> Iterator[torch.Tensor]:
    count = math.prod(shape)
    for start in range(0, count, CHUNK):
        length = min(CHUNK, count - start)
        yield torch.ones(length) if is_scale(name, shape) else random_values(length, generator)


def _split(shapes: Shapes, shards: int) -> list[Shapes]:
    total, passed, groups = sum(map(math.prod, shapes.values())), 0, [{} for _ in range(shards)]
    for name, shape in shapes.items():
        groups[min(passed * shards // total, shards - 1)][name] = shape
        passed += math.prod(shape)
    return [group for group in groups if group]


def _shapes(model: torch.nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("folder", type=Path, help="where to write; must be empty or new")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="of all weights")
    parser.add_argument("--shards", type=int, default=1, help="files for vlm and for generation_decoder")
    parser.add_argument("--mmdit-layers", type=int, default=RELEASED.layers, help="blocks of the flow transformer")
    parser.add_argument("--language-layers", type=int, default=LANGUAGE["num_hidden_layers"], help="layers of Qwen3")
    parser.add_argument("--vision-layers", type=int, default=VISION["num_hidden_layers"], help="layers of InternViT")
    parser.add_argument("--seed", type=int, default=0, help="of the random values")
    settings = vars(parser.parse_args())
    file = settings.pop("json")
    counts = write_checkpoint(**settings)
    sizes = {part: sum(one.stat().st_size for one in (settings["folder"] / part).iterdir()) for part in counts}
    rows = [{"part": part, "values": counts[part], "GB": sizes[part] / 1e9} for part in counts]
    show([*rows, {"part": "all", "values": sum(counts.values()), "GB": sum(sizes.values()) / 1e9}], file)


if __name__ == "__main__":
    main()
