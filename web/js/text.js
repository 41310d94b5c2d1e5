// Texts of our scripts in the language that ComfyUI is set to, out of the pack's locales folder.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

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

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("InternVLU_")) return;
    const { onNodeCreated } = nodeType.prototype;
    nodeType.prototype.onNodeCreated = function (...args) {
      onNodeCreated?.apply(this, args);
      this.widgets?.forEach(translateWidget);
    };
  },
});
