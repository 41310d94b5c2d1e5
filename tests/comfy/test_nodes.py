"""What users' saved workflows depend on: node ids, inputs and outputs; and what every node must tell."""

from pathlib import Path

import pytest

PICTURES = ["image1", "image2", "image3", "image4"]
WRITING = ["max_new_tokens", "how", "temperature", "top_p", "beams", "seed"]
CHATTING = ["action", "reads", "width", "height", "steps", "seed", "max_new_tokens", "scales", "all_cfg", "part_cfg"]
HISTORY = "INTERNVL_U_HISTORY"
FROZEN = {
    "InternVLU_LoadModel": (["model_name", "precision", "mllm_name", "vae_name"], ["MODEL", "INTERNVL_U_MLLM", "VAE"]),
    "InternVLU_LoadLoRA": (
        ["lora_name", "strength_model", "strength_mllm", "model", "mllm"],
        ["MODEL", "INTERNVL_U_MLLM"],
    ),
    "InternVLU_EncodePrompt": (
        ["mllm", "prompt", "system_prompt", "vae", *PICTURES, "thought", "history"],
        ["CONDITIONING", "CONDITIONING", "LATENT", HISTORY],
    ),
    "InternVLU_CreateLatent": (["preset", "width", "height", "batch_size"], ["LATENT"]),
    "InternVLU_SampleLatent": (
        ["model", "positive", "negative", "latent_image", "seed", "steps", "all_cfg", "part_cfg", "denoise"],
        ["LATENT"],
    ),
    "InternVLU_CreateGuider": (["model", "positive", "negative", "all_cfg", "part_cfg"], ["GUIDER"]),
    "InternVLU_SelectSampler": ([], ["SAMPLER"]),
    "InternVLU_ScheduleSteps": (["steps", "denoise"], ["SIGMAS"]),
    "InternVLU_DecodeLatent": (["vae", "samples", "width", "height"], ["IMAGE"]),
    "InternVLU_WriteThought": (
        ["mllm", "prompt", *WRITING, "system_prompt", *PICTURES, "history"],
        ["STRING", HISTORY],
    ),
    "InternVLU_AnswerQuestion": (
        ["mllm", "question", *WRITING, "system_prompt", *PICTURES, "history"],
        ["STRING", HISTORY],
    ),
    "InternVLU_Chat": (
        ["mllm", *CHATTING, "message", "model", "vae", *PICTURES, "history", "conversation"],
        ["STRING", "IMAGE", HISTORY],
    ),
    "InternVLU_AddToHistory": (["role", "text", "history", "image"], [HISTORY]),
}
SOCKETS = {"MODEL", "INTERNVL_U_MLLM", "VAE", "CONDITIONING", "LATENT", "GUIDER", "SAMPLER", "SIGMAS", "IMAGE"}


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


def test_every_node_and_widget_is_explained(info):
    for name, node in info.items():
        assert len(node["description"]) > 20, name
        for field, kind, options in inputs(node):
            if kind not in SOCKETS:
                assert len(options.get("tooltip", "")) > 20, (name, field)


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
    assert sorted(options) == ["InternVL-U", "elsewhere", "in-diffusers", "internvl-u-nano", "tiny"]


def test_the_template_browser_offers_the_workflows(server):
    names = server.get("/workflow_templates")["internvl-u"]
    shipped = {file.stem for file in (Path(__file__).parent.parent.parent / "workflows").glob("*.json")}
    assert set(names) == shipped and len(shipped) == 13
    for name in names:
        workflow = server.get(f"/api/workflow_templates/internvl-u/{name}.json")
        assert workflow["version"] == 0.4
        for node in workflow["nodes"]:
            if node["type"] not in {"MarkdownNote", "Note"}:
                ours = node["type"].startswith("InternVLU")
                assert node["properties"]["cnr_id"] == ("internvl-u" if ours else "comfy-core"), node
                assert node["properties"]["ver"]


def test_the_pack_starts_quickly_and_imports_nothing_heavy(server):
    log = server.log.read_text()
    line = next(line for line in log.splitlines() if "seconds: " in line and "internvl-u" in line)
    assert float(line.split("seconds")[0].split()[-1]) <= 0.3
    assert "IMPORT FAILED" not in log
