// Puts the pictures that the pack's workflows load into ComfyUI's input folder, when a workflow that names one is opened
// and it is not there yet. Nothing else is written, nothing is overwritten, and a message says what came.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { text } from "./text.js";

const FOLDER = new URL("../pictures/", import.meta.url);
const PICTURES = new Set([
  "internvl_u_harbour.jpg",
  "internvl_u_harbour_evening.jpg",
  "internvl_u_cat.jpg",
  "internvl_u_cat_masked.png",
]);
const SERIES = "internvl_u_pictures"; // a folder of ComfyUI's input folder, for captions
const IN_SERIES = ["internvl_u_harbour.jpg", "internvl_u_harbour_evening.jpg", "internvl_u_cat.jpg"];

const allNodes = (graph) => [
  ...(graph?.nodes ?? []),
  ...(graph?.definitions?.subgraphs ?? []).flatMap((subgraph) => subgraph.nodes ?? []),
];

// What the graph needs of ours: [file, folder in ComfyUI's input folder].
function needed(graph) {
  const files = new Map();
  for (const node of allNodes(graph)) {
    const value = Object.values(node.widgets_values ?? {})[0];
    if (node.type === "LoadImage" && PICTURES.has(value)) files.set(value, [value, ""]);
    if (node.type === "LoadImageDataSetFromFolder" && value === SERIES)
      for (const file of IN_SERIES) files.set(`${SERIES}/${file}`, [file, SERIES]);
  }
  return [...files.values()];
}

async function isThere(file, subfolder) {
  const query = new URLSearchParams({ filename: file, subfolder, type: "input" });
  return (await api.fetchApi(`/view?${query}`, { method: "HEAD", cache: "no-store" })).ok;
}

// Returns whether the file was put there.
async function put(file, subfolder) {
  if (await isThere(file, subfolder)) return false;
  const picture = await fetch(new URL(file, FOLDER));
  if (!picture.ok) throw new Error(`${picture.status} for ${picture.url}`);
  const body = new FormData();
  body.append("image", new File([await picture.blob()], file));
  body.append("subfolder", subfolder);
  const answer = await api.fetchApi("/upload/image", { method: "POST", body });
  if (!answer.ok) throw new Error(`${answer.status} from ComfyUI for the upload of ${file}`);
  return true;
}

// Makes a value one of a list that the page has fetched before, for nodes that are made from now on.
function offer(type, input, value) {
  const given = globalThis.LiteGraph?.registered_node_types?.[type]?.nodeData?.input?.required?.[input];
  const list = Array.isArray(given?.[0]) ? given[0] : given?.[1]?.options;
  if (list && !list.includes(value)) list.push(value);
}

async function provide(graph) {
  const came = [];
  for (const [file, subfolder] of needed(graph)) {
    if (await put(file, subfolder)) came.push(subfolder ? `${subfolder}/${file}` : file);
    if (subfolder) offer("LoadImageDataSetFromFolder", "folder", subfolder);
    else offer("LoadImage", "image", file);
  }
  if (came.length)
    app.extensionManager?.toast?.add({
      severity: "info",
      summary: text("Example pictures of InternVL-U"),
      detail: text("Copied into ComfyUI's input folder for this workflow: {0}", came.join(", ")),
      life: 6000,
    });
}

app.registerExtension({
  name: "internvlu.example_pictures",
  async beforeConfigureGraph(graph) {
    try {
      await provide(graph);
    } catch (error) {
      console.warn("internvl-u: no example picture put into the input folder:", error); // the graph opens all the same
    }
  },
});
