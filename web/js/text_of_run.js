// Lets a picture carry the text of the run that drew it. A workflow is queued with the texts that the nodes show, which
// are those of earlier runs: a text stays in it only if it was written from the very inputs that are queued. The nodes put
// the new one into the queued workflow when they have written it (native/progress.py).
import { api } from "../../../scripts/api.js";

export const NODES = new Set(["InternVLU_WriteThought", "InternVLU_AnswerQuestion"]);
export const TEXT = "internvl_u_text";
export const CUT = "internvl_u_cut";
const KEY = "internvl_u_key";
const REMEMBERED = 50;

const textsByKey = new Map(); // the last texts, by the key of what they were written from
const keysByJob = new Map(); // the keys of the last jobs' nodes, by their paths

function put(map, key, value) {
  map.delete(key);
  map.set(key, value);
  if (map.size > REMEMBERED) map.delete(map.keys().next().value);
}

// Keeps a text on its node, with the key of what it was written from where that is known.
export function keepText(node, text, cut, key) {
  if (!key && node.properties[TEXT] === text) key = node.properties[KEY];
  Object.assign(node.properties, { [TEXT]: text, [CUT]: cut ?? "" });
  if (key) {
    node.properties[KEY] = key;
    put(textsByKey, key, { text, cut: cut ?? "" });
  } else delete node.properties[KEY];
}

export const keyOfJob = (job, path) => keysByJob.get(job)?.get(path);

// Returns a short key of a node and of all that it is made from.
function keyOf(prompt, path) {
  const found = new Map();
  const visit = (id) => {
    const node = prompt[id];
    if (!node || found.has(id)) return;
    const inputs = Object.entries(node.inputs ?? {}).sort(([a], [b]) => (a < b ? -1 : 1));
    found.set(id, [id, node.class_type, inputs]);
    for (const [, value] of inputs) if (Array.isArray(value)) visit(String(value[0]));
  };
  visit(path);
  let [high, low] = [0xdeadbeef, 0x41c6ce57]; // cyrb53
  for (const letter of JSON.stringify([...found.values()])) {
    high = Math.imul(high ^ letter.codePointAt(0), 2654435761);
    low = Math.imul(low ^ letter.codePointAt(0), 1597334677);
  }
  return (high >>> 0).toString(16).padStart(8, "0") + (low >>> 0).toString(16).padStart(8, "0");
}

function takeTexts(workflow, prompt) {
  const subgraphs = new Map((workflow?.definitions?.subgraphs ?? []).map((graph) => [graph.id, graph]));
  const keys = new Map();
  const visit = (nodes, prefix) => {
    for (const node of nodes ?? []) {
      const path = prefix + node.id;
      if (subgraphs.has(node.type)) visit(subgraphs.get(node.type).nodes, `${path}:`);
      if (!NODES.has(node.type)) continue;
      const properties = (node.properties ??= {});
      const key = prompt?.[path] && keyOf(prompt, path);
      const known = textsByKey.get(key);
      if (known) Object.assign(properties, { [TEXT]: known.text, [CUT]: known.cut });
      else if (!key || properties[KEY] !== key) [TEXT, CUT].forEach((name) => delete properties[name]);
      if (key) keys.set(path, (properties[KEY] = key));
    }
  };
  visit(workflow?.nodes, "");
  return keys;
}

const queuePrompt = api.queuePrompt;
api.queuePrompt = async function (number, data, ...rest) {
  let keys;
  try {
    keys = takeTexts(data?.workflow, data?.output);
  } catch (error) {
    console.warn("InternVL-U: the workflow is queued with the texts that its nodes show", error);
  }
  const answer = await queuePrompt.call(this, number, data, ...rest);
  if (keys && answer?.prompt_id) put(keysByJob, answer.prompt_id, keys);
  return answer;
};
