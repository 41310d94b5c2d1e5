// Texts of our scripts in the language that ComfyUI is set to, out of the pack's locales folder.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const OURS = "InternVLU_";
const SECTION = "internvlu"; // tools/locales.py

let all = null;

// Returns the English text in the user's language; `{0}`, `{1}` in it become the values.
export function text(english, ...values) {
  const language = app.extensionManager?.setting?.get?.("Comfy.Locale") ?? "en";
  const translated = all?.[language]?.[SECTION]?.[english] ?? english;
  return values.reduce((told, value, i) => told.replaceAll(`{${i}}`, String(value)), translated);
}

// What Python says with values in it; its notes below the nodes stay as they are.
const OF_PYTHON = [
  [/^download InternVL-U \((.+)\) from (.+) to (.+)$/, (...values) => text("download InternVL-U ({0}) from {1} to {2}", ...values)],
  [/^no model found$/, () => text("no model found")],
  [/^nano InternVL-U \(in the box/, () => text("nano InternVL-U (in the box: flat shapes, 64 x 64 pixels)")],
  [/^reads the prompt \.\.\.$/, () => text("reads the prompt ...")],
  [/^(\d+) of at most (\d+) tokens$/, (...values) => text("{0} of at most {1} tokens", ...values)],
  [
    /^(\d+) of at most (\d+) tokens, (\S+) a second, at most (.+) left$/,
    (...values) => text("{0} of at most {1} tokens, {2} a second, at most {3} left", ...values),
  ],
  [
    /^the text was cut after (\d+) tokens: raise (\w+) for all of it$/,
    (tokens, limit) => text("the text was cut after {0} tokens: raise {1} for all of it", tokens, text(limit)),
  ],
];

// Returns a text of Python's in the user's language.
export function ofPython(english) {
  for (const [pattern, translate] of OF_PYTHON) {
    const found = english.match(pattern);
    if (found) return translate(...found.slice(1));
  }
  return text(english);
}

// The page of ComfyUI 0.3.75 fetches its own language after the packs' texts, in their place; newer ones keep both. Ours
// are put in here. Where the page has translated a text itself, this is the same one.
const plain = (escaped) => escaped?.replace(/\{'(.)'\}/g, "$1");

function definition(name) {
  const language = app.extensionManager?.setting?.get?.("Comfy.Locale") ?? "en";
  return all?.[language]?.nodeDefs?.[name];
}

function translateDefinition(nodeData) {
  const known = definition(nodeData.name);
  if (!known) return;
  nodeData.display_name = plain(known.display_name) ?? nodeData.display_name;
  nodeData.description = plain(known.description) ?? nodeData.description;
  for (const [name, input] of Object.entries({ ...nodeData.input?.required, ...nodeData.input?.optional })) {
    const tooltip = plain(known.inputs?.[name]?.tooltip);
    if (tooltip && input[1]) input[1].tooltip = tooltip;
  }
  nodeData.output_tooltips = nodeData.output_tooltips?.map((told, i) => plain(known.outputs?.[i]?.tooltip) ?? told);
}

function nameSlots(node, known) {
  for (const widget of node.widgets ?? []) {
    const name = plain(known.inputs?.[widget.name]?.name);
    if (name && (widget.label ?? widget.name) === widget.name) widget.label = name;
    const area = widget.element ?? widget.inputEl;
    if (name && area?.placeholder === widget.name) area.placeholder = name;
    const tooltip = plain(known.inputs?.[widget.name]?.tooltip);
    if (tooltip) widget.tooltip = tooltip;
  }
  for (const input of node.inputs ?? []) input.localized_name = plain(known.inputs?.[input.name]?.name) ?? input.localized_name;
  node.outputs?.forEach((output, i) => {
    output.localized_name = plain(known.outputs?.[i]?.name) ?? output.localized_name;
  });
}

function translateWidget(widget) {
  if (widget.type === "combo" && widget.options) widget.options.getOptionLabel ??= (value) => ofPython(String(value ?? ""));
  const area = widget.element ?? widget.inputEl;
  if (area?.placeholder) area.placeholder = text(area.placeholder);
}

app.registerExtension({
  name: "internvlu.text",

  async init() {
    try {
      all = await (await api.fetchApi("/i18n")).json();
    } catch {
      all = {}; // then all is English
    }
  },

  addCustomNodeDefs(definitions) {
    for (const [name, nodeData] of Object.entries(definitions)) if (name.startsWith(OURS)) translateDefinition(nodeData);
  },

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith(OURS)) return;
    translateDefinition(nodeData);
    const { onNodeCreated } = nodeType.prototype;
    nodeType.prototype.onNodeCreated = function (...args) {
      onNodeCreated?.apply(this, args);
      this.widgets?.forEach(translateWidget);
      const known = definition(nodeData.name);
      if (known) nameSlots(this, known);
    };
  },
});
