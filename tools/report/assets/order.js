// The order of boxes: a line, a column and a row for each, such that every edge reads forward.
function place(bands, edges, perLine) {
  const layers = layersOf(bands, edges);
  const cells = new Array(bands.length);
  let firstLine = 0;
  for (const band of [...new Set(bands)].sort((a, b) => a - b)) {
    const mine = [];
    bands.forEach((own, box) => own === band && mine.push(box));
    const depth = 1 + Math.max(...mine.map((box) => layers[box]));
    const nLines = Math.ceil(depth / perLine);
    const length = Math.ceil(depth / nLines);
    for (const [layer, boxes] of rowsOf(mine, layers, edges)) {
      boxes.forEach((box, row) => (cells[box] = [firstLine + Math.floor(layer / length), layer % length, row]));
    }
    firstLine += nLines;
  }
  return cells;
}

// Each box's layer: the longest path to it in its band; what nothing in its band leads to is put late.
function layersOf(bands, edges) {
  const inside = bands.map(() => []);
  const waiting = bands.map(() => 0);
  for (const [source, target] of edges) {
    if (bands[source] !== bands[target]) continue;
    inside[source].push(target);
    waiting[target] += 1;
  }
  const starts = [...bands.keys()].filter((box) => waiting[box] === 0);
  const layers = bands.map(() => 0);
  const ready = [...starts];
  while (ready.length) {
    const box = ready.pop();
    for (const target of inside[box]) {
      layers[target] = Math.max(layers[target], layers[box] + 1);
      waiting[target] -= 1;
      if (waiting[target] === 0) ready.push(target);
    }
  }
  for (const box of starts) {
    const after = inside[box].map((target) => layers[target]);
    layers[box] = Math.max(0, (after.length ? Math.min(...after) : 1) - 1);
  }
  return layers;
}

// Boxes of each layer by the mean row of what leads to them, then of what they lead to.
function rowsOf(mine, layers, edges) {
  const byLayer = new Map();
  for (const box of [...mine].sort((a, b) => layers[a] - layers[b] || a - b)) {
    if (!byLayer.has(layers[box])) byLayer.set(layers[box], []);
    byLayer.get(layers[box]).push(box);
  }
  const row = new Map();
  for (const boxes of byLayer.values()) boxes.forEach((box, index) => row.set(box, index));
  const before = new Map(mine.map((box) => [box, []]));
  const after = new Map(mine.map((box) => [box, []]));
  for (const [source, target] of edges) {
    if (!row.has(source) || !row.has(target)) continue;
    before.get(target).push(source);
    after.get(source).push(target);
  }
  const forward = [...byLayer.keys()].sort((a, b) => a - b);
  for (const [near, order] of [[before, forward], [after, [...forward].reverse()], [before, forward]]) {
    for (const layer of order) {
      const boxes = byLayer.get(layer);
      const rank = new Map(boxes.map((box) => [box, mean(near.get(box).map((n) => row.get(n)), row.get(box))]));
      boxes.sort((a, b) => rank.get(a) - rank.get(b) || a - b);
      boxes.forEach((box, index) => row.set(box, index));
    }
  }
  return byLayer;
}

function mean(values, otherwise) {
  return values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : otherwise;
}
