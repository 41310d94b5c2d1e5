"""Core's Train LoRA in this process: what it needs of our MODEL and conditionings, under each of its options."""

import importlib
import inspect

import numpy
import pytest
import torch
from pack.internvl_u.convert import convert
from PIL import Image
from safetensors.torch import save_file

COLOURS = ("red", "green", "blue")
OPTIONS = {
    "batch_size": 1,
    "grad_accumulation_steps": 1,
    "steps": 2,
    "learning_rate": 0.01,
    "rank": 2,
    "optimizer": "AdamW",
    "loss_function": "MSE",
    "seed": 0,
    "training_dtype": "fp32",
    "lora_dtype": "fp32",
    "quantized_backward": False,
    "algorithm": "LoRA",
    "gradient_checkpointing": False,
    "checkpoint_depth": 1,
    "offloading": False,
    "existing_lora": "[None]",
    "bucket_mode": False,
    "bypass_mode": False,
}


@pytest.fixture(scope="module")
def trainer(native):
    """Core's node as a function: (MODEL, LATENTs, CONDITIONINGs, options) -> (LoRA, losses, steps)."""
    node = importlib.import_module("comfy_extras.nodes_train").TrainLoraNode
    taken = inspect.signature(node.execute).parameters
    dtypes = next(one.options for one in node.define_schema().inputs if one.id == "training_dtype")

    def train(model, latents, positive, **options):
        if missing := set(options) - set(taken) or {options.get("training_dtype", "fp32")} - set(dtypes):
            pytest.skip(f"this ComfyUI's Train LoRA has no {', '.join(sorted(missing))}")
        torch.manual_seed(0)
        given = {name: [value] for name, value in (OPTIONS | options).items() if name in taken}
        result = node.execute(model=[model], latents=latents, positive=positive, **given).result
        lora, losses, steps = result[-3:]  # older versions put a MODEL before them
        return lora, losses["loss"], steps

    return train


@pytest.fixture
def data(loaded):
    """LATENTs and CONDITIONINGs of a few pictures; prompts of different lengths."""
    generator = torch.Generator().manual_seed(1)
    latents = [{"samples": torch.randn(1, 16, 1, 8, 8, generator=generator)} for _ in COLOURS]
    return latents, [loaded.mllm.encode(" ".join(["a", "very"][:i] + [colour]))[0] for i, colour in enumerate(COLOURS)]


@pytest.fixture
def edits(loaded):
    """CONDITIONINGs with a reference each: alike in size, or not."""

    def make(sizes):
        picture = Image.fromarray(numpy.arange(64 * 64 * 3, dtype=numpy.uint8).reshape(64, 64, 3))
        return [
            loaded.mllm.encode(colour, images=[picture.resize((side, 64))], vae=loaded.vae)[0]
            for colour, side in zip(COLOURS, sizes)
        ]

    return make


def changed(lora):
    """Returns whether each layer has learnt something that is a number; what a last layer leaves out learns nothing."""
    assert all(torch.isfinite(tensor.float()).all() for tensor in lora.values())
    return sum(bool(tensor.count_nonzero()) for name, tensor in lora.items() if name.endswith((".diff", ".diff_b")))


CHOICES = [
    *({"optimizer": name} for name in ("AdamW", "Adam", "SGD", "RMSprop")),
    *({"algorithm": name} for name in ("LoRA", "LoHa", "LoKr", "OFT")),
    *({"loss_function": name} for name in ("L1", "Huber", "SmoothL1")),
    *({"training_dtype": name, "lora_dtype": "bf16"} for name in ("bf16", "none")),
    {"grad_accumulation_steps": 2},
    {"bypass_mode": True},
    {"bypass_mode": True, "algorithm": "LoKr"},
    {"bypass_mode": True, "algorithm": "OFT"},
    {"gradient_checkpointing": True, "checkpoint_depth": 5, "offloading": True},
]


@pytest.mark.parametrize("options", CHOICES, ids=lambda options: " ".join(map(str, options.values())))
def test_each_choice_trains_every_layer(trainer, loaded, data, options):
    before = {name: tensor.clone() for name, tensor in loaded.model.model.state_dict().items()}
    lora, losses, steps = trainer(loaded.model, *data, **options)
    assert steps == 2 and len(losses) == 2 * options.get("grad_accumulation_steps", 1)
    layers = {name.rpartition(".")[0] for name in lora if name.endswith(".diff_b")}
    assert len(layers) > 30 and changed(lora) > 30
    assert all(torch.equal(before[name], tensor) for name, tensor in loaded.model.model.state_dict().items())


def test_loha_in_bypass_mode_is_refused_by_core_with_a_sentence(trainer, loaded, data):
    with pytest.raises(NotImplementedError, match=r"LohaDiff.h\(\) not implemented"):
        trainer(loaded.model, *data, algorithm="LoHa", bypass_mode=True)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_checkpointing_changes_nothing_of_what_is_learnt(trainer, loaded, data, edits, near, depth):
    for positive in (data[1], edits((64, 64, 96))):
        plain, losses, _ = trainer(loaded.model, data[0], positive, optimizer="SGD")
        options = {"gradient_checkpointing": True, "optimizer": "SGD"} | (
            {"checkpoint_depth": depth} if depth > 1 else {}
        )
        again, same, _ = trainer(loaded.model, data[0], positive, **options)
        assert losses == pytest.approx(same, rel=1e-5)
        near(torch.cat([one.flatten() for one in again.values()]), torch.cat([one.flatten() for one in plain.values()]))


@pytest.fixture
def probe(native, checkpoint):
    """Evaluates a batch as core's trainer does: the model's answers, and those of each picture alone."""
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import Guider_Basic

    class Probe(comfy.samplers.Sampler):
        def sample(self, wrap, sigmas, extra_args, callback, noise, latent_image=None, *args, **kwargs):
            entries, level = wrap.conds["positive"], torch.linspace(0.3, 0.9, len(noise))
            self.found = [wrap(noise, level, **extra_args)]
            for i, entry in enumerate(entries):
                wrap.conds["positive"] = [entry]
                self.found.append(wrap(noise[i : i + 1], level[i : i + 1], **extra_args))
            return torch.zeros_like(noise)

    def run(positive):
        with torch.inference_mode(False):
            guider, sampler = Guider_Basic(native.load(checkpoint, "fp32")[0]), Probe()
            guider.set_conds([entry for one in positive for entry in one])
            noise = torch.randn(len(positive), 16, 1, 8, 8)
            guider.sample(noise, torch.zeros_like(noise), sampler, torch.ones(2))
        return sampler.found[0], torch.cat(sampler.found[1:])

    return run


@pytest.mark.parametrize("sizes", [None, (64, 64, 64), (64, 96, 64)])
def test_each_picture_of_a_batch_has_its_own_prompt_and_reference(probe, data, edits, near, sizes):
    batch, singles = probe(data[1] if sizes is None else edits(sizes))
    near(batch, singles, 1e-5)
    assert batch.requires_grad is False  # nothing here learns: only the way is looked at


@pytest.mark.parametrize("sizes", [(64, 64, 64), (64, 96, 64)])
def test_edits_are_learnt_also_in_batches(trainer, loaded, data, edits, sizes):
    for batch in (1, 3):
        lora, losses, _ = trainer(loaded.model, data[0], edits(sizes), batch_size=batch)
        assert changed(lora) > 30 and all(loss > 0 for loss in losses)


@pytest.mark.parametrize("bucket_mode", [False, True])
def test_pictures_of_several_sizes_come_in_the_models_range(trainer, loaded, data, parts, monkeypatch, bucket_mode):
    """As those of one size do: in core's two ways for several they stay as the VAE gave them."""
    nodes = importlib.import_module("comfy_extras.nodes_dataset")
    if not hasattr(nodes, "ResolutionBucket"):
        pytest.skip("this ComfyUI takes our latents in one size alone")
    seen, plain = [], parts.model.FlowSampling.noise_scaling

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        if not sigma.any():  # what is to be learnt
            seen.extend(latent_image.detach().clone().split(1))
        return plain(self, sigma, noise, latent_image, max_denoise)

    monkeypatch.setattr(parts.model.FlowSampling, "noise_scaling", noise_scaling)
    latents = [{"samples": one["samples"][..., : 8 if i else 4]} for i, one in enumerate(data[0])]
    expected = [loaded.model.model.process_latent_in(one["samples"]) for one in latents]
    given = nodes.ResolutionBucket.execute(latents, data[1]).result if bucket_mode else (latents, data[1])
    trainer(loaded.model, *given, steps=6, batch_size=2, **({"bucket_mode": True} if bucket_mode else {}))
    found = {i for one in seen for i, other in enumerate(expected) if near_to(one, other)}
    assert found == {0, 1, 2} and all(any(near_to(one, other) for other in expected) for one in seen)


def near_to(one, other):
    return one.shape == other.shape and torch.allclose(one, other, atol=1e-4)


def test_a_trainer_that_scales_by_itself_is_left_alone():
    from pack.native import compat

    class Newer:
        bucket_latents = real_dataset = (1, 2)

        def sample(self, wrap):
            return wrap.inner_model.process_latent_in(self.bucket_latents)

    class Model:
        def process_latent_in(self, latent):
            return 10 * latent

    newer = Newer()
    compat.scale_training_latents(newer, Model().process_latent_in)
    assert newer.bucket_latents == (1, 2)
    older = type("Older", (), {"bucket_latents": [1, 2], "real_dataset": None})()
    compat.scale_training_latents(older, Model().process_latent_in)
    assert older.bucket_latents == [10, 20] and older.real_dataset is None


def test_float16_without_another_dtype_is_no_black_hole(native, checkpoint, trainer, data):
    """Core divides by 1e-37 there, which float16 does not have."""
    lora, losses, _ = trainer(native.load(checkpoint, "fp16")[0], *data, training_dtype="none", lora_dtype="fp32")
    assert losses[0] > 0 and changed(lora) > 30


def test_a_learning_rate_that_destroys_all_ends_the_job_with_a_sentence(trainer, loaded, data):
    with pytest.raises(RuntimeError, match="not a number .NaN.: the fault lies in a learning rate that is too high"):
        trainer(loaded.model, *data, learning_rate=1.0, optimizer="RMSprop", steps=60)


FORMATS = ("fp8_e4m3fn", "fp8_scaled", "fp8_scaled_old", "int8", "int8_convrot")


@pytest.fixture(scope="module")
def small(native, checkpoint, tmp_path_factory):
    """Loads the transformer of a file in one of the smaller formats."""

    def load(dtype):
        drawing, language, vae = convert(checkpoint, tmp_path_factory.mktemp("files"), dtype)
        return native.load(drawing, "auto", language, vae)[0]

    return load


@pytest.mark.parametrize("bypass", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_quantised_weights_are_trained_on_where_that_is_what_they_stand_for(trainer, small, data, name, bypass):
    from pack.native.quantized import Quantized

    model, options = small(name), {"training_dtype": "bf16"} | ({"bypass_mode": True} if bypass else {})
    if not bypass and any(isinstance(layer, Quantized) for layer in model.model.modules()):
        with pytest.raises(ValueError, match="quantised model found in a format that this ComfyUI does not know. Turn"):
            trainer(model, *data, **options)
        return
    lora, losses, _ = trainer(model, *data, **options)
    assert changed(lora) > 30 and losses[0] > 0


@pytest.mark.parametrize("bypass", [False, True])
def test_packed_matrices_are_not_trained_on_and_that_is_said(trainer, small, data, bypass):
    pytest.importorskip("gguf", reason="the package that writes GGUF files, see requirements-dev.txt")
    options = {"bypass_mode": True} if bypass else {}
    with pytest.raises(ValueError, match="training a LoRA: a GGUF model found, whose matrices are packed. Load a safe"):
        trainer(small("Q8_0"), *data, **options)


def test_training_goes_on_from_a_file(trainer, loaded, data, tmp_path, monkeypatch):
    import folder_paths

    first, _, _ = trainer(loaded.model, *data)
    save_file({name: one.contiguous() for name, one in first.items()}, tmp_path / "mine_2_steps_1_.safetensors")
    monkeypatch.setattr(folder_paths, "get_full_path_or_raise", lambda folder, name: str(tmp_path / name))
    options = {"existing_lora": "mine_2_steps_1_.safetensors", "steps": 3, "learning_rate": 1e-7}
    second, _, steps = trainer(loaded.model, *data, **options)
    assert steps == 5 and second.keys() == first.keys()
    matrices = [name for name in first if name.endswith((".lora_up.weight", ".lora_down.weight"))]
    assert len(matrices) > 60
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in matrices)
