// A workflow that was saved before InternVL-U Decode had `size` keeps what it gave: the pixels as drawn. New nodes begin
// with the better default of the schema.
import { app } from "../../../scripts/app.js";

const NODE = "InternVLU_DecodeLatent";
const WIDGET = "size";
const BEFORE = "as drawn"; // nodes/decode.py

app.registerExtension({
  name: "internvlu.decode",

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== NODE) return;
    const { onConfigure } = nodeType.prototype;
    nodeType.prototype.onConfigure = function (info, ...rest) {
      onConfigure?.call(this, info, ...rest);
      const index = this.widgets?.findIndex((widget) => widget.name === WIDGET) ?? -1;
      const saved = info?.widgets_values;
      if (index >= 0 && Array.isArray(saved) && saved.length <= index) this.widgets[index].value = BEFORE;
    };
  },
});
