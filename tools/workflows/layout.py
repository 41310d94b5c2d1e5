"""How a graph is put into ComfyUI's page: steps side by side as titled groups, wires over or under nodes, not behind.

The steps of a workflow stand in columns, the note on the left. What a loader gives to steps further right passes above
the nodes between, which stand lower for that; all other wires that would pass behind a node get native
reroutes, through the nearest free lane.
"""

MARGIN = 30  # graph units, around a picture of the graph
TITLE = 30  # height of a node's title bar

# columns: [[[group title, [[[name, type, values], ...], ...]], ...], ...]: columns of groups of columns of nodes.
BUILD = """
async ({columns, links, note, sizes, titles, colours, first, green, brown, grouped, loaders, clear}) => {
  const TITLE = 30, HEADER = 46, PAD = 20, BOTTOM = 48, GAP = 36, INNER = 60, ROW = 68, FAR = 160;
  const NARROWEST = 225;  // of newer pages' Nodes 2.0, which would widen narrower ones
  const nodes = {};
  app.clean();  // the last graph's pictures would show on nodes with the same ids
  app.graph.clear();
  const frame = () => new Promise(requestAnimationFrame);
  const add = (name, type, values) => {
    const node = nodes[name] = LiteGraph.createNode(type);
    if (!node) throw new Error(`no node type ${type}`);
    app.graph.add(node);
    node.title = titles[name] ?? node.title;
    if (first.includes(name)) [node.color, node.bgcolor] = green;
    for (const [key, value] of Object.entries(values)) {
      const widget = node.widgets.find(w => w.name === key);
      if (!widget) throw new Error(`${type} has no widget ${key}: ${node.widgets.map(w => w.name)}`);
      widget.value = value;
    }
    return node;
  };
  const inside = columns.flat().flatMap(([, inner]) => inner);  // columns of nodes, from left to right
  for (const one of inside.flat()) add(...one);
  if (note) {
    const node = add('note', 'MarkdownNote', {});
    node.widgets[0].value = note;
    [node.color, node.bgcolor] = brown;
  }
  for (const [from, output, to, input] of links) {
    const out = nodes[from].findOutputSlot(output), into = nodes[to].findInputSlot(input);
    if (out < 0 || into < 0) throw new Error(`no link ${from}.${output} -> ${to}.${input}`);
    if (!nodes[from].connect(out, nodes[to], into)) throw new Error(`refused ${from}.${output} -> ${to}.${input}`);
  }
  for (let i = 0; i < 10; i++) await frame();  // real sizes are known after drawing

  const width = column =>
    Math.ceil(Math.max(...column.map(([n]) => sizes[n]?.[0] ?? nodes[n].computeSize()[0]), NARROWEST));
  for (const column of inside) for (const [name] of column)
    nodes[name].setSize([width(column), Math.ceil(Math.max(sizes[name]?.[1] ?? 0, nodes[name].computeSize()[1]))]);
  const drops = new Map(inside.map(column => [column[0][0], 0]));
  let boxes;
  const place = () => {
    boxes = [];
    let x = 0;
    if (note) {
      nodes.note.setSize(sizes.note);
      nodes.note.pos = [0, TITLE];
      x = sizes.note[0] + GAP;
    }
    for (const column of columns) {
      let top = 0, wide = 0;
      for (const [title, inner] of column) {
        let left = x + (grouped ? PAD : 0), bottom = 0;
        for (const names of inner) {
          let y = top + (grouped ? HEADER : 0) + TITLE + drops.get(names[0][0]);
          for (const [name] of names) {
            nodes[name].pos = [left, y];
            y += nodes[name].size[1] + ROW;
          }
          bottom = Math.max(bottom, y - ROW);
          left += width(names) + INNER;
        }
        const right = left - INNER + (grouped ? PAD : 0);
        boxes.push({title, x, y: top, width: right - x, height: bottom + BOTTOM - top});
        wide = Math.max(wide, right - x);
        top = bottom + BOTTOM + (grouped ? GAP - 8 : -8);
      }
      for (const box of boxes.slice(-column.length)) box.width = wide;
      x += wide + (grouped ? GAP : INNER);
    }
  };
  place();

  const at = (name, slot, isInput) => nodes[name].getConnectionPos(isInput, slot).map(Math.round);
  const wires = () => links.map(([from, output, to, input]) =>
    ({from, to, a: at(from, nodes[from].findOutputSlot(output), false),
      b: at(to, nodes[to].findInputSlot(input), true)}));
  const box = n => ({left: n.pos[0], top: n.pos[1] - TITLE, right: n.pos[0] + n.size[0], bottom: n.pos[1] + n.size[1]});
  const between = (wire, pad = 0) => Object.entries(nodes).filter(([name, n]) => name !== wire.from && name !== wire.to
    && box(n).right > wire.a[0] - pad && box(n).left < wire.b[0] + pad).map(([, n]) => box(n));
  if (grouped) for (let round = 0; round < 8; round++) {
    for (const wire of wires().filter(w => loaders.includes(w.from)))
      for (const names of inside.slice(1)) {
        const one = box(nodes[names[0][0]]), drop = drops.get(names[0][0]);
        if (names[0][0] === wire.to || one.left <= wire.a[0] || one.right >= wire.b[0]) continue;
        if (one.top > 350) continue;  // in a lower step
        const lack = Math.max(wire.a[1], wire.b[1]) + 16 - one.top;
        if (lack > 0 && drop + lack <= 230) drops.set(names[0][0], drop + lack);
      }
    place();
  }

  const bends = ({a, b}) => {  // a spline as LiteGraph draws it
    const pull = Math.hypot(b[0] - a[0], b[1] - a[1]) / 4, points = [];
    for (let t = 0; t <= 1; t += 1 / 64) {
      const [p, q, r, s] = [(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t ** 3];
      points.push([p * a[0] + q * (a[0] + pull) + r * (b[0] - pull) + s * b[0], (p + q) * a[1] + (r + s) * b[1]]);
    }
    return points;
  };
  const hit = (points, ones) => points.some(([x, y]) =>
    ones.some(one => x > one.left - clear && x < one.right + clear && y > one.top - 3 && y < one.bottom + 3));
  const lanes = [];
  for (let i = 0; grouped && i < links.length; i++) {
    const wire = wires()[i], ones = between(wire);
    if (!hit(bends(wire), ones)) continue;
    const [x1, x2] = [nodes[wire.from].pos[0] + nodes[wire.from].size[0] + 16, nodes[wire.to].pos[0] - 14];
    const free = y => ones.every(one => y < one.top - 24 || y > one.bottom + 44)
      && lanes.every(lane => Math.abs(lane.y - y) >= 12 || lane.x2 < x1 || lane.x1 > x2);
    const wanted = offsets => ones.flatMap(one => offsets.flatMap(k => [one.top - 30 - k, one.bottom + 56 + k]))
      .filter(y => y > 34 && free(y));  // not over the titles of groups
    const cost = y => Math.abs(y - wire.a[1]) + Math.abs(y - wire.b[1]);
    const near = wanted([0, 14, 28, 42]), all = near.length ? near : wanted([56, 70, 84, 98, 112, 126, 140, 154]);
    const y = all.sort((one, two) => cost(one) - cost(two))[0];
    if (y === undefined) throw new Error(`no lane for ${links[i].join(' ')}`);
    lanes.push({y, x1, x2});
    const into = nodes[wire.to], link = app.graph.links.get(into.inputs[into.findInputSlot(links[i][3])].link);
    const [out, last] = [wire.a[1], wire.b[1]], stops = [[x1, y], [x2, y]];
    // A long leg would swing out behind the nodes beside it: it bends close to the slot.
    if (Math.abs(y - out) > FAR) stops.unshift([x1, out + Math.sign(y - out) * 70]);
    if (Math.abs(y - last) > FAR) stops.push([x2, last + Math.sign(y - last) * 70]);
    for (const stop of stops) app.graph.createReroute(stop, link);
  }
  if (lanes.length) for (const one of boxes) {  // a step holds the lanes below its nodes
    const low = Math.max(0, ...lanes.filter(l => l.x1 < one.x + one.width && l.x2 > one.x).map(l => l.y));
    if (low > one.y + one.height - 30 && low < one.y + one.height + 60) one.height = low + 30 - one.y;
  }
  if (grouped) boxes.forEach((one, i) => {
    const group = new LiteGraph.LGraphGroup(`${i + 1}  ${one.title}`);
    group.pos = [one.x, one.y];
    group.size = [one.width, one.height];
    group.color = colours[i % colours.length];
    app.graph.add(group);
  });
  await app.loadGraphData(JSON.parse(JSON.stringify(app.graph.serialize())));  // what users will do
}
"""

# Puts the graph into the canvas's corner and returns the part of the page (CSS pixels) that it covers.
SHOW = """
async ({margin, title}) => {
  const ds = app.canvas.ds;
  const boxes = app.graph._nodes.map(n => [n.pos[0], n.pos[1] - title, n.pos[0] + n.size[0], n.pos[1] + n.size[1]]);
  const left = Math.min(...boxes.map(b => b[0])) - margin, top = Math.min(...boxes.map(b => b[1])) - margin;
  const width = Math.max(...boxes.map(b => b[2])) + margin - left;
  const height = Math.max(...boxes.map(b => b[3])) + margin - top;
  ds.scale = 1; ds.offset = [-left, -top];
  app.canvas.setDirty(true, true);
  for (let i = 0; i < 20; i++) await new Promise(requestAnimationFrame);
  const area = app.canvas.canvas.getBoundingClientRect();
  return {x: area.x, y: area.y, width, height};
}
"""
