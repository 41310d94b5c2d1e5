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

function translateWidget(widget) {
  if (widget.type === "combo" && widget.options) widget.options.getOptionLabel ??= (value) => text(String(value ?? ""));
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
