// How the nodes look and what they send: colours of our types, names of widgets, a title that fits, a seed that matters
// only where chance is asked for, scales of older workflows, and notes that are of this run.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { text } from "./text.js";

const PREFIX = "InternVLU_";
const COLOURS = { INTERNVL_U_MLLM: "#f0a04b", INTERNVL_U_HISTORY: "#8fd3a8" };
const TEXT_NODES = new Set(["InternVLU_WriteThought", "InternVLU_AnswerQuestion"]);
const NARROWEST = { InternVLU_SelectSampler: 270 };
const NOTE = "$$node-text-preview"; // the page's name for a sentence below a node

const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name);
const rootGraph = () => app.rootGraph ?? app.graph;

function colour() {
  const canvas = app.canvas?.default_connection_color_byType;
  const links = (globalThis.LGraphCanvas ?? app.canvas?.constructor)?.link_type_colors;
  for (const [type, value] of Object.entries(COLOURS)) {
    if (canvas) canvas[type] ||= value;
    if (links) links[type] ||= value;
  }
}

// Nodes 2.0 takes colours from the page's style; a palette that has some of its own for our types wins.
function addStyle() {
  const style = document.createElement("style");
  const rules = Object.entries(COLOURS).map(([type, value]) => `--color-datatype-${type}: ${value};`);
  style.textContent = `:root { ${rules.join(" ")} }`;
  document.head.append(style);
}

// Before 1.4x the page does not take the names that a node gives to its widgets.
function nameWidgets(node, nodeData) {
  const inputs = { ...nodeData.input?.required, ...nodeData.input?.optional };
  for (const widget of node.widgets ?? []) {
    const name = inputs[widget.name]?.[1]?.display_name;
    if (name && (widget.label ?? widget.name) === widget.name) widget.label = text(name);
  }
}

// With greedy or beams the seed changes nothing, so a number that has moved on must not make the text be written again.
function fixSeed(node) {
  const seed = widgetOf(node, "seed");
  const how = widgetOf(node, "how");
  const isLinked = () => node.inputs?.some((input) => input.widget?.name === "how" && input.link != null);
  if (!seed || !how) return;
  seed.serializeValue = () => (how.value === "sampling" || isLinked() ? seed.value : 0);
  const control = seed.linkedWidgets?.find((widget) => widget.name === "control_after_generate");
  if (control) control.value = "fixed";
}

// A workflow from before there was this choice draws with the numbers that it was saved with.
function keepScales(node, saved) {
  const scales = widgetOf(node, "scales");
  const values = saved?.widgets_values;
  if (!scales || !Array.isArray(values)) return;
  const kept = node.widgets.filter((widget) => widget.serialize !== false);
  if (values.length > kept.indexOf(scales)) return;
  scales.value = "as typed";
  scales.callback?.(scales.value, app.canvas, node);
}

// A node that runs again may have nothing to say this time. The page would leave what it has said.
function removeNote({ detail }) {
  const ids = String(detail?.node ?? detail ?? "").split(":");
  const graph = ids.slice(0, -1).reduce((graph, id) => graph?.getNodeById(id)?.subgraph, rootGraph());
  const node = graph?.getNodeById(ids.at(-1));
  const note = node?.type?.startsWith(PREFIX) && widgetOf(node, NOTE);
  if (note) node.removeWidget?.(note);
}

app.registerExtension({
  name: "internvlu.nodes",

  setup() {
    addStyle();
    colour();
    app.ui?.settings?.addEventListener?.("Comfy.ColorPalette.change", () => setTimeout(colour, 300));
    api.addEventListener("executing", removeNote);
  },

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith(PREFIX)) return;
    const { onNodeCreated, onConfigure } = nodeType.prototype;
    nodeType.prototype.onNodeCreated = function (...args) {
      onNodeCreated?.apply(this, args);
      nameWidgets(this, nodeData);
      if (TEXT_NODES.has(nodeData.name)) fixSeed(this);
    };
    nodeType.prototype.onConfigure = function (...args) {
      onConfigure?.apply(this, args);
      keepScales(this, args[0]);
    };
  },

  nodeCreated(node) {
    const narrowest = NARROWEST[node.comfyClass ?? node.type];
    if (narrowest && node.size[0] < narrowest) node.setSize([narrowest, node.size[1]]);
    if (node.comfyClass?.startsWith(PREFIX)) nameWidgets(node, node.constructor.nodeData ?? {});
  },

  afterConfigureGraph: colour,
});
