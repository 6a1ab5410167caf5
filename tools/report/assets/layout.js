// Layout: boxes in bands, read like text, and orthogonal routes between them that cross no box.
// A band (a stage) is one or more lines of boxes; above each line is a channel for horizontal runs, between columns a
// gap for vertical ones, and at the right edge a margin for runs that pass whole lines.
const BOX_WIDTH = 104;
const BOX_HEIGHT = 32;
const GAP = 20;
const ROW_GAP = 7;
const CHANNEL_PAD = 7;
const TRACK = 5;
const LABELLED_TRACK = 16;
const MARGIN_TRACK = 6;
const STEP = 2.5;
const MAX_STEPS = 2;

// `bands` is the band of each box, without holes; `edges` pairs of boxes; `labels` the room of an edge's label, by edge.
function layout(bands, edges, labels, perLine) {
  const cells = place(bands, edges, perLine);
  const nLines = 1 + Math.max(0, ...cells.map(([line]) => line));
  const right = (1 + Math.max(0, ...cells.map(([, column]) => column))) * (BOX_WIDTH + GAP) + GAP / 2;
  const lanes = lanesOf(cells, edges);
  const columnX = (box) => GAP / 2 + cells[box][1] * (BOX_WIDTH + GAP);
  const shift = (box) => STEP * Math.min(cells[box][2], MAX_STEPS);
  const exitX = (box) => columnX(box) + BOX_WIDTH + 4 + shift(box);
  const entryX = (box) => columnX(box) - 4 - shift(box);
  const runs = edges.map(([source, target], edge) => {
    const [line, toLine] = [cells[source][0], cells[target][0]];
    if (line === toLine && cells[target][1] === cells[source][1] + 1) return [];
    const [start, end, labelled] = [exitX(source), entryX(target), labels.has(edge)];
    if (toLine <= line + 1) return [{ channel: toLine, source, labelled, start, end }];
    const lane = right + MARGIN_TRACK * lanes.get(source);
    return [
      { channel: line + 1, source, labelled: false, start, end: lane },
      { channel: toLine, source, labelled, start: lane, end },
    ];
  });
  const labelX = (edge, run) => {
    const [low, high] = [Math.min(run.start, run.end), Math.max(run.start, run.end)];
    return Math.max(low + 4, (low + high - labels.get(edge)) / 2);
  };
  const channels = tracksOf(runs, nLines, (edge, run) => labelX(edge, run) + labels.get(edge));
  const tops = lineTops(cells, nLines, channels.heights);
  const boxes = cells.map(([line, , row], box) => ({
    x: columnX(box), y: tops[line] + row * (BOX_HEIGHT + ROW_GAP), width: BOX_WIDTH, height: BOX_HEIGHT,
  }));
  const routes = edges.map((_, edge) => routeOf(edge, edges[edge], runs[edge], { boxes, tops, channels, labels, labelX }));
  const ends = routes.map((route, edge) => (route.labelAt ? route.labelAt[0] + labels.get(edge) : 0));
  const width = Math.max(right + MARGIN_TRACK * (1 + Math.max(-1, ...lanes.values())) + GAP / 2, ...ends);
  const bandBoxes = bandsOf(bands, cells, boxes, tops, channels, width);
  const height = Math.max(0, ...bandBoxes.map((band) => band.y + band.height));
  return { boxes, cells, bands: bandBoxes, routes, width, height };
}

// A lane in the margin for each source whose edges pass whole lines; lanes that do not meet are shared.
function lanesOf(cells, edges) {
  const spans = new Map();
  for (const [source, target] of edges) {
    const [start, end] = [cells[source][0] + 1, cells[target][0]];
    if (end <= start) continue;
    const [low, high] = spans.get(source) || [start, end];
    spans.set(source, [Math.min(low, start), Math.max(high, end)]);
  }
  const lanes = new Map();
  const inOrder = [...spans].sort(([a, x], [b, y]) => x[0] - y[0] || x[1] - y[1] || a - b);
  for (const [source, span] of inOrder) {
    const taken = new Set();
    for (const [other, lane] of lanes) {
      const [low, high] = spans.get(other);
      if (high >= span[0] && span[1] >= low) taken.add(lane);
    }
    let lane = 0;
    while (taken.has(lane)) lane += 1;
    lanes.set(source, lane);
  }
  return lanes;
}

// Labelled runs have their own line, others share their source's.
function keyOf(run, edge) {
  return run.labelled ? `${run.channel}/edge ${edge}` : `${run.channel}/from ${run.source}`;
}

// A height in its channel for every run such that no two that meet share one; labelled runs lie on top.
function tracksOf(runs, nLines, labelEnd) {
  const extents = new Map();
  runs.forEach((own, edge) => {
    for (const run of own) {
      const low = Math.min(run.start, run.end);
      let high = Math.max(run.start, run.end);
      if (run.labelled) high = Math.max(high, labelEnd(edge, run));
      const key = keyOf(run, edge);
      const known = extents.get(key) || { low, high, channel: run.channel, labelled: run.labelled, order: extents.size };
      extents.set(key, { ...known, low: Math.min(low, known.low), high: Math.max(high, known.high) });
    }
  });
  const offsets = new Map();
  const cuts = [];
  const heights = [];
  for (let channel = 0; channel < nLines; channel += 1) {
    const mine = [...extents].filter(([, extent]) => extent.channel === channel);
    let y = CHANNEL_PAD;
    for (const [labelled, pitch] of [[true, LABELLED_TRACK], [false, TRACK]]) {
      const tracks = coloured(mine.filter(([, extent]) => extent.labelled === labelled));
      for (const [key, track] of tracks) offsets.set(key, y + pitch * (track + 0.5));
      y += pitch * (1 + Math.max(-1, ...tracks.values()));
      if (labelled) cuts.push(y);
    }
    heights.push(y + CHANNEL_PAD / 2);
  }
  return { offsets, cuts, heights };
}

// The smallest number of tracks for runs, by their left ends.
function coloured(extents) {
  const tracks = new Map();
  const ends = [];
  const inOrder = [...extents].sort(([, a], [, b]) => a.low - b.low || a.high - b.high || a.order - b.order);
  for (const [key, { low, high }] of inOrder) {
    let track = ends.findIndex((end) => end + 2 < low);
    if (track < 0) track = ends.push(0) - 1;
    ends[track] = high;
    tracks.set(key, track);
  }
  return tracks;
}

function lineTops(cells, nLines, channelHeights) {
  const rows = new Array(nLines).fill(1);
  for (const [line, , row] of cells) rows[line] = Math.max(rows[line], row + 1);
  const tops = [];
  let y = 0;
  for (let line = 0; line < nLines; line += 1) {
    y += channelHeights[line];
    tops.push(y);
    y += rows[line] * (BOX_HEIGHT + ROW_GAP) - ROW_GAP;
  }
  return tops;
}

function bandsOf(bands, cells, boxes, tops, channels, width) {
  return [...new Set(bands)].sort((a, b) => a - b).map((band) => {
    const mine = [...bands.keys()].filter((box) => bands[box] === band);
    const first = Math.min(...mine.map((box) => cells[box][0]));
    const top = tops[first] - channels.heights[first] + channels.cuts[first];
    const bottom = Math.max(...mine.map((box) => boxes[box].y + boxes[box].height)) + ROW_GAP / 2;
    return { x: 0, y: top, width, height: bottom - top };
  });
}

function routeOf(edge, [source, target], runs, { boxes, tops, channels, labels, labelX }) {
  const [from, to] = [boxes[source], boxes[target]];
  const start = [from.x + from.width, from.y + from.height / 2];
  const end = [to.x, to.y + to.height / 2];
  let points = [start];
  let labelAt = null;
  for (const run of runs) {
    const y = tops[run.channel] - channels.heights[run.channel] + channels.offsets.get(keyOf(run, edge));
    points.push([run.start, y], [run.end, y]);
    if (run.labelled) labelAt = [labelX(edge, run), y];
  }
  if (points.length > 1) {
    points = [start, [points[1][0], start[1]], ...points.slice(1), [points[points.length - 1][0], end[1]]];
  } else if (labels.has(edge)) labelAt = start;
  return { points: [...points, end], labelAt };
}
