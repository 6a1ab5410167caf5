// Folding: which boxes are drawn for what is unfolded, and the arrows between them. Boxes never form a circle.
const MAX_NODES = 400;
const FIRST_NODES = 64;
const FIRST_COPIES = 8;

// What is unfolded at first: the largest boxes, as long as few enough boxes come of it; long runs of like modules stay.
function firstUnfolded(graph, limit = FIRST_NODES) {
  const inside = graph.nodes.map(() => []);
  const weight = graph.nodes.map(() => 0);
  graph.nodes.forEach(([, , parent], node) => parent >= 0 && inside[parent].push(node));
  graph.node_of.forEach((node, op) => {
    for (let at = node; at >= 0; at = graph.nodes[at][2]) weight[at] += 1 + graph.seconds[op] * 1e-9;
  });
  const unfolded = new Set();
  const folded = graph.nodes.map((_, node) => node).filter((node) => graph.nodes[node][2] < 0);
  let boxes = folded.length;
  for (;;) {
    folded.sort((a, b) => weight[b] - weight[a] || a - b);
    const at = folded.findIndex((node) => boxes - 1 + graph.children[node] <= limit && graph.nodes[node][3] <= FIRST_COPIES);
    if (at < 0) return unfolded;
    const [node] = folded.splice(at, 1);
    unfolded.add(node);
    boxes += graph.children[node] - 1;
    folded.push(...inside[node]);
  }
}

// The boxes of a graph with the nodes in `unfolded` open; null if there are more than `limit`, which is soon known.
// A node whose ops surround others becomes several boxes.
function fold(graph, unfolded, limit = Infinity) {
  const closed = [];
  graph.nodes.forEach(([, , parent], node) => {
    const above = parent >= 0 ? closed[parent] : -1;
    closed.push(above >= 0 ? above : unfolded.has(node) ? -1 : node);
  });
  const boxes = inputBoxes(graph);
  const first = boxes.length;
  const newest = new Map();
  const boxOf = new Array(graph.names.length);
  const above = [];
  const reached = (some) => some.reduce((found, box) => found | above[box] | (1n << BigInt(box)), 0n);
  for (let op = 0; op < graph.names.length; op += 1) {
    const node = closed[graph.node_of[op]];
    const key = node >= 0 ? node : -1 - op;
    const inputs = new Set();
    for (const used of graph.uses[op]) if (used >= 0) inputs.add(boxOf[used] - first);
    let box = newest.get(key);
    const gained = reached([...inputs].filter((input) => input !== box));
    if (box === undefined || (gained >> BigInt(box)) & 1n) {
      box = above.length;
      newest.set(key, box);
      above.push(reached([...inputs]));
      boxes.push({ node, stage: graph.stages[op], ops: [], seconds: 0 });
      if (boxes.length > limit) return null;
    } else if (gained & ~above[box]) {
      for (let b = 0; b < above.length; b += 1) {
        if (b === box || (above[b] >> BigInt(box)) & 1n) above[b] |= gained;
      }
    }
    boxOf[op] = first + box;
    boxes[first + box].ops.push(op);
    boxes[first + box].seconds += graph.seconds[op];
  }
  for (const box of boxes) if (box.ops.length === 1) box.node = -1; // a folded box of one op is that op
  return { boxes, boxOf, arrows: arrowsOf(graph, boxes, boxOf) };
}

// Inputs of the model, in every stage that uses them: the runtime hands them to all of these.
function inputBoxes(graph) {
  const wanted = new Map();
  graph.uses.forEach((uses, op) =>
    uses.forEach((used) => used < 0 && wanted.set(`${graph.stages[op]}/${used}`, [graph.stages[op], used])),
  );
  return [...wanted.values()]
    .sort((a, b) => a[0] - b[0] || b[1] - a[1])
    .map(([stage, used]) => ({ node: -1, input: used, stage, ops: [], seconds: 0 }));
}

function arrowsOf(graph, boxes, boxOf) {
  const arrows = new Map();
  const crossed = new Set();
  const inputs = new Map();
  boxes.forEach((box, index) => box.input !== undefined && inputs.set(`${box.stage}/${box.input}`, index));
  graph.uses.forEach((uses, op) => {
    for (const used of uses) {
      const source = used >= 0 ? boxOf[used] : inputs.get(`${graph.stages[op]}/${used}`);
      const target = boxOf[op];
      if (source === target) continue;
      const key = source * boxes.length + target;
      if (!arrows.has(key)) arrows.set(key, { source, target, values: new Set(), bytes: 0, crosses: false, skips: false });
      const arrow = arrows.get(key);
      arrow.values.add(used);
      const stage = graph.stages[op];
      if (boxes[source].stage === stage) continue;
      const wire = graph.wire_of.get(used);
      if (!wire || !wire[3].includes(stage)) continue; // its user's stage makes it again
      arrow.crosses = true;
      arrow.skips = stage > boxes[source].stage + 1;
      // A value crosses once for all of its users in a stage.
      if (!crossed.has(`${used}/${stage}`)) arrow.bytes += wire[5];
      crossed.add(`${used}/${stage}`);
    }
  });
  return [...arrows.values()];
}
