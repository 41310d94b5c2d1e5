// Says on opening, once, that the model of Load InternVL-U is not there: how large it is, where it goes, and on the node
// what to choose instead. Choosing a download downloads nothing before the graph is run.
import { app } from "../../../scripts/app.js";

const NODE = "InternVLU_LoadModel";
const WIDGET = "missing_model";
const NONE_FOUND = "no model found"; // nodes/model_folders.py, as what the choices begin with
const DOWNLOAD = /^download InternVL-U \((.+)\) from (.+) to (.+)$/;
const NANO = /^nano/i;
const MIN_HEIGHT = 150;
const OTHERS = 2; // the most buttons for models that are there

const BOX_STYLE = `display: flex; flex-direction: column; gap: 5px; box-sizing: border-box; width: 100%; height: 100%;
  padding: 8px; overflow: auto; border: 1px solid var(--warning-text, #e6b04c); border-radius: 4px;
  background: var(--comfy-input-bg, #222); color: var(--input-text, #ddd); font: 11px/1.4 sans-serif;`;
const BUTTON_STYLE = `padding: 3px 8px; cursor: pointer; text-align: left; border-radius: 4px; font: inherit; color: inherit;
  border: 1px solid var(--border-color, #4e4e4e); background: var(--comfy-menu-bg, #353535);`;

const element = (tag, style, fields) => Object.assign(document.createElement(tag), fields, { style });
const nameWidget = (node) => node.widgets?.find((widget) => widget.name === "model_name");
const withSlashes = (name) => String(name).replaceAll("\\", "/");

function choicesOf(widget) {
  const values = widget.options?.values;
  return (typeof values === "function" ? values() : values) ?? [];
}

// Returns what is missing and what may be chosen instead; nothing where the model is there, or comes over a link.
function missing(node) {
  const widget = nameWidget(node);
  if (!widget || node.inputs?.some((input) => input.widget?.name === widget.name && input.link != null)) return;
  const choices = choicesOf(widget).map(String);
  const downloads = choices.filter((choice) => DOWNLOAD.test(choice));
  const name = String(widget.value);
  const chosen = DOWNLOAD.exec(name);
  if (chosen) return downloads.includes(name) ? { chosen } : undefined;
  if (name !== NONE_FOUND && choices.some((choice) => withSlashes(choice) === withSlashes(name))) return;
  const nano = choices.filter((choice) => NANO.test(choice));
  const others = choices.filter((choice) => choice !== NONE_FOUND && ![...downloads, ...nano].includes(choice));
  return { name, downloads, nano, others };
}

function sentence({ name, downloads }) {
  const what = name === NONE_FOUND ? "No InternVL-U model is here yet." : `The model "${name}" is not here.`;
  const [, size, , place] = DOWNLOAD.exec(downloads[0]) ?? [];
  return size ? `${what} It has ${size} and goes to ${place}.` : `${what} Choose one that is.`;
}

function choose(node, choice) {
  const widget = nameWidget(node);
  widget.value = choice;
  widget.callback?.(choice, app.canvas, node);
  update(node);
  node.graph?.change?.();
  app.extensionManager?.workflow?.activeWorkflow?.changeTracker?.checkState?.();
}

function button(node, text, choice) {
  const made = element("button", BUTTON_STYLE, { type: "button", textContent: text, title: choice });
  made.addEventListener("pointerdown", (event) => event.stopPropagation());
  made.addEventListener("click", () => choose(node, choice));
  return made;
}

function fill(box, node, state) {
  if (state.chosen) {
    const [, size, site, place] = state.chosen;
    const text = `Run downloads ${size} from ${site} to ${place} and goes on with the graph. It shows its progress here.`;
    box.replaceChildren(element("div", "", { textContent: text }));
    return;
  }
  const buttons = state.downloads.map((choice) => {
    const [, size, site] = DOWNLOAD.exec(choice);
    return button(node, `Download ${size} from ${site}`, choice);
  });
  buttons.push(...state.nano.map((choice) => button(node, `Try the ${choice}`, choice)));
  buttons.push(...state.others.slice(0, OTHERS).map((choice) => button(node, `Take ${choice}`, choice)));
  const hint = state.downloads.length ? "Nothing is downloaded before you press Run." : "";
  box.replaceChildren(
    element("div", "", { textContent: sentence(state) }),
    ...buttons,
    element("div", "opacity: .7;", { textContent: hint, hidden: !hint }),
  );
}

function update(node) {
  const state = missing(node);
  let widget = node.widgets?.find((widget) => widget.name === WIDGET);
  if (!state) {
    if (widget) node.removeWidget(widget);
    return;
  }
  if (!widget) {
    const box = element("div", BOX_STYLE, { className: "internvlu-missing" });
    widget = node.addDOMWidget?.(WIDGET, "internvlu_missing", box, { serialize: false, getMinHeight: () => MIN_HEIGHT });
    if (!widget) return;
    widget.serialize = false;
    const [width, height] = node.computeSize();
    node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  }
  fill(widget.element, node, state);
}

function loaders(graph = app.rootGraph ?? app.graph) {
  const nodes = graph?.nodes ?? [];
  return nodes.flatMap((node) => (node.subgraph ? loaders(node.subgraph) : node.type === NODE ? [node] : []));
}

function tell() {
  const states = loaders().flatMap((node) => (update(node), missing(node) ?? []));
  const first = states.find((state) => !state.chosen);
  if (!first) return;
  const ways = [first.downloads.length && "download it", first.nano.length && "try the nano model"].filter(Boolean);
  const how = ways.length ? ` Load InternVL-U offers to ${ways.join(" or to ")}.` : "";
  const detail = sentence(first) + how;
  app.extensionManager?.toast?.add({ severity: "warn", summary: "InternVL-U: the model is missing", detail, life: 30000 });
}

app.registerExtension({
  name: "internvlu.missing_model",

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== NODE) return;
    const { onNodeCreated } = nodeType.prototype;
    nodeType.prototype.onNodeCreated = function (...args) {
      onNodeCreated?.apply(this, args);
      const widget = nameWidget(this);
      if (!widget) return;
      const { callback } = widget;
      widget.callback = (...values) => {
        const result = callback?.apply(widget, values);
        update(this);
        return result;
      };
      setTimeout(() => this.graph && update(this));
    };
  },

  afterConfigureGraph: tell,
  refreshComboInNodes: () => setTimeout(() => loaders().forEach(update)), // after R
});
