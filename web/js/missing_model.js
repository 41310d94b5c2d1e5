// Says on opening, once, that the model of Load InternVL-U is not there: how large it is, where it goes, with a button for
// each choice that helps. The node says it in a line. Choosing a download downloads nothing before the graph is run.
import { app } from "../../../scripts/app.js";
import { ofPython, text } from "./text.js";

const NODE = "InternVLU_LoadModel";
const WIDGET = "missing_model";
const NONE_FOUND = "no model found"; // nodes/model_folders.py, as what the choices begin with
const DOWNLOAD = /^download InternVL-U \((.+)\) from (.+) to (.+)$/;
const NANO = /^nano/i;
const MIN_HEIGHT = 54;
const OTHERS = 2; // the most buttons for models that are there

const LINE_STYLE = `box-sizing: border-box; width: 100%; height: 100%; padding: 4px 6px; overflow: auto; border-radius: 4px;
  border: 1px solid var(--warning-text, #e6b04c); background: var(--comfy-input-bg, #222); color: var(--input-text, #ddd);
  font: 11px/1.4 sans-serif;`;
const CARD_STYLE = `position: fixed; left: 50%; bottom: 84px; transform: translateX(-50%); z-index: 990; display: flex;
  flex-direction: column; gap: 8px; box-sizing: border-box; width: min(440px, 90vw); padding: 14px 16px; border-radius: 8px;
  border: 1px solid var(--warning-text, #e6b04c); background: var(--comfy-menu-bg, #262626); color: var(--input-text, #ddd);
  box-shadow: 0 4px 24px #0008; font: 13px/1.45 sans-serif;`;
const BUTTON_STYLE = `padding: 6px 10px; cursor: pointer; text-align: left; border-radius: 4px; font: inherit; color: inherit;
  border: 1px solid var(--border-color, #4e4e4e); background: var(--comfy-input-bg, #222);`;
const CLOSE_STYLE = `position: absolute; top: 6px; right: 8px; padding: 2px 8px; cursor: pointer; border: 0; font: inherit;
  color: inherit; background: transparent;`;

let card; // of the graph that is open
const closed = new Set(); // what a user has closed: an undo opens the graph again

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
  const chosen = name.match(DOWNLOAD);
  if (chosen) return downloads.includes(name) ? { chosen } : undefined;
  if (name !== NONE_FOUND && choices.some((choice) => withSlashes(choice) === withSlashes(name))) return;
  const nano = choices.filter((choice) => NANO.test(choice));
  const others = choices.filter((choice) => choice !== NONE_FOUND && ![...downloads, ...nano].includes(choice));
  return { name, downloads, nano, others };
}

function sentence({ name, downloads }) {
  const none = name === NONE_FOUND;
  const [, size, , place] = downloads[0]?.match(DOWNLOAD) ?? [];
  if (none && size) return text("No InternVL-U model is here yet. It has {0} and goes to {1}.", size, place);
  if (none) return text("No InternVL-U model is here yet. Choose one that is.");
  if (size) return text('The model "{0}" is not here. It has {1} and goes to {2}.', name, size, place);
  return text('The model "{0}" is not here. Choose one that is.', name);
}

function choose(choice) {
  for (const node of loaders().filter((node) => missing(node)?.name)) {
    const widget = nameWidget(node);
    widget.value = choice;
    widget.callback?.(choice, app.canvas, node);
    update(node);
  }
  card?.remove();
  app.extensionManager?.workflow?.activeWorkflow?.changeTracker?.checkState?.();
}

function button(name, choice) {
  const made = element("button", BUTTON_STYLE, { type: "button", textContent: name, title: choice });
  made.addEventListener("click", () => choose(choice));
  return made;
}

function makeCard(state, key) {
  const buttons = state.downloads.map((choice) => {
    const [, size, site] = choice.match(DOWNLOAD);
    return button(text("Download {0} from {1}", size, site), choice);
  });
  buttons.push(...state.nano.map((choice) => button(text("Try the {0}", ofPython(choice)), choice)));
  buttons.push(...state.others.slice(0, OTHERS).map((choice) => button(text("Take {0}", choice), choice)));
  const hint = state.downloads.length ? text("Nothing is downloaded before you press Run.") : "";
  const close = element("button", CLOSE_STYLE, { type: "button", textContent: "\u2715", ariaLabel: text("Close") });
  const made = element("div", CARD_STYLE, { className: "internvlu-missing", role: "alert" });
  made.append(
    element("div", "font-weight: 600; padding-right: 24px;", { textContent: text("InternVL-U: the model is missing") }),
    element("div", "", { textContent: sentence(state) }),
    ...buttons,
    element("div", "opacity: .7; font-size: 12px;", { textContent: hint, hidden: !hint }),
    close,
  );
  close.addEventListener("click", () => {
    closed.add(key);
    made.remove();
  });
  return made;
}

// What the node says: of a download that is chosen, what a run does.
function line(state) {
  if (!state.chosen) return sentence(state);
  const [, size, site, place] = state.chosen;
  return text("Run downloads {0} from {1} to {2}, then goes on with the graph.", size, site, place);
}

function update(node) {
  const state = missing(node);
  let widget = node.widgets?.find((widget) => widget.name === WIDGET);
  if (!state) {
    if (widget) node.removeWidget(widget);
    return;
  }
  if (!widget) {
    const box = element("div", LINE_STYLE, { className: "internvlu-missing-line" });
    widget = node.addDOMWidget?.(WIDGET, "internvlu_missing", box, { serialize: false, getMinHeight: () => MIN_HEIGHT });
    if (!widget) return;
    widget.serialize = false;
    const [width, height] = node.computeSize();
    node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  }
  widget.element.textContent = line(state);
}

function loaders(graph = app.rootGraph ?? app.graph) {
  const nodes = graph?.nodes ?? [];
  return nodes.flatMap((node) => (node.subgraph ? loaders(node.subgraph) : node.type === NODE ? [node] : []));
}

function tell() {
  card?.remove();
  const states = loaders().flatMap((node) => (update(node), missing(node) ?? []));
  const first = states.find((state) => state.name);
  const key = `${(app.rootGraph ?? app.graph)?.id} ${first?.name}`;
  if (!first || closed.has(key)) return;
  card = makeCard(first, key);
  document.body.append(card);
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
        if (card?.isConnected && !loaders().some((node) => missing(node)?.name)) card.remove();
        return result;
      };
      setTimeout(() => this.graph && update(this));
    };
  },

  afterConfigureGraph: tell,
  refreshComboInNodes: () => setTimeout(tell), // after R
});
