// Puts the pictures that the pack's workflows load, and the captions of those that they train on, into ComfyUI's input
// folder, when a workflow that names one is opened and it is not there yet. Nothing else is written, nothing is
// overwritten, and a message says what came.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { text } from "./text.js";

const FOLDER = new URL("../pictures/", import.meta.url);
const PICTURES = new Set([
  "internvl_u_harbour.jpg",
  "internvl_u_harbour_evening.jpg",
  "internvl_u_cat.jpg",
  "internvl_u_cat_masked.png",
  "internvl_u_shape.png",
]);
const SERIES = "internvl_u_pictures"; // a folder of ComfyUI's input folder, for captions
const CAPTIONED = "internvl_u_hearts"; // another one, for training: web/hearts
const HEARTS = new URL("../hearts/", import.meta.url);
const IN_SERIES = ["internvl_u_harbour.jpg", "internvl_u_harbour_evening.jpg", "internvl_u_cat.jpg"];

const allNodes = (graph) => [
  ...(graph?.nodes ?? []),
  ...(graph?.definitions?.subgraphs ?? []).flatMap((subgraph) => subgraph.nodes ?? []),
];

// The files of the pictures to train on: captions.json has a text for each picture.
async function captioned() {
  const captions = await (await read("captions.json", HEARTS)).json();
  return Object.entries(captions).flatMap(([file, caption]) => [
    [file, CAPTIONED, () => read(file, HEARTS).then((answer) => answer.blob())],
    [file.replace(/\.\w+$/, ".txt"), CAPTIONED, async () => caption],
  ]);
}

async function read(file, folder) {
  const answer = await fetch(new URL(file, folder));
  if (!answer.ok) throw new Error(`${answer.status} for ${answer.url}`);
  return answer;
}

// What the graph needs of ours: [file, folder in ComfyUI's input folder, what gives its content].
async function needed(graph) {
  const files = new Map();
  for (const node of allNodes(graph)) {
    const value = Object.values(node.widgets_values ?? {})[0];
    const add = (file, folder) =>
      files.set(`${folder}/${file}`, [file, folder, () => read(file, FOLDER).then((answer) => answer.blob())]);
    if (node.type === "LoadImage" && PICTURES.has(value)) add(value, "");
    if (node.type === "LoadImageDataSetFromFolder" && value === SERIES) for (const file of IN_SERIES) add(file, SERIES);
    if (node.type === "LoadImageTextDataSetFromFolder" && value === CAPTIONED)
      for (const one of await captioned()) files.set(`${CAPTIONED}/${one[0]}`, one);
  }
  return [...files.values()];
}

async function isThere(file, subfolder) {
  const query = new URLSearchParams({ filename: file, subfolder, type: "input" });
  return (await api.fetchApi(`/view?${query}`, { method: "HEAD", cache: "no-store" })).ok;
}

// Returns whether the file was put there.
async function put(file, subfolder, content) {
  if (await isThere(file, subfolder)) return false;
  const body = new FormData();
  body.append("image", new File([await content()], file));
  body.append("subfolder", subfolder);
  const answer = await api.fetchApi("/upload/image", { method: "POST", body });
  if (!answer.ok) throw new Error(`${answer.status} from ComfyUI for the upload of ${file}`);
  return true;
}

const shown = (file, subfolder) => (subfolder ? `${subfolder}/${file}` : file);

// Makes a value one of a list that the page has fetched before, for nodes that are made from now on.
function offer(type, input, value) {
  const given = globalThis.LiteGraph?.registered_node_types?.[type]?.nodeData?.input?.required?.[input];
  const list = Array.isArray(given?.[0]) ? given[0] : given?.[1]?.options;
  if (list && !list.includes(value)) list.push(value);
}

async function provide(graph) {
  const came = new Set();
  for (const [file, subfolder, content] of await needed(graph)) {
    if (await put(file, subfolder, content)) came.add(subfolder === CAPTIONED ? subfolder : shown(file, subfolder));
    const kind = subfolder === CAPTIONED ? "LoadImageTextDataSetFromFolder" : "LoadImageDataSetFromFolder";
    if (subfolder) offer(kind, "folder", subfolder);
    else offer("LoadImage", "image", file);
  }
  if (came.size)
    app.extensionManager?.toast?.add({
      severity: "info",
      summary: text("Example pictures of InternVL-U"),
      detail: text("Copied into ComfyUI's input folder for this workflow: {0}", [...came].join(", ")),
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
