"""What the pack takes of ComfyUI: the table of it, and what differs from version to version."""

import ast
import importlib
import inspect
import logging
import math
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
HOSTED = sorted(file for folder in ("nodes", "native") for file in (ROOT / folder).glob("*.py"))
MODULES = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "latent_preview", "server"}


@pytest.fixture(scope="module")
def host(comfyui):
    return importlib.import_module("pack.native.host")


def used(file):
    """Yields (dotted name, arguments by place, arguments by name) of ComfyUI's things in a file; None where no call."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] in MODULES:
                    names[name.asname or name.name.split(".")[0]] = (
                        name.name if name.asname else name.name.split(".")[0]
                    )
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in MODULES:
            names |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}

    def dotted(node):
        if isinstance(node, ast.Name):
            return names.get(node.id)
        base = dotted(node.value) if isinstance(node, ast.Attribute) else None
        return f"{base}.{node.attr}" if base else None

    hints = [getattr(node, "annotation", None) or getattr(node, "returns", None) for node in ast.walk(tree)]
    unevaluated = {id(part) for hint in hints if hint is not None for part in ast.walk(hint)}
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if id(node) in inner | unevaluated or not isinstance(node, ast.Attribute | ast.Name):
            continue
        name = dotted(node)
        if name:
            call = calls.get(id(node))
            if call is None:
                yield name, None, set()
            else:
                places = [argument for argument in call.args if not isinstance(argument, ast.Starred)]
                yield name, len(places), {word.arg for word in call.keywords if word.arg}


def test_this_comfyui_has_all_that_the_pack_uses(host):
    assert host.check() == []


def test_the_table_lists_all_that_the_code_uses(host):
    listed = {*host.NAMES, *host.CALLS, *host.OPTIONAL}
    missing = set()
    for file in HOSTED:
        for name, places, words in used(file):
            if not any(
                entry == name or entry.startswith(f"{name}.") or name.startswith(f"{entry}.") for entry in listed
            ):
                missing.add(name)
            if places is not None and name in host.CALLS:
                most, names = host.CALLS[name]
                assert places <= most and words <= set(names.split()), f"{file.name}: {name}({places}, {words})"
    assert not missing


def test_the_table_lists_nothing_that_the_code_does_not_use(host):
    code = "\n".join(file.read_text(encoding="utf-8") for file in HOSTED if file.name != "host.py")
    unused = [name for name in (*host.NAMES, *host.CALLS, *host.OPTIONAL) if name.split(".")[-1] not in code]
    assert not unused


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda m: m.delattr("comfy.sample.prepare_noise"), "comfy.sample.prepare_noise is missing"),
        (
            lambda m: m.setattr("comfy.samplers.KSAMPLER", lambda: None),
            "comfy.samplers.KSAMPLER: too many positional arguments",
        ),
        (
            lambda m: m.setattr("comfy.sd.VAE.encode", lambda self, pixels, *, kind: None),
            "comfy.sd.VAE.encode: kind must be given",
        ),
    ],
)
def test_a_comfyui_that_lacks_something_is_told_of_in_one_line(host, monkeypatch, caplog, damage, told):
    damage(monkeypatch)
    with caplog.at_level(logging.ERROR, "internvl_u"):
        assert len(host.check()) == 1
    (line,) = caplog.messages
    assert told in line and "Update InternVL-U, or report this line." in line


def test_what_we_override_takes_all_that_comfyui_gives(comfyui):
    """A new argument of ComfyUI's method must have a place in ours."""
    checked = 0
    for file in (ROOT / "native").glob("*.py"):
        module = importlib.import_module(f"pack.native.{file.stem}")
        for ours in vars(module).values():
            if not inspect.isclass(ours) or ours.__module__ != module.__name__:
                continue
            for theirs in ours.__mro__[1:]:
                if theirs.__module__.split(".")[0] != "comfy":
                    continue
                for name, function in vars(theirs).items():
                    mine = vars(ours).get(name)
                    if name == "__init__" or not inspect.isfunction(function) or not inspect.isfunction(mine):
                        continue
                    parameters = inspect.signature(function).parameters.values()
                    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
                        continue
                    given = sum(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in parameters)
                    inspect.signature(mine).bind(*[None] * given)
                    checked += 1
    assert checked >= 8


@pytest.mark.parametrize("ratio, expected", [(None, 8), (8, 8), (16, 16), (32, 32)])
def test_an_empty_latent_of_another_model_draws_the_size_that_it_was_made_for(loaded, parts, ratio, expected):
    import comfy.sample

    knows = "downscale_ratio_spacial" in inspect.signature(comfy.sample.fix_empty_latent_channels).parameters
    compat = importlib.import_module("pack.native.compat")
    latent = {"samples": torch.zeros(1, 32, 4, 6)}
    if ratio is not None:
        latent["downscale_ratio_spacial"] = ratio
    samples = compat.fitted_latent(loaded.model, latent)
    scale = expected // 8 if knows else 1
    assert samples.shape == (1, 16, 1, 4 * scale, 6 * scale)


def test_a_drawn_latent_is_no_empty_one_of_another_model(loaded, parts):
    positive, negative, empty = loaded.mllm.encode("a cat")
    assert empty["downscale_ratio_spacial"] == 8
    settings = {"seed": 1, "steps": 1, "all_cfg": 4.5, "part_cfg": 2.0}
    latent = {"samples": torch.zeros(1, 16, 1, 4, 4), "downscale_ratio_spacial": 8, "downscale_ratio_temporal": 4}
    drawn = parts.sampler.sample_latent(loaded.model, positive, negative, latent | {"batch_index": [0]}, **settings)
    assert set(drawn) == {"samples", "batch_index"}


@pytest.mark.parametrize("copies", [0, 1, 2])
def test_live_text_of_a_node_that_a_loop_copied_is_for_the_node_that_is_shown(comfyui, monkeypatch, copies):
    import server as comfy_server
    from comfy_execution.graph import DynamicPrompt

    text = importlib.import_module("pack.native.progress")
    prompt = DynamicPrompt({"7": {"class_type": "InternVLU_WriteThought", "inputs": {}}})
    shown, ids = "7", ["7"]
    for i in range(copies):
        ids.append(f"loop.0.{i}_{ids[-1]}")
        prompt.add_ephemeral_node(ids[-1], {"class_type": "InternVLU_WriteThought", "inputs": {}}, "1", ids[-2])
    sent = []
    instance = SimpleNamespace(client_id="page", send_sync=lambda *event: sent.append(event))
    monkeypatch.setattr(comfy_server.PromptServer, "instance", instance, raising=False)
    hidden = SimpleNamespace(unique_id=ids[-1], extra_pnginfo={"workflow": {"id": "w"}}, dynprompt=prompt)
    text.show(hidden, "a thought", "it was cut")
    text.show(SimpleNamespace(unique_id="3", extra_pnginfo=None, dynprompt=None), "an answer")
    assert sent[0] == (
        "internvl_u.text",
        {"node": shown, "workflow": "w", "text": "a thought", "cut": "it was cut", "key": "", "done": True},
        "page",
    )
    assert sent[1][1]["node"] == "3" and sent[1][1]["cut"] == ""


@pytest.mark.parametrize(
    "value, level, remark", [(5.0, 255, "go up to 5"), (math.inf, 255, "go up to"), (math.nan, 0, "NaN"), (-3.0, 0, "")]
)
def test_values_that_no_8_bit_picture_has_are_cut_off_and_told(parts, caplog, value, level, remark):
    from pack.internvl_u.images import ReferenceSizes

    pictures = importlib.import_module("pack.native.images")
    image = torch.full((1, 64, 64, 3), 0.5)
    image[0, :8] = value
    with caplog.at_level(logging.WARNING, "internvl_u"):
        (picture,) = pictures.to_pil_images([image], ReferenceSizes(16, 10**6, None))
    assert picture.getpixel((0, 0)) == (level,) * 3 and picture.getpixel((0, 60)) == (128,) * 3
    assert len(caplog.messages) == bool(remark) and remark in "".join(caplog.messages)


def test_the_language_model_tells_the_cache_whether_it_is_streamed(loaded, monkeypatch):
    assert loaded.mllm.is_dynamic() is False
    monkeypatch.setattr(loaded.mllm.patcher, "is_dynamic", lambda: True, raising=False)
    assert loaded.mllm.is_dynamic() is True


def test_weights_on_a_fast_disk_are_told_to_comfyui_where_it_asks(loaded, monkeypatch):
    """Read in ComfyUI of about 0.38: the patcher takes `fast_disk`, and `comfy.storage` tells it of a state dict."""
    import comfy.model_patcher

    compat = importlib.import_module("pack.native.compat")
    weights, cpu = {"a": torch.zeros(1)}, torch.device("cpu")

    class Patcher:
        def __init__(self, model, load_device, offload_device, size=0, weight_inplace_update=False, fast_disk=False):
            self.fast_disk = fast_disk

    storage = types.ModuleType("comfy.storage")
    storage.state_dict_fast_disk = lambda state: state is weights
    monkeypatch.setitem(sys.modules, "comfy.storage", storage)
    monkeypatch.setattr(comfy.model_patcher, "ModelPatcher", Patcher)
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", Patcher, raising=False)
    assert compat.make_patcher(torch.nn.Module(), weights, cpu, cpu).fast_disk is True
    assert compat.make_patcher(torch.nn.Module(), {}, cpu, cpu, dynamic=False).fast_disk is False
