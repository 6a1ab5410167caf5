// What is chosen: an op, a folded box, or a stage, with its place in the source and what it would cost to move it.
function details(plan) {
  const close = h("button", { type: "button", "aria-label": "close", onclick: () => choose({ op: null, node: null, stage: null }) }, "✕");
  if (state.op !== null) return h("aside", { class: "details" }, close, opDetails(plan, state.op));
  if (state.node !== null) return h("aside", { class: "details" }, close, nodeDetails(plan, state.node));
  if (state.stage !== null) return h("aside", { class: "details" }, close, stageDetails(plan, state.stage));
  return null;
}

function facts(pairs) {
  return h("dl", {}, pairs.filter(([, value]) => value).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}

function opDetails(plan, op) {
  const graph = plan.graph;
  const wire = graph.wire_of.get(op);
  const copies = graph.copies[op];
  return [
    h("h3", {}, graph.names[op]),
    facts([
      ["computes", textOf(plan, "targets", op)],
      ["module", textOf(plan, "paths", op)],
      ["written at", textOf(plan, "sources", op)],
      ["stage", `${graph.stages[op]}${copies ? `, made again in ${copies.join(", ")}` : ""}`],
      ["forward", duration(graph.forward_s[op])],
      ["backward", duration(graph.backward_s[op])],
      ["result", size(graph.output_bytes[op])],
      ["saved for backward", size(graph.saved_bytes[op])],
      ["costs are", textOf(plan, "costs", op)],
      ["crosses to", wire ? `stage ${wire[3].join(", ")}: ${size(wire[5])} a microbatch` : ""],
      ["tied", (graph.ties.get(op) || []).map(([parameter, ops]) => `${parameter}, with stage ${ops.map((o) => graph.stages[o]).filter((n) => n !== graph.stages[op]).join(", ")}`).join("; ")],
    ]),
    h("p", {}, "uses ", others(plan, graph.uses[op])),
    h("p", {}, "used by ", others(plan, graph.users[op])),
    moving(plan, [op]),
    foldButton(plan, graph.node_of[op]),
  ];
}

function others(plan, ops) {
  const links = ops.slice(0, 12).map((op) => (op < 0 ? nameOf(plan, op) : h("button", { type: "button", class: "link", onclick: () => reveal(plan, op) }, plan.graph.names[op])));
  if (!links.length) return "nothing";
  const listed = links.flatMap((link, index) => (index ? [", ", link] : [link]));
  return [listed, ops.length > 12 ? ` and ${ops.length - 12} more` : ""];
}

function reveal(plan, op) {
  const unfolded = unfoldedOf(plan);
  const folded = [];
  for (let node = plan.graph.node_of[op]; node >= 0; node = plan.graph.nodes[node][2]) if (!unfolded.has(node)) folded.push(node);
  if (!folded.length || toggle(plan, folded)) choose({ op, node: null, stage: plan.graph.stages[op] });
}

function opsUnder(plan, node) {
  const { nodes, node_of: nodeOf } = plan.graph;
  const inside = nodes.map(() => false);
  nodes.forEach(([, , parent], index) => (inside[index] = index === node || (parent >= 0 && inside[parent])));
  return [...nodeOf.keys()].filter((op) => inside[nodeOf[op]]);
}

function nodeDetails(plan, node) {
  const graph = plan.graph;
  const [kind, name, , copies] = graph.nodes[node];
  const ops = opsUnder(plan, node);
  const sum = (column) => ops.reduce((total, op) => total + graph[column][op], 0);
  return [
    h("h3", {}, name),
    facts([
      ["is a", kind === "run" ? `run of ${copies} like modules` : kind],
      ["stage", String(graph.stages[ops[0]])],
      ["ops", String(ops.length)],
      ["forward", duration(sum("forward_s"))],
      ["backward", duration(sum("backward_s"))],
      ["saved for backward", size(sum("saved_bytes"))],
    ]),
    kind === "stage" ? null : moving(plan, ops),
    unfoldedOf(plan).has(node) ? null : h("button", { type: "button", onclick: () => toggle(plan, [node]) }, "unfold"),
    foldButton(plan, node) || foldButton(plan, graph.nodes[node][2]),
  ];
}

function foldButton(plan, node) {
  if (node < 0 || !unfoldedOf(plan).has(node)) return null;
  return h("button", { type: "button", onclick: () => foldNode(plan, node) }, `fold ${plan.graph.nodes[node][1]}`);
}

function foldNode(plan, node) {
  if (toggle(plan, [node])) choose({ op: null, node, stage: plan.graph.stages[opsUnder(plan, node)[0]] });
}

function stageDetails(plan, stage) {
  const { devices, workers, forward_s, backward_s, parameter_bytes, device_bytes, in_flight, limit_bytes } = plan.stages[stage];
  const out = plan.wires.filter((wire) => wire[2] === stage);
  const into = plan.wires.filter((wire) => wire[3].includes(stage));
  const list = (wires) => (wires.length ? wires.slice(0, 8).map((wire) => `${wire[1]} (${size(wire[5])})`).join(", ") + (wires.length > 8 ? ` and ${wires.length - 8} more` : "") : "nothing");
  return [
    h("h3", {}, `stage ${stage}`),
    facts([
      ["runs on", `${devices} (worker${workers.length > 1 ? "s" : ""} ${workers.join(", ")})`],
      ["forward", duration(forward_s)],
      ["backward", duration(backward_s)],
      ["parameters", size(parameter_bytes)],
      ["in flight", count(in_flight, "microbatch", "microbatches")],
      ["memory", `${size(device_bytes)}${limit_bytes === null ? "" : ` of ${size(limit_bytes)}`}`],
    ]),
    h("p", {}, `comes in: ${list(into)}`),
    h("p", {}, `goes out: ${list(out)}`),
  ];
}

function moving(plan, ops) {
  const from = plan.graph.stages[ops[0]];
  const targets = [from - 1, from + 1].filter((to) => to >= 0 && to < plan.stages.length);
  return targets.map((to) => {
    const cost = moved(plan, ops, to);
    if (cost.unknown) return h("p", {}, `What a move to stage ${to} costs is not known: ${cost.unknown}.`);
    if (cost.because) return h("p", {}, `Cannot move to stage ${to}: ${cost.because}.`);
    const bytes = cost.bytes === 0 ? "as much crosses" : `${size(Math.abs(cost.bytes))} ${cost.bytes > 0 ? "more" : "less"} cross`;
    const slowest = cost.then === cost.slowest ? "the slowest stage stays" : `the slowest stage takes ${duration(cost.then)} a microbatch (${change(cost.then, cost.slowest)})`;
    return h("p", { class: "moving" }, `Moved to stage ${to}: ${slowest}, ${bytes} for a microbatch; stage ${from} ${duration(cost.after[from])}, stage ${to} ${duration(cost.after[to])}.`);
  });
}
