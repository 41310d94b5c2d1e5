"""ComfyUI's page in Chinese: what our nodes show."""

from __future__ import annotations

import pytest
from pack.tools import locales

from .test_text import BUILD, READY, SET_NODES_2

SHOWN = """() => {
  const think = app.graph.nodes.find(node => node.type === 'InternVLU_WriteThought');
  const widget = name => think.widgets.find(widget => widget.name === name);
  const box = widget('live_text').element;
  return {
    title: think.title,
    label: widget('seed').label,
    renamed: widget('how').label,
    tooltip: widget('how').tooltip,
    choice: widget('how').options.getOptionLabel('greedy'),
    value: widget('how').value,
    input: think.inputs.find(input => input.name === 'mllm').localized_name,
    output: think.outputs[0].localized_name,
    saved: think.outputs[0].name,
    placeholder: widget('prompt').element.placeholder,
    unnamed: widget('system_prompt').element.placeholder,
    empty: box.querySelector('textarea').placeholder,
    button: box.querySelector('button').textContent,
  };
}"""
ENCODE = """() => {
  const node = LiteGraph.createNode('InternVLU_EncodePrompt');
  return [node.title, node.widgets.find(widget => widget.name === 'prompt').tooltip];
}"""
PROMPT = "async () => JSON.stringify((await app.graphToPrompt()).output)"


@pytest.fixture(params=["zh", "zh-TW"])
def translated(request, browser, server):
    page = browser.new_page(viewport={"width": 1600, "height": 900})
    page.set_default_timeout(30_000)
    settings = {"Comfy.TutorialCompleted": True, "Comfy.Locale": request.param}
    page.request.post(f"{server.url}/api/settings", data=settings)
    page.goto(server.url)
    page.wait_for_function(READY)
    page.evaluate(BUILD)
    yield page, locales.translations(request.param)
    page.request.post(f"{server.url}/api/settings", data={"Comfy.Locale": "en"})
    page.close()


def test_title_labels_tooltips_choices_and_buttons_are_translated_and_the_job_is_not(translated):
    page, known = translated
    shown = page.evaluate(SHOWN)
    assert shown["title"] == known["InternVL-U Think"]
    assert shown["label"] == known["seed"]
    assert shown["renamed"] == known["decoding"]
    tooltip = next(text for text in known if text.startswith("How each token is chosen."))
    assert shown["tooltip"] == known[tooltip]
    assert (shown["choice"], shown["value"]) == (known["greedy"], "greedy")
    assert (shown["input"], shown["output"]) == (known["mllm"], known["thought"])
    assert shown["saved"] == "thought"
    assert shown["placeholder"] == known["what to draw, or what to change"]
    assert shown["unnamed"] in {known["system_prompt"], ""}  # newer pages write the label above it
    assert (shown["empty"], shown["button"]) == (known["The text appears here."], known["Copy"])
    job = page.evaluate(PROMPT)
    assert '"how":"greedy"' in job and known["greedy"] not in job


def test_the_characters_that_the_translation_library_reads_come_out_as_they_are(translated):
    page, known = translated
    english = next(text for text in known if "{a|b}" in text)
    title, tooltip = page.evaluate(ENCODE)
    assert title == known["InternVL-U Encode"]
    assert tooltip == known[english] and "{a|b}" in tooltip and "<img>" in tooltip


def test_sentences_of_python_are_translated_with_their_values(translated):
    page, known = translated
    said = page.evaluate(
        """async () => {
          const scripts = await app.api.getExtensions();
          const { ofPython } = await import(app.api.fileURL(scripts.find(name => name.endsWith('/js/text.js'))));
          return [
            ofPython('51 of at most 200 tokens, 5 a second, at most 30 s left'),
            ofPython('the text was cut after 200 tokens: raise max_new_tokens for all of it'),
            ofPython('something else'),
          ];
        }"""
    )
    rate = known["{0} of at most {1} tokens, {2} a second, at most {3} left"]
    cut = known["the text was cut after {0} tokens: raise {1} for all of it"]
    assert said == [
        rate.format(51, 200, 5, "30 s"),
        cut.format(200, known["max_new_tokens"]),
        "something else",
    ]


@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "nodes 2.0"])
def test_a_graph_in_chinese_is_shown(translated, nodes_2):
    page, known = translated
    page.evaluate(SET_NODES_2, nodes_2)
    try:
        page.evaluate("app.canvas.ds.reset()")
        page.get_by_placeholder(known["The text appears here."]).first.wait_for()
        if nodes_2:
            page.get_by_text(known["InternVL-U Think"]).first.wait_for()
    finally:
        page.evaluate(SET_NODES_2, False)
