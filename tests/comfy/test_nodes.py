"""What users' saved workflows depend on: node ids, inputs and outputs; and what every node must tell."""

import os
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest
from pack.internvl_u.defaults import NANO_CHOICE

PICTURES = ["image1", "image2", "image3", "image4"]
MORE_PICTURES = ["image5", "image6", "image7", "image8"]
WRITING = ["max_new_tokens", "how", "temperature", "top_p", "beams", "seed"]
CHATTING = ["action", "reads", "width", "height", "steps", "seed", "max_new_tokens", "scales", "all_cfg", "part_cfg"]
HISTORY = "INTERNVL_U_HISTORY"
INTERVALS = ["all_cfg_start", "all_cfg_end", "part_cfg_start", "part_cfg_end"]
FROZEN = {
    "InternVLU_LoadModel": (
        ["model_name", "precision", "mllm_name", "vae_name"],
        ["MODEL", "INTERNVL_U_MLLM", "VAE", "CLIP"],
    ),
    "InternVLU_LoadLoRA": (
        ["lora_name", "strength_model", "strength_mllm", "model", "mllm"],
        ["MODEL", "INTERNVL_U_MLLM"],
    ),
    "InternVLU_EncodePrompt": (
        [
            "mllm",
            "prompt",
            "system_prompt",
            "vae",
            *PICTURES,
            "thought",
            *MORE_PICTURES,
            "negative_prompt",
            "reference_size",
            "history",
        ],
        ["CONDITIONING", "CONDITIONING", "LATENT", HISTORY],
    ),
    "InternVLU_CreateLatent": (["preset", "width", "height", "batch_size"], ["LATENT"]),
    "InternVLU_SampleLatent": (
        [
            *[
                "model",
                "positive",
                "negative",
                "latent_image",
                "seed",
                "steps",
                "all_cfg",
                "part_cfg",
                "denoise",
                "scales",
            ],
            *INTERVALS,
            "speed",
        ],
        ["LATENT"],
    ),
    "InternVLU_CreateGuider": (
        ["model", "positive", "negative", "all_cfg", "part_cfg", "scales", *INTERVALS, "speed"],
        ["GUIDER"],
    ),
    "InternVLU_SelectSampler": ([], ["SAMPLER"]),
    "InternVLU_ScheduleSteps": (["steps", "denoise", "speed", "model"], ["SIGMAS"]),
    "InternVLU_DecodeLatent": (["vae", "samples", "width", "height", "size"], ["IMAGE"]),
    "InternVLU_WriteThought": (
        ["mllm", "prompt", *WRITING, "system_prompt", *PICTURES, *MORE_PICTURES, "think", "budget", "history"],
        ["STRING", HISTORY],
    ),
    "InternVLU_AnswerQuestion": (
        ["mllm", "question", *WRITING, "system_prompt", *PICTURES, *MORE_PICTURES, "task", "history"],
        ["STRING", HISTORY],
    ),
    "InternVLU_ListPrompts": (["text"], ["STRING", "STRING", "INT", "INT"]),
    "InternVLU_ListScales": (["all_cfg", "part_cfg"], ["FLOAT", "FLOAT", "STRING", "INT"]),
    "InternVLU_PickFrames": (["images", "count"], ["IMAGE"]),
    "InternVLU_JudgePicture": (["mllm", "image", "question", "otherwise"], ["IMAGE", "BOOLEAN", "STRING"]),
    "InternVLU_Chat": (
        ["mllm", *CHATTING, "message", "model", "vae", *PICTURES, "history", "conversation"],
        ["STRING", "IMAGE", HISTORY],
    ),
    "InternVLU_AddToHistory": (["role", "text", "history", "image"], [HISTORY]),
    "InternVLU_SelectMLLMDevice": (["mllm", "device"], ["INTERNVL_U_MLLM"]),
}


@pytest.fixture(scope="module")
def info(server):
    return {name: node for name, node in server.get("/object_info").items() if name.startswith("InternVLU")}


def inputs(node):
    order = node["input_order"]
    for kind in ("required", "optional"):
        for name in order.get(kind, ()):
            yield name, *node["input"][kind][name]


def test_ids_inputs_and_outputs_are_frozen(info):
    found = {name: ([field for field, *_ in inputs(node)], node["output"]) for name, node in info.items()}
    assert found == FROZEN


def test_every_node_input_and_output_is_explained(info):
    for name, node in info.items():
        assert len(node["description"]) > 20, name
        for field, _, options in inputs(node):
            assert len(options.get("tooltip", "")) > 15, (name, field)
        assert len(node["output_tooltips"]) == len(node["output"])
        assert all(tip and len(tip) > 15 for tip in node["output_tooltips"]), name


def test_the_search_knows_what_users_call_the_nodes_where_the_host_can(info, server):
    if "search_aliases" not in info["InternVLU_LoadModel"]:
        assert server.get("/system_stats")["system"]["comfyui_version"].startswith("0.3.")
        return
    for word, name in {
        "edit": "EncodePrompt",
        "inpaint": "SampleLatent",
        "img2img": "SampleLatent",
        "text to image": "SampleLatent",
        "caption": "AnswerQuestion",
        "vqa": "AnswerQuestion",
        "describe": "AnswerQuestion",
        "chat": "AnswerQuestion",
        "ask": "AnswerQuestion",
        "vlm": "AnswerQuestion",
        "reasoning": "WriteThought",
        "chain of thought": "WriteThought",
        "mllm": "LoadModel",
    }.items():
        assert word in info[f"InternVLU_{name}"]["search_aliases"], (word, name)
    for name, node in info.items():
        assert len(set(node["search_aliases"])) == len(node["search_aliases"]) > 0, name


def test_rarely_used_inputs_are_folded_where_the_host_can(info):
    folded = {(name, field) for name, node in info.items() for field, _, more in inputs(node) if more.get("advanced")}
    expected = {("InternVLU_LoadModel", "mllm_name"), ("InternVLU_LoadModel", "vae_name")}
    for name in ("WriteThought", "AnswerQuestion"):
        expected |= {(f"InternVLU_{name}", field) for field in ("temperature", "top_p", "beams", "system_prompt")}
    expected |= {("InternVLU_EncodePrompt", field) for field in ("system_prompt", "negative_prompt", "reference_size")}
    expected |= {("InternVLU_DecodeLatent", field) for field in ("width", "height")}
    for name in ("SampleLatent", "CreateGuider"):
        expected |= {(f"InternVLU_{name}", field) for field in ("scales", "speed", *INTERVALS)}
    expected |= {("InternVLU_ScheduleSteps", "speed")}
    expected |= {("InternVLU_Chat", field) for field in ("width", "height", "steps", "max_new_tokens", "scales")}
    assert not folded or folded == expected, sorted(folded ^ expected)
    assert bool(folded) == ("search_aliases" in info["InternVLU_LoadModel"])


def test_widgets_are_called_what_a_user_understands_and_keep_their_ids(info):
    called = {
        field: more["display_name"]
        for node in info.values()
        for field, _, more in inputs(node)
        if "display_name" in more
    }
    scales = {"all_cfg": "prompt cfg", "part_cfg": "picture cfg"}
    scales |= {f"{name}_{end}": f"{shown} {end}" for name, shown in scales.items() for end in ("start", "end")}
    assert called == {"how": "decoding"} | scales


def test_help_pages_exist_for_every_node(info, server):
    import urllib.request

    for name in info:
        with urllib.request.urlopen(f"{server.url}/extensions/internvl-u/docs/{name}.md") as page:
            text = page.read().decode()
        assert text.startswith("# ")
        for field, *_ in inputs(info[name]):
            assert f"`{field}`" in text, (name, field)


def test_models_of_all_folders_are_offered_and_no_other_models(info):
    options = info["InternVLU_LoadModel"]["input"]["required"]["model_name"][1]["options"]
    assert sorted(options[:-1]) == ["InternVL-U", "elsewhere", "in-diffusers", "internvl-u-nano", "tiny"]
    assert options[-1] == NANO_CHOICE


def test_the_template_browser_offers_the_workflows(server):
    names = server.get("/workflow_templates")["internvl-u"]
    shipped = {file.stem for file in (Path(__file__).parent.parent.parent / "workflows").glob("*.json")}
    assert set(names) == shipped and len(shipped) == 29
    for name in names:
        workflow = server.get(f"/api/workflow_templates/internvl-u/{urllib.parse.quote(name)}.json")
        assert workflow["version"] == 0.4
        for node in workflow["nodes"]:
            if node["type"] not in {"MarkdownNote", "Note"}:
                ours = node["type"].startswith("InternVLU")
                assert node["properties"]["cnr_id"] == ("internvl-u" if ours else "comfy-core"), node
                assert node["properties"]["ver"]


STARTS = """
import asyncio, importlib.util, sys, time, types
root, comfyui = sys.argv[1:]
sys.path.insert(0, comfyui)
sys.argv = ["x", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
sys.modules["server"] = types.ModuleType("server")
sys.modules["server"].PromptServer = type("PromptServer", (), {})
import nodes, comfy_api.latest, comfy.sd, comfy_extras.nodes_custom_sampler
before, start = set(sys.modules), time.process_time()
spec = importlib.util.spec_from_file_location("pack", f"{root}/__init__.py", submodule_search_locations=[root])
sys.modules["pack"] = pack = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
asyncio.run(pack.comfy_entrypoint())
print(time.process_time() - start, *sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""
LIGHT = {"pack", "comfyui_version", "comfy_execution", "pydantic", "pydantic_core", "annotated_types"}
LIGHT |= {"typing_inspection", *sys.stdlib_module_names}


def test_the_pack_starts_quickly_and_imports_nothing_heavy(server, comfyui):
    assert "IMPORT FAILED" not in "".join(line for line in server.log.read_text().splitlines() if "internvl" in line)
    line = [sys.executable, "-c", STARTS, str(Path(__file__).parent.parent.parent), os.environ["INTERNVLU_COMFYUI"]]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    seconds, *modules = done.stdout.strip().splitlines()[-1].split()
    assert float(seconds) < 1  # of the processor; 0.12 as a rule
    assert not {name for name in modules if not name.startswith("_")} - LIGHT
