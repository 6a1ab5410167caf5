// One step on the time axis: a lane for each worker, what it computes, what it waits for, and the critical path.
const LANE = 24;
const PITCH = 30;
const LEFT = 110;
const RIGHT = 90;
const MAX_LANES = 64;
const DIGIT = 6.5;
const WAIT_MARKS = { filling: "fill", draining: "drain", "another stage": "wait", "a transfer": "packet", replicas: "replicas", "the runtime": "runtime" };

function timelineView(plan) {
  const lanes = plan.timelines.map((timeline) => ({ plan, timeline, name: `${timeline.source} step` }));
  return h("div", {}, zoomBar(), timelinesPicture(lanes), timelineLegend(plan), causesTable(plan));
}

function zoomBar() {
  const zoom = (factor) => () => zoomBy(factor);
  return h(
    "div",
    { class: "bar" },
    h("button", { type: "button", onclick: zoom(0.5), "aria-label": "zoom in" }, "+"),
    h("button", { type: "button", onclick: zoom(2), "aria-label": "zoom out" }, "−"),
    h("button", { type: "button", onclick: () => shiftBy(-0.25), "aria-label": "earlier" }, "◀"),
    h("button", { type: "button", onclick: () => shiftBy(0.25), "aria-label": "later" }, "▶"),
    h("button", { type: "button", onclick: () => choose({ from: 0, to: 1 }) }, "whole step"),
    h("span", { class: "note" }, state.to - state.from < 1 ? `${share(state.from)} to ${share(state.to)} of the step is shown` : "drag over the lanes to look closer"),
  );
}

function zoomBy(factor) {
  const half = ((state.to - state.from) / 2) * factor;
  lookAt((state.from + state.to) / 2 - half, (state.from + state.to) / 2 + half);
}

// Show a part of the step, a thousandth of it at least.
function lookAt(from, to) {
  const length = Math.min(1, Math.max(0.001, to - from));
  const start = Math.min(Math.max(0, (from + to - length) / 2), 1 - length);
  choose({ from: start, to: Math.min(1, start + length) });
}

function shiftBy(part) {
  const length = state.to - state.from;
  const from = Math.min(Math.max(0, state.from + part * length), 1 - length);
  lookAt(from, from + length);
}

// Several timelines on one axis.
function timelinesPicture(entries) {
  const width = Math.max(640, Math.min(window.innerWidth, 1400) - 48);
  const longest = Math.max(...entries.map(({ timeline }) => timeline.makespan_s)) || 1;
  const axis = { from: state.from * longest, to: state.to * longest, width: width - LEFT - RIGHT };
  axis.x = (second) => LEFT + ((second - axis.from) / (axis.to - axis.from)) * axis.width;
  const parts = [];
  let y = 24;
  for (const entry of entries) {
    const { timeline } = entry;
    parts.push(label("h", 0, y - 8, `${entry.name}: ${duration(timeline.makespan_s)}, bubble ${share(timeline.bubble)}`));
    const drawn = drawLanes(entry, y, axis);
    parts.push(drawn.lanes);
    y = drawn.y + 6;
    parts.push(axisOf(axis, y));
    y += 46;
  }
  const svg = picture("one step on the time axis", width, y - 20, parts);
  svg.addEventListener("pointerdown", (event) => dragged(svg, event, width, axis, longest));
  return h("div", { class: "wide" }, svg);
}

function drawLanes({ plan, timeline }, y, axis) {
  const workers = Math.min(timeline.workers, MAX_LANES);
  const spans = Array.from({ length: timeline.workers }, () => []);
  timeline.worker.forEach((worker, index) => spans[worker].push(index));
  const critical = new Set(timeline.critical);
  const lanes = [];
  for (let worker = 0; worker < workers; worker += 1) {
    lanes.push(laneParts(plan, timeline, worker, spans[worker], critical, y, axis));
    y += PITCH;
  }
  if (workers < timeline.workers) {
    lanes.push(label("dim", 0, y + 12, `${timeline.workers - workers} more workers are not drawn`));
    y += 20;
  }
  return { lanes, y };
}

function laneParts(plan, timeline, worker, spans, critical, y, axis) {
  const own = plan.stagesOf(worker);
  const here = plan === shown();
  const end = Math.min(axis.to, timeline.makespan_s);
  const parts = [
    s("g", choosable({ class: own.length === 1 ? plan.colour(own[0]) : null, "data-stages": here ? own.join(" ") : null, "data-key": `lane ${plans.indexOf(plan)} ${timeline.source} ${worker}`, "aria-label": `worker ${worker}` }, () => own.length && chooseStage(own[0], plans.indexOf(plan))),
      label("b", 0, y + 11, `worker ${worker}`), label("dim s", 0, y + 22, shorten(`${stageName(plan, own)}, ${plan.devices[worker] || ""}`, 20))),
  ];
  if (end > axis.from) parts.push(s("rect", { class: "idle", x: LEFT, y, width: round(axis.x(end) - LEFT), height: LANE }));
  let waited = 0;
  for (const [who, start, until, cause, awaited] of timeline.waits) {
    if (who !== worker) continue;
    waited += until - start;
    parts.push(waitPart(timeline, { start, until, cause, awaited }, y, axis));
  }
  let dense = null;
  for (const index of spans) {
    const [start, until] = [timeline.start_s[index], timeline.end_s[index]];
    if (until < axis.from || start > axis.to) continue;
    const wide = axis.x(until) - axis.x(start);
    const op = timeline.ops[timeline.op[index]];
    if (wide < 0.5) {
      if (!(op in OPS)) continue;
      // Many that are too short to be seen become one mark.
      const x = Math.floor(axis.x(start));
      if (dense !== x) parts.push(s("rect", { class: `bwd ${plan.colour(timeline.stage[index])}`, x, y, width: 1, height: LANE }));
      dense = x;
      continue;
    }
    parts.push(spanPart(plan, timeline, index, critical.has(index), y, axis));
  }
  const part = timeline.makespan_s ? waited / timeline.makespan_s : 0;
  parts.push(label("", LEFT + axis.width + 8, y + 16, `waits ${share(part)}`));
  return parts;
}

function clipped(start, until, axis) {
  const [a, b] = [Math.max(start, axis.from), Math.min(until, axis.to)];
  return [axis.x(a), Math.max(0, axis.x(b) - axis.x(a))];
}

function waitPart(timeline, { start, until, cause, awaited }, y, axis) {
  const [x, width] = clipped(start, until, axis);
  if (width < 1) return null;
  const of = awaited < 0 ? "" : `: ${OPS[timeline.ops[timeline.op[awaited]]] || "work"} of microbatch ${timeline.microbatch[awaited]} in stage ${timeline.stage[awaited]}`;
  const text = `waits ${duration(until - start)} ${report.waiting_for[cause]}${of}`;
  const stage = awaited < 0 ? "" : ` ${timeline.stage[awaited]}`;
  const short = cause === "another stage" || cause === "a transfer" ? `${WAIT_MARKS[cause]}${stage}` : WAIT_MARKS[cause];
  return s(
    "g",
    { class: `wait ${WAIT_MARKS[cause]}`, "data-cause": cause },
    tip(text),
    s("rect", { x: round(x), y: y + 3, width: round(width), height: LANE - 6 }),
    width > short.length * 5.5 + 6 ? label("dim s m", x + width / 2, y + 15.5, short) : null,
  );
}

function spanPart(plan, timeline, index, critical, y, axis) {
  const op = timeline.ops[timeline.op[index]];
  const [stage, m] = [timeline.stage[index], timeline.microbatch[index]];
  const [start, until] = [timeline.start_s[index], timeline.end_s[index]];
  const [x, width] = clipped(start, until, axis);
  const whose = `${m >= 0 ? `, microbatch ${m}` : ""}${stage >= 0 ? `, stage ${stage}` : ""}${critical ? "; on the critical path" : ""}`;
  const text = `${OPS[op] || op}${whose}: ${duration(until - start)}, from ${duration(start)}`;
  if (!(op in OPS)) {
    if (op === "reduce" || op === "optimizer") return s("rect", { class: "other", x: round(x), y: y + 5, width: round(width), height: LANE - 10 }, tip(text));
    return op.startsWith("send") ? s("rect", { class: "send", x: round(x), y: y + LANE - 6, width: round(width), height: 5 }, tip(text)) : null;
  }
  const kind = op === "F" ? "fwd" : op === "W" ? "bwd weight" : "bwd";
  return s(
    "g",
    { class: `span ${kind} ${plan.colour(stage)}${critical ? " critical" : ""}`, "data-stage": plan === shown() ? stage : null, "data-microbatch": m, onclick: () => chooseStage(stage, plans.indexOf(plan)) },
    tip(text),
    s("rect", { x: round(x), y: y + 0.5, width: round(width), height: LANE - 1 }),
    width > String(m).length * DIGIT + 2 ? label("m", x + width / 2, y + 16, String(m)) : null,
    critical ? s("rect", { class: "path", x: round(x), y: y + LANE, width: round(width), height: 3 }) : null,
  );
}

function axisOf(axis, y) {
  const step = tick((axis.to - axis.from) || 1);
  const parts = [s("path", { class: "rule", d: `M${LEFT} ${y}H${LEFT + axis.width}` })];
  for (let n = Math.ceil(axis.from / step - 1e-9); n * step <= axis.to * (1 + 1e-9); n += 1) {
    const x = round(axis.x(n * step));
    parts.push(s("path", { class: "rule", d: `M${x} ${y}v4` }), label("dim s m", x, y + 15, `${digits(n * step * 1e3, 6)}${n === 0 ? " ms" : ""}`));
  }
  return parts;
}

function tick(seconds) {
  const power = 10 ** Math.floor(Math.log10(seconds / 10));
  return [1, 2, 5, 10].map((m) => m * power).find((value) => value * 10 >= seconds * (1 - 1e-9));
}

function dragged(svg, down, width, axis, longest) {
  if (down.button !== 0) return;
  const at = (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * width;
    return axis.from + (Math.min(Math.max(0, x - LEFT), axis.width) / axis.width) * (axis.to - axis.from);
  };
  const start = at(down);
  const end = (event) => {
    if (event.pointerId !== down.pointerId) return;
    for (const kind of ["pointerup", "pointercancel"]) window.removeEventListener(kind, end);
    const [from, to] = [start, at(event)].sort((a, b) => a - b).map((second) => second / longest);
    if (event.type === "pointerup" && to - from > (state.to - state.from) * 0.01) lookAt(from, to);
  };
  for (const kind of ["pointerup", "pointercancel"]) window.addEventListener(kind, end);
}

function timelineLegend(plan) {
  const item = (kind, name) => h("span", { class: "key" }, s("svg", { viewBox: "0 0 20 12", class: "swatch" }, s("g", { class: kind }, s("rect", { x: 0, y: 0, width: 20, height: 12 }))), name);
  const split = plan.timelines.some((timeline) => timeline.ops.includes("W"));
  return h(
    "p",
    { class: "legend" },
    item("span fwd c0", "forward"),
    item("span bwd c0", split ? "backward, or its input part" : "backward"),
    split ? item("span bwd weight c0", "weight gradient") : null,
    item("keysend", "sends"),
    item("keypath", "critical path"),
    Object.entries(WAIT_MARKS).filter(([cause]) => plan.timelines.some((t) => t.waits.some((w) => w[3] === cause))).map(([cause, mark]) => item(`wait ${mark}`, `waits ${report.waiting_for[cause]}`)),
    " numbers are microbatches",
  );
}

function causesTable(plan) {
  const every = plan.timelines.map((timeline) => new Map(causesOf(timeline)));
  const causes = Object.keys(report.waiting_for).filter((cause) => every.some((found) => found.get(cause)));
  if (!causes.length) return h("p", {}, "Nobody waits.");
  const rows = causes.map((cause) => ({ cells: [`waits ${report.waiting_for[cause]}`, ...every.map((found) => share(found.get(cause) || 0))] }));
  const header = ["of all workers' time", ...plan.timelines.map((timeline) => timeline.source)];
  return h("div", {}, h("div", { class: "wide" }, table(header, [false, ...plan.timelines.map(() => true)], rows)), h("p", { class: "note" }, criticalText(plan)));
}

// What the critical path consists of, by stage.
function criticalText(plan) {
  const [timeline] = plan.timelines;
  const seconds = new Map();
  for (const index of timeline.critical) {
    const stage = timeline.stage[index];
    seconds.set(stage, (seconds.get(stage) || 0) + timeline.end_s[index] - timeline.start_s[index]);
  }
  const total = [...seconds.values()].reduce((sum, value) => sum + value, 0);
  const parts = [...seconds].sort((a, b) => b[1] - a[1]).slice(0, 4).map(([stage, sum]) => `stage ${stage} ${share(sum / timeline.makespan_s)}`);
  const rest = 1 - total / (timeline.makespan_s || 1);
  return `The critical path of the ${timeline.source} step: ${parts.join(", ")}${rest > 0.005 ? `, transfers and the runtime ${share(rest)}` : ""}. Only what is on it makes the step longer.`;
}
