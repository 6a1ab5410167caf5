// The stages and what crosses between them, as tables with bars.
function bar(plan, stage, part, text, over) {
  const inner = h("span", { class: `fill${over ? " over" : ""}` });
  inner.style.width = `${Math.min(100, part * 100).toFixed(1)}%`;
  return h("span", { class: `meter ${plan.colour(stage)}` }, inner, h("span", { class: "value" }, text));
}

function stagesView(plan) {
  const loads = plan.stages.map((_, stage) => stageLoad(plan, stage));
  const most = Math.max(...loads) || 1;
  const fullest = Math.max(...plan.stages.map((stage) => stage.device_bytes)) || 1;
  const rows = plan.stages.map((own, stage) => {
    const held = own.limit_bytes === null ? own.device_bytes / fullest : own.device_bytes / own.limit_bytes;
    const limit = own.limit_bytes === null ? ", no limit" : ` of ${size(own.limit_bytes)} (${share(held)})`;
    return {
      attributes: { "data-stage": stage, class: plan.colour(stage), onclick: () => chooseStage(stage) },
      cells: [
        h("button", { type: "button", class: "chip", "aria-label": `choose stage ${stage}` }, String(stage)),
        own.devices,
        String(plan.graph.stages.reduce((sum, at) => sum + (at === stage), 0)),
        duration(own.forward_s),
        duration(own.backward_s),
        bar(plan, stage, loads[stage] / most, duration(loads[stage])),
        size(own.parameter_bytes),
        `${own.in_flight}${own.recompute ? ", recomputed" : ""}`,
        bar(plan, stage, held, `${size(own.device_bytes)}${limit}`, held > 1),
        size(bytesInto(plan, stage)),
      ],
    };
  });
  const header = ["stage", "devices", "ops", "forward", "backward", "load a microbatch", "parameters", "in flight", "memory", "comes in"];
  const right = [false, false, true, true, true, false, true, true, false, true];
  return h("div", {}, h("div", { class: "wide" }, table(header, right, rows)), h("h3", {}, "What crosses, for a microbatch"), wiresTable(plan), tiesTable(plan));
}

const MAX_WIRES = 60;

function wiresTable(plan) {
  if (!plan.wires.length) return h("p", {}, "Nothing crosses between stages.");
  const wires = [...plan.wires].sort((a, b) => b[5] * b[3].length - a[5] * a[3].length).slice(0, MAX_WIRES);
  const rows = wires.map(([op, value, source, targets, away, bytes, gradient]) => ({
    attributes: { "data-stage": source, "data-to": targets.join(" ") },
    cells: [
      op >= 0 ? h("button", { type: "button", class: "link", onclick: () => reveal(plan, op) }, value) : value,
      op >= 0 ? textOf(plan, "paths", op) : "",
      String(source),
      targets.map((to, index) => (away[index] ? `${to}${to > source + 1 ? " (skips)" : ""}` : `${to} (same device)`)).join(", "),
      size(bytes),
      size(bytes * plan.pieces),
      gradient ? "yes" : "no",
    ],
  }));
  const header = ["value", "module", "from", "to", "bytes", `× ${plan.pieces}`, "gradient comes back"];
  const note = plan.wires.length > MAX_WIRES ? h("p", { class: "note" }, `The ${MAX_WIRES} largest of ${plan.wires.length} are listed.`) : null;
  return h("div", {}, h("div", { class: "wide" }, table(header, [false, false, true, true, true, true, false], rows)), note);
}

function tiesTable(plan) {
  if (!plan.ties.length) return null;
  const rows = plan.ties.map(([parameter, ops, bytes]) => {
    const stages = [...new Set(ops.map((op) => plan.graph.stages[op]))];
    return {
      attributes: { "data-stages": stages.join(" ") },
      cells: [parameter, stages.join(", "), size(bytes), h("span", {}, others(plan, ops))],
    };
  });
  const header = ["parameter", "stages", "summed once a step", "used by"];
  return h("div", {}, h("h3", {}, "Tied parameters"), h("div", { class: "wide" }, table(header, [false, true, true, false], rows)));
}
