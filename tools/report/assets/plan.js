// The data of the page: unpacked once, with the few tables that more than one view needs.
let report = null;
let plans = [];

async function unpack() {
  const packed = Uint8Array.from(atob(document.getElementById("data").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  report = JSON.parse(await new Response(stream).text());
  plans = report.plans;
  for (const plan of plans) complete(plan);
}

function complete(plan) {
  const graph = plan.graph;
  graph.users = graph.names.map(() => []);
  graph.uses.forEach((uses, op) => uses.forEach((used) => used >= 0 && graph.users[used].push(op)));
  graph.children = graph.nodes.map(() => 0);
  graph.nodes.forEach(([, , parent]) => parent >= 0 && (graph.children[parent] += 1));
  graph.node_of.forEach((node) => (graph.children[node] += 1));
  graph.seconds = graph.names.map((_, op) => graph.forward_s[op] + graph.backward_s[op]);
  graph.wire_of = new Map(plan.wires.map((wire) => [wire[0], wire]));
  graph.ties = new Map();
  for (const tie of plan.ties) for (const op of tie[1]) graph.ties.set(op, [...(graph.ties.get(op) || []), tie]);
  plan.pieces = Math.min(plan.rows, plan.microbatches * plan.replicas); // microbatches of a step, of all replicas
  plan.colour = (stage) => `c${stage % report.colours.length}`;
  plan.stagesOf = (worker) => plan.stages.map((_, stage) => stage).filter((n) => plan.stages[n].workers.includes(worker));
}

const shown = () => plans[state.plan];

function textOf(plan, column, op) {
  return plan.graph.texts[plan.graph[column][op]];
}

function stageName(plan, stages) {
  return `stage${stages.length > 1 ? "s" : ""} ${stages.join(", ")}`;
}

// Bytes that one microbatch's forward brings into a stage from other devices.
function bytesInto(plan, stage) {
  let bytes = 0;
  for (const [, , , targets, away, n] of plan.wires) {
    targets.forEach((target, index) => (bytes += target === stage && away[index] ? n : 0));
  }
  return bytes;
}
