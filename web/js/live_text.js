// Shows the text of InternVL-U Think and InternVL-U Answer on the node: live while it is written, and afterwards.
// The text is a property of the node, so that tabs, reloads, copies and saved workflows keep it; so is the line below it
// that says that a limit has cut the text. While it is written, that line says how far it is and how fast it comes.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { ofPython, text } from "./text.js";
import { CUT, keepText, keyOfJob, NODES, TEXT } from "./text_of_run.js";

const EVENT = "internvl_u.text"; // native/progress.py
const WIDGET = "live_text";
const MIN_HEIGHT = 120;

export const BORDER = "border: 1px solid var(--border-color, #4e4e4e); border-radius: 4px;";
const BOX_STYLE = `position: relative; display: flex; flex-direction: column; box-sizing: border-box; width: 100%; height: 100%; ${BORDER}
  min-height: ${MIN_HEIGHT - 20}px; background: var(--comfy-input-bg, #222); color: var(--input-text, #ddd);`;
const AREA_STYLE = `flex: 1; min-height: 0; padding: 4px 6px 24px; border: 0; outline: 0; resize: none; color: inherit;
  background: transparent; overflow-wrap: anywhere; overscroll-behavior: contain;
  font: max(12px, var(--comfy-textarea-font-size, 12px))/1.4 sans-serif;`;
const LINE_STYLE = `padding: 3px 70px 5px 6px; font: 10px/1.5 sans-serif; border-top: 1px solid var(--border-color, #4e4e4e);`;
const CUT_STYLE = `${LINE_STYLE} color: var(--warning-text, #e6b04c);`;
const STATE_STYLE = `${LINE_STYLE} opacity: 0.75;`;
const BUTTON_STYLE = `position: absolute; right: 16px; bottom: 4px; padding: 1px 6px; cursor: pointer; ${BORDER}
  background: var(--comfy-menu-bg, #353535); color: inherit; font: 10px/1.5 sans-serif;`;

const liveNodes = new Set(); // ids of the nodes that wrote in the running job
const pendingByWorkflow = new Map(); // newest texts for workflows that are open in other tabs

export const element = (tag, style, fields) => Object.assign(document.createElement(tag), fields, { style });

function addWidget(node) {
  const box = element("div", BOX_STYLE, { className: "internvlu-text widget-expands" });
  const area = element("textarea", AREA_STYLE, { readOnly: true, placeholder: text("The text appears here.") });
  const cut = element("div", CUT_STYLE, { className: "internvlu-cut", hidden: true });
  const state = element("div", STATE_STYLE, { className: "internvlu-state", hidden: true });
  const button = element("button", BUTTON_STYLE, { type: "button", textContent: text("Copy"), hidden: true });
  button.addEventListener("click", () => copy(node, area, button));
  box.append(area, cut, button, state);
  leaveRestToCanvas(box);

  const options = { serialize: false, getMinHeight: () => MIN_HEIGHT };
  const widget = node.addDOMWidget?.(WIDGET, "internvlu_text", box, options);
  if (!widget) return;
  widget.serialize = false; // the option keeps it out of the prompt, this out of widgets_values
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
}

async function copy(node, area, button) {
  let done = true;
  try {
    await navigator.clipboard.writeText(node.properties[TEXT]);
  } catch {
    // Browsers give no clipboard to pages that come over plain http from another machine.
    area.focus();
    area.select();
    done = document.execCommand("copy");
  }
  button.textContent = done ? text("Copied") : text("Selected");
  setTimeout(() => (button.textContent = text("Copy")), 1500);
}

// Text that can scroll takes the wheel, before Nodes 2.0 zooms with it.
function takeWheel(event) {
  const area = event.target.closest?.(".internvlu-text")?.firstElementChild;
  if (area?.scrollHeight > area?.clientHeight && !event.ctrlKey && !event.metaKey) event.stopPropagation();
}

// The left button selects text, the middle one moves the canvas; Nodes 2.0 sees to the latter by itself.
export function leaveRestToCanvas(box) {
  box.addEventListener("wheel", (event) => {
    event.preventDefault();
    app.canvas?.processMouseWheel?.(event);
  });
  const handlers = { pointerdown: "processMouseDown", pointermove: "processMouseMove", pointerup: "processMouseUp" };
  for (const [type, handler] of Object.entries(handlers))
    box.addEventListener(type, (event) => {
      if (event.button !== 1 && !(event.buttons & 4)) event.stopPropagation();
      else if (!globalThis.LiteGraph?.vueNodesMode) app.canvas?.[handler]?.(event);
    });
}

const boxOf = (node) => node?.widgets?.find((widget) => widget.name === WIDGET)?.element;

function show(node) {
  const box = boxOf(node);
  if (!box) return;
  const [area, cut, button] = box.children;
  const [old, words] = [area.value, String(node.properties?.[TEXT] ?? "")];
  const follow = old && area.scrollHeight - area.scrollTop - area.clientHeight < 4;
  let same = 0;
  while (same < old.length && old[same] === words[same]) same++;
  area.setRangeText(words.slice(same), same, old.length, "preserve"); // keeps what the reader has selected
  if (follow) area.scrollTop = area.scrollHeight;
  button.hidden = !words;
  cut.textContent = ofPython(node.properties?.[CUT] ?? "");
  cut.hidden = !cut.textContent;
}

// Says what a node is doing, and dims the text of the run before until there is one of this run.
function showState(node, said, isOld) {
  const box = boxOf(node);
  if (!box) return;
  const [area, cut, , state] = box.children;
  area.style.opacity = isOld ? 0.4 : 1;
  state.textContent = ofPython(said ?? "");
  state.hidden = !said;
  cut.hidden = !!said || !cut.textContent;
}

export const rootGraph = () => app.rootGraph ?? app.graph;

// In subgraphs an id is a path: 5:12 is node 12 in the subgraph of node 5.
function nodeOf(path) {
  const ids = String(path).split(":");
  const graph = ids.slice(0, -1).reduce((graph, id) => graph?.getNodeById(id)?.subgraph, rootGraph());
  const node = graph?.getNodeById(ids.at(-1));
  return NODES.has(node?.type) ? node : undefined;
}

function write(path, words, cut, key, state) {
  const node = nodeOf(path);
  if (!node) return;
  if (typeof words === "string") {
    keepText(node, words, cut, key);
    show(node);
  }
  showState(node, state, typeof words !== "string");
}

export const isOpen = (workflow) => !workflow || workflow === rootGraph()?.id;

function onLiveText({ detail }) {
  liveNodes.add(detail.node);
  if (isOpen(detail.workflow)) write(detail.node, detail.text, detail.cut, detail.key, detail.state);
  else if (typeof detail.text === "string") pendingByWorkflow.set(`${detail.workflow} ${detail.node}`, detail);
}

// A result from the cache was not written live; any other one is known already.
function takeResult({ detail }) {
  const path = String(detail.display_node ?? detail.node);
  const words = detail.output?.text?.[0];
  if (liveNodes.has(path) || typeof words !== "string") return;
  write(path, words, detail.output.cut?.[0], keyOfJob(detail.prompt_id, path));
}

// A text that has been broken off stays as far as it came.
function endJob() {
  for (const path of liveNodes) showState(nodeOf(path));
  storeGraph();
}

// The frontend keeps a changed graph for the next page load, but looks for changes only after user actions.
function storeGraph() {
  const tracker = app.extensionManager?.workflow?.activeWorkflow?.changeTracker;
  if (!liveNodes.size) return;
  if (tracker?.captureCanvasState) tracker.captureCanvasState();
  else tracker?.checkState?.();
}

app.registerExtension({
  name: "internvlu.live_text",

  setup() {
    document.addEventListener("wheel", takeWheel, { capture: true, passive: true });
    api.addEventListener("execution_start", () => liveNodes.clear());
    api.addEventListener(EVENT, onLiveText);
    api.addEventListener("executed", takeResult);
    for (const end of ["execution_success", "execution_interrupted", "execution_error"])
      api.addEventListener(end, endJob);
  },

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!NODES.has(nodeData.name)) return;
    const { onNodeCreated, onConfigure } = nodeType.prototype;
    nodeType.prototype.onNodeCreated = function (...args) {
      onNodeCreated?.apply(this, args);
      addWidget(this);
    };
    nodeType.prototype.onConfigure = function (...args) {
      onConfigure?.apply(this, args);
      show(this);
    };
  },

  afterConfigureGraph() {
    for (const [key, { workflow, node, text: words, cut, key: madeFrom }] of pendingByWorkflow) {
      if (!isOpen(workflow)) continue;
      pendingByWorkflow.delete(key);
      write(node, words, cut, madeFrom);
    }
  },
});
