// What it would cost to move ops over the cut, to the stage before or after theirs.
function stageLoad(plan, stage) {
  const { forward_s, backward_s, workers } = plan.stages[stage];
  return (forward_s + backward_s) / workers.length;
}

// `ops` are all of one stage. Where the graph forbids it, `because` is the op that is in the way; `unknown` says why
// nobody can tell what it costs.
function moved(plan, ops, to) {
  const graph = plan.graph;
  const from = graph.stages[ops[0]];
  const inside = new Set(ops);
  for (const op of ops) {
    const user = graph.users[op].find((other) => !inside.has(other) && graph.stages[other] < to);
    if (to > from && user !== undefined) return { to, because: `${graph.names[user]} in stage ${graph.stages[user]} uses it` };
    const used = graph.uses[op].find((other) => other >= 0 && !inside.has(other) && graph.stages[other] > to);
    if (to < from && used !== undefined) return { to, because: `it uses ${graph.names[used]} of stage ${graph.stages[used]}` };
  }
  const kinds = [...plan.stages[from].kinds, ...plan.stages[to].kinds];
  if (kinds.some((kind) => kind !== kinds[0])) return { to, unknown: `its ops were not timed on ${plan.stages[to].kinds.join(", ")}` };
  // A stage that recomputes runs its forward twice.
  const secondsIn = (stage) => ops.reduce((sum, op) => sum + graph.seconds[op] + (plan.stages[stage].recompute ? graph.forward_s[op] : 0), 0);
  const loads = plan.stages.map((_, stage) => stageLoad(plan, stage));
  const after = [...loads];
  after[from] -= secondsIn(from) / plan.stages[from].workers.length;
  after[to] += secondsIn(to) / plan.stages[to].workers.length;
  const touched = new Set(ops.flatMap((op) => [op, ...graph.uses[op].filter((used) => used >= 0)]));
  const stageThen = (op) => (inside.has(op) ? to : graph.stages[op]);
  const stageNow = (op) => graph.stages[op];
  let bytes = 0;
  for (const op of touched) bytes += crossing(plan, op, stageThen) - crossing(plan, op, stageNow);
  return { to, loads, after, slowest: Math.max(...loads), then: Math.max(...after), bytes };
}

// Bytes that a value of one microbatch brings to other devices' stages.
function crossing(plan, op, stageOf) {
  const graph = plan.graph;
  const wire = graph.wire_of.get(op);
  const own = plan.stages[stageOf(op)].workers;
  const targets = new Set(graph.users[op].map(stageOf));
  for (const copy of graph.copies[op] || []) targets.delete(copy); // made again there
  let times = 0;
  for (const target of targets) times += String(plan.stages[target].workers) === String(own) ? 0 : 1;
  return times * (wire ? wire[5] : graph.output_bytes[op]);
}
