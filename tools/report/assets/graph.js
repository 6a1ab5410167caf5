// The graph in stage lanes: folded modules, what crosses the cuts, and what is chosen.
const COLUMN = 6.1;
let drawnGraph = null;

function unfoldedOf(plan) {
  plan.first = plan.first || firstToShow(plan.graph);
  const unfolded = new Set(plan.first);
  for (const node of state.toggled) if (!unfolded.delete(node)) unfolded.add(node);
  return unfolded;
}

// Modules whose ops surround others become several boxes: what is unfolded at first is less, until few enough are drawn.
function firstToShow(graph) {
  for (let limit = FIRST_NODES; limit > 1; limit = Math.floor(limit / 2)) {
    const unfolded = firstUnfolded(graph, limit);
    if (fold(graph, unfolded, MAX_NODES)) return unfolded;
  }
  return new Set();
}

// Unfold or fold nodes, unless more boxes than can be looked at would come of it.
function toggle(plan, nodes) {
  const toggled = new Set(state.toggled);
  for (const node of nodes) if (!toggled.delete(node)) toggled.add(node);
  const before = state.toggled;
  state.toggled = [...toggled].sort((a, b) => a - b);
  const fits = fold(plan.graph, unfoldedOf(plan), MAX_NODES) !== null;
  const wanted = state.toggled;
  state.toggled = before;
  if (!fits) {
    say(`more than ${MAX_NODES} boxes would be drawn, and ${MAX_NODES} are the most: fold something first (choose a box, then "fold")`);
    return false;
  }
  choose({ toggled: wanted });
  return true;
}

function graphView(plan) {
  const room = Math.min(window.innerWidth, 1400) - 48;
  const narrow = room < 700;
  const header = narrow ? 84 : 150;
  const perLine = narrow ? 3 : 10;
  let folded = fold(plan.graph, unfoldedOf(plan), MAX_NODES);
  if (folded === null) {
    // An address asks for more than can be looked at, or the plan has more stages than that.
    state.toggled = [];
    folded = fold(plan.graph, unfoldedOf(plan));
  }
  const { boxes, arrows } = folded;
  const texts = new Map();
  arrows.forEach((arrow, index) => {
    const times = plan.pieces > 1 ? ` × ${plan.pieces}` : "";
    if (arrow.bytes) texts.set(index, `${size(arrow.bytes)}${times}${arrow.skips ? " (skips)" : ""}`);
  });
  const bands = boxes.map((box) => box.stage);
  const present = [...new Set(bands)].sort((a, b) => a - b);
  const room4 = new Map([...texts].map(([index, text]) => [index, text.length * COLUMN + 8]));
  const laid = layout(bands.map((band) => present.indexOf(band)), arrows.map((a) => [a.source, a.target]), room4, perLine);
  drawnGraph = { folded, laid, bands };
  const width = Math.max(laid.width, narrow ? 0 : 1180 - header);
  const crosses = (arrow) => arrow.crosses;
  const order = [...arrows.keys()].sort((a, b) => crosses(arrows[a]) - crosses(arrows[b]) || a - b);
  const longest = Math.max(0, ...boxes.map((box) => box.seconds));
  const drawing = s(
    "g",
    { transform: `translate(${header} 4)` },
    present.map((stage, index) => laneOf(plan, stage, laid.bands[index], width, header)),
    order.map((index) => wireOf(plan, arrows[index], laid.routes[index], folded)),
    boxes.map((box, index) => boxOf(plan, box, laid.boxes[index], longest)),
    [...texts].map(([index, text]) => tagOf(text, laid.routes[index].labelAt, room4.get(index), boxes[arrows[index].target])),
  );
  const svg = picture(`${plan.model}: the cut`, header + width, laid.height + 12, drawing);
  svg.classList.toggle("narrow", narrow);
  return h("div", {}, searchBox(plan), h("div", { class: "wide" }, svg), h("p", { class: "note" }, hiddenNote(plan, boxes)));
}

function hiddenNote(plan, boxes) {
  const drawn = boxes.filter((box) => box.input === undefined);
  const alone = drawn.filter((box) => box.node < 0).length;
  const total = plan.graph.names.length;
  const hidden = total - alone;
  const what = hidden
    ? `${alone} of ${total} ops are drawn alone; ${hidden} are hidden in ${count(drawn.length - alone, "folded box", "folded boxes")} (+ unfolds one)`
    : `all ${count(total, "op")} are drawn`;
  return `${what}. Bars and times: forward and backward of a microbatch. Thick lines cross a cut, with bytes × microbatches.`;
}

function laneOf(plan, stage, band, width, header) {
  const { forward_s, backward_s, devices, device_bytes, recompute } = plan.stages[stage];
  const nOps = plan.graph.stages.reduce((sum, own) => sum + (own === stage), 0);
  const wide = header > 100;
  const facts = [count(nOps, "op"), duration(forward_s + backward_s)];
  const lines = wide ? [facts.join(", "), `${size(device_bytes)} memory`] : [...facts, size(device_bytes)];
  if (recompute) lines.push("recomputes");
  const into = bytesInto(plan, stage);
  const same = stage > 0 && String(plan.stages[stage - 1].workers) === String(plan.stages[stage].workers);
  const cut = into ? (wide ? `▼ cut: ${size(into)} cross` : `▼ ${size(into)}`) : same ? (wide ? "▼ same device" : "▼ same") : "";
  const [x, y] = [10 - header, band.y + 16];
  return s(
    "g",
    choosable({ class: `lane ${plan.colour(stage)}`, "data-stage": stage, "data-key": `stage ${stage}`, "aria-pressed": String(state.stage === stage), "aria-label": `stage ${stage}` }, () => chooseStage(stage)),
    tip(`stage ${stage} on ${devices}: ${lines.join(", ")}`),
    s("rect", { class: "band", x: -header, y: band.y, width: width + header, height: band.height, rx: 4 }),
    s("rect", { class: "solid", x: -header, y: band.y, width: 4, height: band.height }),
    label("h", x, y, `stage ${stage}`),
    wide ? label("dim e", -14, y, shorten(devices, 10)) : null,
    lines.slice(0, Math.max(1, Math.floor((band.height - 18) / 15))).map((line, i) => label("dim", x, y + 15 * (i + 1), line)),
    cut ? label("b", x, band.y - 6, cut) : null,
  );
}

function wireOf(plan, arrow, route, { boxes }) {
  const [from, to] = [boxes[arrow.source].stage, boxes[arrow.target].stage];
  const { crosses } = arrow;
  const names = [...arrow.values].slice(0, 12).map((used) => nameOf(plan, used)).join(", ");
  const points = route.points.map(([x, y]) => `${round(x)},${round(y)}`).join(" ");
  const [x, y] = route.points[route.points.length - 1];
  const kind = crosses ? (arrow.skips ? "wire skip" : "wire") : "edge";
  const text = `${names}${arrow.values.size > 12 ? " …" : ""}${!crosses && from !== to ? `: made again in stage ${to}` : ""}${crosses ? `: stage ${from} to ${to}, ${size(arrow.bytes)} a microbatch` : ""}`;
  return s(
    "g",
    { class: kind, "data-from": from, "data-to": to },
    s("polyline", { points }, tip(text)),
    s("path", { d: `M${round(x)} ${round(y)}l-6 -3.5v7z` }),
  );
}

function nameOf(plan, used) {
  return used < 0 ? plan.graph.inputs[-1 - used] : plan.graph.names[used];
}

function tagOf(text, at, width, box) {
  return s(
    "g",
    { class: "tag", "data-stage": box.stage },
    s("rect", { x: round(at[0]), y: round(at[1] - 7), width: round(width), height: 14, rx: 7 }),
    label("b s m", at[0] + width / 2, at[1] + 3.5, text),
  );
}

function boxLabel(plan, box) {
  if (box.input !== undefined) return plan.graph.inputs[-1 - box.input];
  if (box.node >= 0) return plan.graph.nodes[box.node][1];
  const [op] = box.ops;
  const [target, path] = [textOf(plan, "targets", op), textOf(plan, "paths", op)];
  return target === path && path ? path : target.slice(target.lastIndexOf(".") + 1);
}

function boxOf(plan, box, place, longest) {
  const { x, y, width, height } = place;
  if (box.input !== undefined) {
    return s(
      "g",
      { class: "input", "data-stage": box.stage },
      tip(`input ${boxLabel(plan, box)} of the model, given to stage ${box.stage}`),
      s("rect", { x, y, width, height, rx: 3 }),
      label("", x + 6, y + 13, shorten(boxLabel(plan, box), 15)),
      label("dim s", x + 6, y + 24, "model input"),
    );
  }
  const folded = box.node >= 0;
  const copies = folded ? plan.graph.nodes[box.node][3] : 1;
  const name = boxLabel(plan, box);
  const tied = [...new Set(box.ops.flatMap((op) => (plan.graph.ties.get(op) || []).map(([parameter]) => parameter)))];
  const below = folded ? `${copies > 1 ? `×${copies}` : count(box.ops.length, "op")}, ${duration(box.seconds)}` : duration(box.seconds);
  const chosen = folded ? state.node === box.node : state.op === box.ops[0];
  const pick = (event) => {
    event.stopPropagation();
    choose({ stage: box.stage, op: folded ? null : box.ops[0], node: folded ? box.node : null });
  };
  const open = (event) => {
    event.stopPropagation();
    toggle(plan, [box.node]);
  };
  return s(
    "g",
    choosable({ class: `box ${plan.colour(box.stage)}${chosen ? " picked" : ""}${copies > 1 ? " run" : ""}`, "data-stage": box.stage, "data-key": `${box.node} ${box.ops[0]}`, "aria-pressed": String(chosen), "aria-label": `${name}, stage ${box.stage}, ${below}`, ondblclick: folded ? open : null }, pick),
    tip(`${name} in stage ${box.stage}: ${below}${tied.length ? `; ${tied.join(", ")} is tied to another stage` : ""}`),
    copies > 1 ? s("rect", { class: "under", x: x + 3, y: y + 3, width, height, rx: 3 }) : null,
    s("rect", { class: "face", x, y, width, height, rx: 3 }),
    label("", x + 6, y + 13, shorten(name, folded ? 13 : 15)),
    label("dim s", x + 6, y + 24, shorten(below, 20)),
    longest > 0 && box.seconds > 0 ? s("rect", { class: "solid", x, y: y + height - 3, width: round((width * box.seconds) / longest), height: 3 }) : null,
    tied.length ? s("g", { class: "tied" }, s("rect", { x: x + width - 30, y: y - 6, width: 28, height: 12, rx: 6 }), label("s m", x + width - 16, y + 3, "tied")) : null,
    folded ? s("g", { class: "open", onclick: open }, s("rect", { x: x + width - 17, y: y + 1, width: 16, height: 16 }), label("b m", x + width - 9, y + 13, "+")) : null,
  );
}

let query = ""; // the box is drawn again with the graph

function searchBox(plan) {
  const input = h("input", { type: "search", id: "search", value: query, placeholder: "find a module or op (/)", "aria-label": "find a module or op" });
  const search = (event) => {
    event.preventDefault();
    query = input.value;
    find(plan, query);
  };
  const form = h("form", { class: "search", onsubmit: search }, input);
  const buttons = [
    h("button", { type: "button", onclick: () => choose({ toggled: [] }) }, "fold as at first"),
    h("button", { type: "button", onclick: () => choose({ toggled: [...(plan.first || [])].sort((a, b) => a - b) }) }, "fold all"),
  ];
  return h("div", { class: "bar" }, form, buttons);
}

// Choose the next op after the chosen one whose name or module has the text, and unfold what it is in.
function find(plan, text) {
  const graph = plan.graph;
  const wanted = text.trim().toLowerCase();
  if (!wanted) return;
  const has = (op) => graph.names[op].toLowerCase().includes(wanted) || textOf(plan, "paths", op).toLowerCase().includes(wanted);
  const start = state.op === null ? 0 : state.op + 1;
  const order = graph.names.map((_, index) => (start + index) % graph.names.length);
  const op = order.find(has);
  if (op === undefined) {
    say(`no op or module has "${text}" in its name`);
    return;
  }
  const total = graph.names.reduce((sum, _, index) => sum + has(index), 0);
  const unfolded = unfoldedOf(plan);
  const folded = [];
  for (let node = graph.node_of[op]; node >= 0; node = graph.nodes[node][2]) if (!unfolded.has(node)) folded.push(node);
  if (folded.length && !toggle(plan, folded)) return;
  choose({ op, node: null, stage: graph.stages[op] });
  say(`${count(total, "op")} with "${text}"; enter again for the next`);
}
