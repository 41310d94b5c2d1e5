"""Load InternVL-U LoRA in a real browser: bypassed, it hands on what it was given."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

TIMEOUT = 30_000  # ms
BUILD = """modes => {
  app.graph.clear();
  const add = type => app.graph.add(LiteGraph.createNode(type)) ?? app.graph.nodes.at(-1);
  const link = (from, output, to, input) => from.connect(from.findOutputSlot(output), to, to.findInputSlot(input));
  const set = (node, name, value) => node.widgets.find(widget => widget.name === name).value = value;
  const load = add('InternVLU_LoadModel'), encode = add('InternVLU_EncodePrompt');
  const sample = add('InternVLU_SampleLatent'), decode = add('InternVLU_DecodeLatent'), save = add('SaveImage');
  set(load, 'model_name', 'tiny'); set(encode, 'prompt', 'a cat'); set(sample, 'steps', 2); set(sample, 'seed', 1);
  let last = load;
  for (const mode of modes) {
    const lora = add('InternVLU_LoadLoRA');
    set(lora, 'lora_name', 'strong.safetensors');
    link(last, 'MODEL', lora, 'model'); link(last, 'MLLM', lora, 'mllm');
    lora.mode = mode;
    last = lora;
  }
  link(last, 'MODEL', sample, 'model'); link(last, 'MLLM', encode, 'mllm');
  for (const name of ['positive', 'negative']) link(encode, name, sample, name);
  link(encode, 'latent', sample, 'latent_image');
  link(sample, 'LATENT', decode, 'samples'); link(load, 'VAE', decode, 'vae'); link(decode, 'IMAGE', save, 'images');
  return app.graphToPrompt().then(made => JSON.stringify(made.output));
}"""
NODE = "app.graph.nodes.find(node => node.type === 'InternVLU_LoadLoRA')"
ACTIVE, BYPASSED = 0, 4


@pytest.fixture(scope="module")
def page(browser, server):
    layer = "diffusion_model.transformer_blocks.0.attn.to_v"
    change = {f"{layer}.lora_A.weight": torch.randn(4, 64), f"{layer}.lora_B.weight": torch.randn(64, 4)}
    change |= {name.replace(layer, "model.layers.0.self_attn.q_proj"): one.clone() for name, one in change.items()}
    save_file(change, server.base / "models" / "loras" / "strong.safetensors")
    page = browser.new_page(viewport={"width": 1600, "height": 900})
    page.set_default_timeout(TIMEOUT)
    page.request.post(f"{server.url}/api/settings", data={"Comfy.TutorialCompleted": True})
    page.goto(server.url)
    page.wait_for_function("!!window.app?.extensionManager?.workflow?.activeWorkflow")
    page.wait_for_function("!!LiteGraph.registered_node_types.InternVLU_LoadLoRA")
    return page


def test_a_bypassed_node_hands_on_both_halves(page, server):
    def prompt(*modes):
        return json.loads(page.evaluate(BUILD, list(modes)))

    def picture(nodes):
        return server.picture(server.run(nodes), server.find(nodes, "SaveImage"))

    bypassed = prompt(BYPASSED, BYPASSED)
    load = server.find(bypassed, "InternVLU_LoadModel")
    assert bypassed[server.find(bypassed, "InternVLU_SampleLatent")]["inputs"]["model"] == [load, 0]
    assert bypassed[server.find(bypassed, "InternVLU_EncodePrompt")]["inputs"]["mllm"] == [load, 1]
    assert "InternVLU_LoadLoRA" not in {node["class_type"] for node in bypassed.values()}
    plain, once = picture(prompt()), picture(prompt(ACTIVE))
    assert (picture(bypassed) == plain).all() and (once != plain).any()
    assert (picture(prompt(BYPASSED, ACTIVE)) == once).all() and (picture(prompt(ACTIVE, BYPASSED)) == once).all()
    assert (picture(prompt(ACTIVE, ACTIVE)) != once).any()


def test_what_fits_appears_below_the_node(page):
    page.evaluate(BUILD, [ACTIVE])
    page.evaluate(f"{NODE}.widgets.find(widget => widget.name === 'strength_model').value = 0.31")
    page.evaluate("app.extensionManager.command.execute('Comfy.QueuePrompt')")
    page.wait_for_function(f"{NODE}.widgets.some(widget => `${{widget.value}}`.includes('all 4 keys fit'))")
    assert "all 4 keys fit" not in page.evaluate("app.graphToPrompt().then(made => JSON.stringify(made.output))")
