// A workflow that was saved with a download chosen in Load InternVL-U opens with the folder that the download makes:
// only who chooses the download downloads, not who opens another's workflow and runs it.
import { app } from "../../../scripts/app.js";

const NODE = "InternVLU_LoadModel";
const DOWNLOAD = "download InternVL-U"; // nodes/model_folders.py
const FOLDER = "InternVL-U";

function takeBackDownload(node) {
  const widget = node.widgets?.find((widget) => widget.name === "model_name");
  if (String(widget?.value).startsWith(DOWNLOAD)) widget.value = FOLDER;
}

app.registerExtension({
  name: "internvlu.load_model",

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== NODE) return;
    const { onConfigure } = nodeType.prototype;
    nodeType.prototype.onConfigure = function (...args) {
      onConfigure?.apply(this, args);
      takeBackDownload(this);
    };
  },
});
