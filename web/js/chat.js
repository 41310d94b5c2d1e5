// Shows the conversation of InternVL-U Chat on the node. Its turns are the value of the hidden widget `conversation`, so
// they travel with the prompt, and tabs, reloads, undo, copies and saved workflows keep them. The page alone changes
// them: a run says which turns came to it, and the message leaves its field when they are there, not before.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { BORDER, element, isOpen, leaveRestToCanvas, rootGraph } from "./live_text.js";
import { ofPython, text } from "./text.js";

const NODE = "InternVLU_Chat";
const TEXT_EVENT = "internvl_u.text"; // both in native/progress.py
const CHAT_EVENT = "internvl_u.chat";
const WIDGET = "chat";
const MIN_HEIGHT = 300;
const NAMES = { user: "You", assistant: "InternVL-U" }; // internvl_u/chat.py

const BOX_STYLE = `position: relative; box-sizing: border-box; width: 100%; height: 100%; min-height: ${MIN_HEIGHT - 20}px;`;
// Out of the flow: a long conversation scrolls, and does not make the node of Nodes 2.0 longer.
const INNER_STYLE = `position: absolute; inset: 0; display: flex; flex-direction: column; box-sizing: border-box; ${BORDER}
  background: var(--comfy-input-bg, #222); color: var(--input-text, #ddd);
  font: max(12px, var(--comfy-textarea-font-size, 12px))/1.4 sans-serif;`;
const LIST_STYLE = `flex: 1; min-height: 0; overflow-y: auto; overscroll-behavior: contain; padding: 6px; display: flex;
  flex-direction: column; gap: 6px; user-select: text;`;
const GROUP_STYLE = "display: contents;";
const TURN_STYLE = `max-width: 88%; padding: 4px 8px; border-radius: 8px; overflow-wrap: anywhere; white-space: pre-wrap;`;
const SIDES = {
  user: "align-self: flex-end; background: var(--comfy-menu-bg, #353535);",
  assistant: "align-self: flex-start; border: 1px solid var(--border-color, #4e4e4e);",
};
const PICTURE_STYLE = "display: block; max-width: 100%; max-height: 256px; min-width: 96px; margin: 3px 0; border-radius: 4px; cursor: zoom-in;";
const THOUGHT_STYLE = "opacity: 0.75; font-style: italic;";
const HINT_STYLE = "margin: auto; opacity: 0.6; text-align: center;";
const ROW_STYLE = "display: flex; gap: 4px; align-items: center; padding: 4px 6px; border-bottom: 1px solid var(--border-color, #4e4e4e);";
const BUTTON_STYLE = `padding: 1px 8px; cursor: pointer; ${BORDER} background: var(--comfy-menu-bg, #353535); color: inherit;
  font: 11px/1.6 sans-serif;`;
const SMALL_STYLE = "display: block; margin: 2px 0 0 auto; padding: 0; border: 0; cursor: pointer; background: transparent; color: inherit; opacity: 0.55; font: 10px/1.4 sans-serif;";
const CUT_STYLE = "padding: 3px 6px; color: var(--warning-text, #e6b04c); font: 10px/1.5 sans-serif;";

const lives = new WeakMap(); // node -> what is being made: { words, picture }
const shown = new WeakMap(); // node -> the conversation as its box shows it
const cuts = new WeakMap(); // node -> what a limit has cut in the last run
const toldNodes = new Set(); // ids of the nodes that told their turns in the running job
const pendingByWorkflow = new Map(); // turns for workflows that are open in other tabs

const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name);

function parse(json) {
  try {
    const turns = JSON.parse(json || "{}").turns;
    return Array.isArray(turns) ? turns.filter((turn) => NAMES[turn?.role]) : [];
  } catch {
    return [];
  }
}

const turnsOf = (node) => parse(widgetOf(node, "conversation")?.value);

function setTurns(node, turns) {
  const widget = widgetOf(node, "conversation");
  widget.value = turns.length ? JSON.stringify({ turns }) : "";
  show(node);
  storeGraph();
}

function setMessage(node, words) {
  const widget = widgetOf(node, "message");
  if (widget) widget.value = words;
}

function addWidget(node) {
  const box = element("div", BOX_STYLE, { className: "internvlu-chat widget-expands" });
  const inner = element("div", INNER_STYLE, {});
  const list = element("div", LIST_STYLE, { className: "internvlu-turns" });
  const hint = element("div", HINT_STYLE, { textContent: text("Write a message and send it: the conversation appears here.") });
  list.append(element("div", GROUP_STYLE, {}), element("div", GROUP_STYLE, {}), hint);
  const cut = element("div", CUT_STYLE, { className: "internvlu-chat-cut", hidden: true });
  const row = element("div", ROW_STYLE, {});
  const button = (name, title, act) => {
    const made = element("button", BUTTON_STYLE, { type: "button", textContent: name, title });
    made.addEventListener("click", () => act(made));
    row.append(made);
  };
  button(text("Send"), text("Runs the workflow: your message is answered."), () => app.queuePrompt(0));
  row.append(element("span", "flex: 1", {}));
  button(text("Copy"), text("Copies the conversation as Markdown."), (made) => copy(node, made));
  const exported = text("Saves the conversation as a Markdown file; its pictures are in ComfyUI's output folder.");
  button(text("Export"), exported, () => save(node));
  button(text("Clear"), text("Begins a new conversation. Undo brings this one back."), () => setTurns(node, []));
  inner.append(row, list, cut);
  box.append(inner);
  leaveRestToCanvas(box);

  const widget = node.addDOMWidget?.(WIDGET, "internvlu_chat", box, { serialize: false, getMinHeight: () => MIN_HEIGHT });
  if (widget) widget.serialize = false;
  hide(widgetOf(node, "conversation"));
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width, 420), Math.max(node.size[1], height + 60)]);
  show(node);
}

// Kept in the workflow and in the prompt, not shown: the box shows what it says.
function hide(widget) {
  if (!widget) return;
  widget.hidden = true;
  if (widget.options) widget.options.hidden = true; // in place: where newer Nodes 2.0 look
  widget.computeSize = () => [0, -4];
}

function show(node) {
  const box = widgetOf(node, WIDGET)?.element;
  if (!box) return;
  const [, list, cut] = box.firstElementChild.children;
  const [old, live, hint] = list.children;
  const follow = list.scrollHeight - list.scrollTop - list.clientHeight < 40;
  const conversation = widgetOf(node, "conversation")?.value ?? "";
  if (shown.get(node) !== conversation) old.replaceChildren(...turnsOf(node).map((turn, i) => bubble(node, turn, i)));
  shown.set(node, conversation);
  live.replaceChildren(...(lives.has(node) ? liveBubbles(node) : []));
  hint.hidden = old.children.length + live.children.length > 0;
  cut.textContent = ofPython(cuts.get(node) ?? "");
  cut.hidden = !cut.textContent;
  if (follow) list.scrollTop = list.scrollHeight;
}

function liveBubbles(node) {
  const { words, picture } = lives.get(node);
  const made = bubble(node, { role: "assistant", text: picture ? words : words || "…" });
  if (picture) made.append(element("img", PICTURE_STYLE, { src: picture, alt: "" }));
  return [bubble(node, { role: "user", text: String(widgetOf(node, "message")?.value ?? "") }), made];
}

function setLive(node, change) {
  const before = lives.get(node) ?? { words: "" };
  if (change?.picture && before.picture) URL.revokeObjectURL(before.picture);
  if (change) lives.set(node, { ...before, ...change });
  else {
    if (before.picture) URL.revokeObjectURL(before.picture);
    lives.delete(node);
  }
  show(node);
}

function bubble(node, turn, index) {
  const made = element("div", TURN_STYLE + SIDES[turn.role], { className: `internvlu-turn ${turn.role}` });
  if (turn.thought) {
    const thought = element("details", THOUGHT_STYLE, {});
    thought.append(element("summary", "cursor: pointer", { textContent: text("Thought") }), document.createTextNode(turn.thought));
    made.append(thought);
  }
  if (turn.text) made.append(element("div", "", { textContent: turn.text }));
  for (const name of turn.pictures ?? []) made.append(picture(node, name));
  if (index !== undefined) made.append(branchButton(node, turn, index));
  return made;
}

function picture(node, name) {
  const source = api.apiURL(`/view?${viewed(name)}`);
  const made = element("img", PICTURE_STYLE, { src: source, alt: plainName(name), title: plainName(name), draggable: false });
  made.addEventListener("click", () => window.open(source, "_blank", "noopener"));
  made.addEventListener("load", () => {
    const list = made.closest(".internvlu-turns");
    if (list?.firstElementChild.lastElementChild?.contains(made)) list.scrollTop = list.scrollHeight;
  });
  return made;
}

// On what the user said: to say it anew, in other words. On what the model said: to go on from there.
function branchButton(node, turn, index) {
  const own = turn.role === "user";
  const name = own ? text("Say anew") : text("Branch from here");
  const title = own
    ? text("Takes the conversation back to before this message, to say it anew.")
    : text("Drops all that came after this.");
  const made = element("button", SMALL_STYLE, { type: "button", textContent: name, title });
  made.addEventListener("click", () => {
    if (own) setMessage(node, turn.text ?? "");
    setTurns(node, turnsOf(node).slice(0, own ? index : index + 1));
  });
  return made;
}

// "InternVL-U/chat/1f.png [output]" as the server's /view wants it.
function viewed(name) {
  const parts = plainName(name).split("/");
  const filename = parts.pop();
  const type = name.match(/ \[(\w+)\]$/)?.[1] ?? "input";
  return new URLSearchParams({ filename, subfolder: parts.join("/"), type });
}

const plainName = (name) => name.replace(/ \[(output|input|temp)\]$/, "");

// As History.to_markdown in internvl_u/chat.py has it.
function markdown(node) {
  const linked = (name) => plainName(name).replace(/[[\]<>\n\r]/g, "");
  const told = ({ role, text: words, thought, pictures = [] }) => [
    `**${NAMES[role]}**`,
    ...(thought ? [thought.split("\n").map((line) => `> ${line}`.trimEnd()).join("\n")] : []),
    ...(words ? [words] : []),
    ...pictures.map((name) => `![${linked(name)}](<${linked(name)}>)`),
  ];
  const parts = turnsOf(node).flatMap(told);
  return parts.length ? `${parts.join("\n\n")}\n` : "";
}

async function copy(node, button) {
  let done = true;
  try {
    await navigator.clipboard.writeText(markdown(node));
  } catch {
    // Browsers give no clipboard to pages that come over plain http from another machine.
    const area = element("textarea", "position: fixed; opacity: 0", { value: markdown(node) });
    document.body.append(area);
    area.select();
    done = document.execCommand("copy");
    area.remove();
  }
  button.textContent = done ? text("Copied") : text("No clipboard");
  setTimeout(() => (button.textContent = text("Copy")), 1500);
}

function save(node) {
  const href = URL.createObjectURL(new Blob([markdown(node)], { type: "text/markdown" }));
  element("a", "", { href, download: "conversation.md" }).click();
  setTimeout(() => URL.revokeObjectURL(href), 1000);
}

// Turns that can scroll take the wheel, before Nodes 2.0 zooms with it.
function takeWheel(event) {
  const list = event.target.closest?.(".internvlu-turns");
  if (list?.scrollHeight > list?.clientHeight && !event.ctrlKey && !event.metaKey) event.stopPropagation();
}

function nodeAt(path) {
  // In subgraphs an id is a path: 5:12 is node 12 in the subgraph of node 5.
  const ids = String(path).split(":");
  const graph = ids.slice(0, -1).reduce((graph, id) => graph?.getNodeById(id)?.subgraph, rootGraph());
  const node = graph?.getNodeById(ids.at(-1));
  return node?.type === NODE ? node : undefined;
}

function take(path, { before, turns, cut }) {
  const node = nodeAt(path);
  if (!node) return;
  setLive(node, null);
  const [kept, added] = [turnsOf(node), parse(turns)];
  // Told twice, or the same message run twice from the same place: the first answer stays.
  const known = added.length && JSON.stringify(kept[before]) === JSON.stringify(added[0]);
  if (!added.length || known) return;
  cuts.set(node, cut);
  if (widgetOf(node, "message")?.value === added[0].text) setMessage(node, ""); // not what was typed meanwhile
  setTurns(node, [...kept, ...added]);
}

function onText({ detail }) {
  const node = isOpen(detail.workflow) && nodeAt(detail.node);
  if (node) setLive(node, { words: String(detail.text) });
}

// The picture while it is drawn: in its turn, not below the box. Nodes 2.0 has a place of its own for it.
function onPreview({ detail }) {
  const node = !globalThis.LiteGraph?.vueNodesMode && nodeAt(detail.displayNodeId ?? detail.nodeId);
  if (node) setLive(node, { picture: URL.createObjectURL(detail.blob) });
}

function onTurns({ detail }) {
  toldNodes.add(String(detail.node));
  if (isOpen(detail.workflow)) take(detail.node, detail);
  else pendingByWorkflow.set(`${detail.workflow} ${detail.node}`, detail);
}

// A result from the cache was not told while it ran; any other one is known already.
function takeResult({ detail }) {
  const path = String(detail.display_node ?? detail.node);
  const chat = detail.output?.chat?.[0];
  if (chat && !toldNodes.has(path)) take(path, chat);
}

// A job that ended otherwise leaves the conversation and the message as they were.
function forgetLive() {
  const forget = (graph) => {
    for (const node of graph?.nodes ?? []) {
      if (node.subgraph) forget(node.subgraph);
      if (node.type === NODE && lives.has(node)) setLive(node, null);
    }
  };
  forget(rootGraph());
}

// The frontend keeps a changed graph for the next page load, but looks for changes only after user actions.
function storeGraph() {
  const tracker = app.extensionManager?.workflow?.activeWorkflow?.changeTracker;
  if (tracker?.captureCanvasState) tracker.captureCanvasState();
  else tracker?.checkState?.();
}

app.registerExtension({
  name: "internvlu.chat",

  setup() {
    document.addEventListener("wheel", takeWheel, { capture: true, passive: true });
    api.addEventListener("execution_start", () => toldNodes.clear());
    api.addEventListener(TEXT_EVENT, onText);
    api.addEventListener("b_preview_with_metadata", onPreview);
    api.addEventListener(CHAT_EVENT, onTurns);
    api.addEventListener("executed", takeResult);
    for (const end of ["execution_success", "execution_interrupted", "execution_error"])
      api.addEventListener(end, forgetLive);
  },

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== NODE) return;
    const { onNodeCreated, onConfigure } = nodeType.prototype;
    nodeType.prototype.onDrawBackground = undefined; // which would put the preview below the box and leave it there
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
    for (const [key, detail] of pendingByWorkflow) {
      if (!isOpen(detail.workflow)) continue;
      pendingByWorkflow.delete(key);
      take(detail.node, detail);
    }
  },
});
