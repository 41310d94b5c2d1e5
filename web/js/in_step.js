// Keeps a ready choice and the numbers that it stands for in step: choosing one writes its numbers, typing another number
// makes the choice "custom". In Python the choice counts, so what the page shows is what is drawn.
import { app } from "../../../scripts/app.js";
import { text } from "./text.js";

const CUSTOM = "custom";
const PAIRS = {
  InternVLU_CreateLatent: {
    choice: "preset",
    numbers: { width: 1024, height: 1024 }, // with their defaults
    read: (choice) => choice.split(" x ").map(Number),
  },
  InternVLU_WriteThought: {
    choice: "budget",
    numbers: { max_new_tokens: 200 },
    read: (choice) => [Number(choice.split(": ")[1])],
  },
};

const nameOf = (widget) => widget.label ?? widget.name;
const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name);
const isLinked = (node, name) => node.inputs?.some((input) => input.widget?.name === name && input.link != null);

// Returns [widget, what the choice wants of it] for each number that differs from the choice; none for custom.
function differing(node, pair) {
  const choice = widgetOf(node, pair.choice);
  if (!choice || choice.value === CUSTOM || isLinked(node, pair.choice)) return [];
  const wanted = pair.read(String(choice.value));
  return Object.keys(pair.numbers)
    .map((name, i) => [widgetOf(node, name), wanted[i]])
    .filter(([widget, value]) => widget && value && widget.value !== value && !isLinked(node, widget.name));
}

// Nodes 2.0 shows a value that code has set only when it hears of it by the widget's callback.
function set(node, changes) {
  for (const [widget, value] of changes) widget.value = value;
  for (const [widget, value] of changes) widget.callback?.(value, app.canvas, node);
  node.setDirtyCanvas?.(true, true);
}

const takeChoice = (node, pair) => set(node, differing(node, pair));

function takeNumber(node, pair) {
  if (differing(node, pair).length) set(node, [[widgetOf(node, pair.choice), CUSTOM]]);
}

function onChange(widget, then) {
  const { callback } = widget;
  widget.callback = function (...args) {
    const result = callback?.apply(this, args);
    then();
    return result;
  };
}

// An older workflow may hold numbers that its choice has always overruled.
function tellWhatCounts(node, pair) {
  const overruled = differing(node, pair);
  const typed = overruled.filter(([widget]) => widget.value !== pair.numbers[widget.name]);
  const lost = overruled.map(([widget]) => `${nameOf(widget)} ${widget.value}`).join(", ");
  takeChoice(node, pair);
  if (!typed.length) return;
  const choice = widgetOf(node, pair.choice);
  const counted = `${nameOf(choice)} ${text(choice.value)}`;
  const detail = text("{0} counts, as before; {1} did not. The numbers now show it.", counted, lost);
  app.extensionManager?.toast?.add({ severity: "info", summary: node.title, detail, life: 15000 });
}

app.registerExtension({
  name: "internvlu.in_step",

  beforeRegisterNodeDef(nodeType, nodeData) {
    const pair = PAIRS[nodeData.name];
    if (!pair) return;
    const { onNodeCreated, onConfigure } = nodeType.prototype;
    nodeType.prototype.onNodeCreated = function (...args) {
      onNodeCreated?.apply(this, args);
      const choice = widgetOf(this, pair.choice);
      if (choice) onChange(choice, () => takeChoice(this, pair));
      for (const name of Object.keys(pair.numbers)) {
        const number = widgetOf(this, name);
        if (number) onChange(number, () => takeNumber(this, pair));
      }
    };
    nodeType.prototype.onConfigure = function (...args) {
      onConfigure?.apply(this, args);
      tellWhatCounts(this, pair);
    };
  },
});
