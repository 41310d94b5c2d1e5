"""What covers what in the page: nodes with all that they show, and wires."""

from __future__ import annotations

# Boxes in the graph's units: [id, title, left, top, right, bottom]. Nodes 2.0 are elements of the page.
BOXES = """() => {
  const {scale, offset} = app.canvas.ds, area = app.canvas.canvas.getBoundingClientRect();
  return app.graph.nodes.map(node => {
    const element = LiteGraph.vueNodesMode && document.querySelector(`[data-node-id="${node.id}"]`);
    if (element) {
      const box = element.getBoundingClientRect();
      const [left, top] = [(box.left - area.left) / scale - offset[0], (box.top - area.top) / scale - offset[1]];
      return [node.id, node.title, left, top, left + box.width / scale, top + box.height / scale];
    }
    return [node.id, node.title, node.pos[0], node.pos[1] - 30, node.pos[0] + node.size[0], node.pos[1] + node.size[1]];
  });
}"""
# [title of the node that is crossed, from, to] for each wire that runs behind a node which is not one of its ends.
CROSSED = """(boxes) => {
  const left = Math.min(...boxes.map(box => box[2])) - 50, top = Math.min(...boxes.map(box => box[3])) - 200;
  const size = [Math.max(...boxes.map(box => box[4])) - left, Math.max(...boxes.map(box => box[5])) - top];
  const canvas = Object.assign(document.createElement('canvas'), {width: size[0] / 2, height: (size[1] + 300) / 2});
  const context = canvas.getContext('2d', {willReadFrequently: true});
  const links = [...(app.graph.links.values?.() ?? Object.values(app.graph.links))];
  const found = [];
  for (const link of links) {
    const parts = [link];
    for (let id = link.parentId; id != null; id = app.graph.reroutes.get(id)?.parentId)
      parts.push(app.graph.reroutes.get(id));
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.setTransform(0.5, 0, 0, 0.5, -left / 2, -top / 2);
    context.lineWidth = 2;
    for (const part of parts) {
      if (!part?.path) throw new Error(`link ${link.id} was not drawn`);
      context.stroke(part.path);
    }
    for (const box of boxes) {
      if (box[0] === link.origin_id || box[0] === link.target_id) continue;
      const place = [box[2] - left + 4, box[3] - top + 4, box[4] - box[2] - 8, box[5] - box[3] - 8];
      const seen = context.getImageData(...place.map(value => Math.round(value / 2))).data;
      if (seen.some((value, i) => i % 4 === 3 && value > 60)) found.push([box[1], link.origin_id, link.target_id]);
    }
  }
  return found;
}"""
# Brings the whole graph onto the canvas: what lies outside is not drawn.
FIT = """() => {
  const bounds = app.graph.nodes.map(node => [...node.pos, node.pos[0] + node.size[0], node.pos[1] + node.size[1]]);
  const [right, bottom] = [2, 3].map(i => Math.max(...bounds.map(one => one[i])) + 300);
  const ds = app.canvas.ds, area = app.canvas.canvas.getBoundingClientRect();
  ds.scale = Math.min(ds.scale, area.width / (right + 100), area.height / (bottom + 100));
  ds.offset = [100, 100];
}"""
# True when each wire has a path. The page draws some frames after a graph is there; Nodes 2.0 take longer.
DRAWN = """() => {
  app.canvas.setDirty(true, true);
  return [...app.graph.links.values()].every(link => link.path);
}"""
GROUPS = "() => app.graph.groups.map(group => [group.title, ...group.pos, ...group.size])"


def boxes(page) -> list[list]:
    """Returns [id, title, left, top, right, bottom] of each node in the page, in the graph's units."""
    page.wait_for_timeout(300)
    return page.evaluate(BOXES)


def overlaps(given: list[list]) -> list[tuple]:
    """Returns (title, other title, width, height) of each pair of nodes that cover each other by more than 2 units."""
    found = []
    for number, (_, title, left, top, right, bottom) in enumerate(given):
        for _, other, left2, top2, right2, bottom2 in given[number + 1 :]:
            width, height = min(right, right2) - max(left, left2), min(bottom, bottom2) - max(top, top2)
            if width > 2 and height > 2:
                found.append((title, other, round(width), round(height)))
    return found


def crossed(page, given: list[list]) -> list:
    """Returns the wires that run behind nodes."""
    page.evaluate("app.canvas.setDirty(true, true)")
    page.wait_for_timeout(200)
    return page.evaluate(CROSSED, given)


def outside(page, given: list[list]) -> list[tuple]:
    """Returns (title of the node, title of the group) where a node that starts in a group reaches beyond it."""
    found = []
    for title, x, y, width, height in page.evaluate(GROUPS):
        for _, node, left, top, right, bottom in given:
            if x <= left < x + width and y <= top < y + height:
                if right > x + width + 2 or bottom > y + height + 2:
                    found.append((node, title, round(right - x - width), round(bottom - y - height)))
    return found
