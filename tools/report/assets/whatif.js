// What else the planner considered, as step time against memory, and what other links would do.
const chosenFilters = { shape: "", schedule: "", microbatches: "" };

function whatifView(plan) {
  const box = h("div", {});
  const draw = () => box.replaceChildren(...whatifParts(plan, draw));
  draw();
  return box;
}

function whatifParts(plan, draw) {
  const all = plan.candidates;
  const fits = (c) => Object.entries(chosenFilters).every(([name, value]) => value === "" || String(c[name]) === value);
  const wanted = all.filter((c) => c.chosen || fits(c));
  const filters = Object.keys(chosenFilters).map((name) => filter(name, all, draw));
  return [
    h("div", { class: "bar" }, filters, h("span", { class: "note" }, `${wanted.length} of ${count(all.length, "configuration")} that the planner simulated`)),
    h("div", { class: "columns" }, pareto(wanted), linkChart(plan)),
    candidatesTable(wanted),
    plan.reasons.length ? h("div", {}, h("h3", {}, "Why this plan"), h("ul", {}, plan.reasons.map((reason) => h("li", {}, reason)))) : null,
  ].filter(Boolean);
}

function filter(name, all, draw) {
  const values = [...new Set(all.map((c) => String(c[name])))].sort((a, b) => Number(a) - Number(b) || (a < b ? -1 : 1));
  const title = { shape: "stages x replicas", schedule: "schedule", microbatches: "microbatches" }[name];
  const select = h("select", { onchange: () => ((chosenFilters[name] = select.value), draw()) }, h("option", { value: "" }, "any"), values.map((value) => h("option", { value, selected: chosenFilters[name] === value }, value)));
  return h("label", {}, `${title} `, select);
}

function isBest(candidate, all) {
  return !all.some((o) => o.memory_bytes && (o.step_s < candidate.step_s || o.memory_bytes < candidate.memory_bytes) && o.step_s <= candidate.step_s && o.memory_bytes <= candidate.memory_bytes);
}

// One shape for each schedule that the planner tries.
const MARKS = [
  "M-4 -4h8v8h-8z", "M0 -5l5 9h-10z", "M0 -5l5 5l-5 5l-5 -5z", "M-5 -1.5h3.5v-3.5h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5z", "M0 5l5 -9h-10z",
  "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0", "M-2.5 -4.5h5l2.5 4.5l-2.5 4.5h-5l-2.5 -4.5z", "M-5 0l9 -5v10z", "M5 0l-9 -5v10z",
  "M-1.8 -5h3.6v10h-3.6z", "M-5 -1.8h10v3.6h-10z", "M-4.5 -4.5h9l-9 9z", "M4.5 4.5h-9l9 -9z",
];

function pareto(candidates) {
  const points = candidates.filter((c) => c.memory_bytes > 0 && c.step_s > 0);
  if (!points.length) return h("p", {}, "No configuration says how much memory it takes.");
  const [width, height, left, bottom] = [560, 260, 74, 40];
  const steps = points.map((c) => c.step_s);
  const bytes = points.map((c) => c.memory_bytes);
  const [x0, x1] = spread(steps);
  const [y0, y1] = spread(bytes);
  const x = (c) => round(left + (Math.log(c.step_s / x0) / Math.log(x1 / x0)) * (width - left - 16));
  const y = (c) => round(height - bottom - (Math.log(c.memory_bytes / y0) / Math.log(y1 / y0)) * (height - bottom - 14));
  const schedules = [...new Set(points.map((c) => c.schedule))].sort();
  const shapes = [...new Set(points.map((c) => c.shape))];
  const front = points.filter((c) => isBest(c, points)).sort((a, b) => a.step_s - b.step_s);
  const marks = points.map((c) => {
    const text = `${c.shape}, ${c.schedule}, ${count(c.microbatches, "microbatch", "microbatches")}: ${duration(c.step_s)}, ${size(c.memory_bytes)}${c.chosen ? " (chosen)" : ""}`;
    return s(
      "g",
      choosable({ class: `point c${shapes.indexOf(c.shape) % report.colours.length}${c.chosen ? " own" : ""}`, transform: `translate(${x(c)} ${y(c)})`, "aria-label": text }, () => c.call && copy(c.call)),
      tip(`${text}${c.call ? `; click copies ${c.call}` : ""}`),
      c.chosen ? s("circle", { r: 9, class: "ring" }) : null,
      s("path", { d: MARKS[schedules.indexOf(c.schedule) % MARKS.length] }),
    );
  });
  const axes = [
    s("path", { class: "rule", d: `M${left} 8V${height - bottom}H${width - 8}` }),
    label("dim s", left, height - bottom + 14, duration(x0)),
    label("dim s e", width - 8, height - bottom + 14, duration(x1)),
    label("dim m", (left + width) / 2, height - 6, "step"),
    label("dim s e", left - 6, height - bottom, size(y0)),
    label("dim s e", left - 6, 14, size(y1)),
    label("dim e", left - 6, height / 2 - 10, "memory"),
  ];
  const line = s("polyline", { class: "front", points: front.map((c) => `${x(c)},${y(c)}`).join(" ") });
  const keys = schedules.map((name, index) => h("span", { class: "key" }, s("svg", { viewBox: "-7 -7 14 14", class: "swatch" }, s("g", { class: "point" }, s("path", { d: MARKS[index % MARKS.length] }))), name));
  return h("section", {}, h("h3", {}, "Step against memory of the fullest device (logarithmic)"), h("div", {}, picture("what the planner considered", width, height, axes, line, marks)), h("p", { class: "legend" }, keys, " colours are stages x replicas; the line joins what nothing beats in both; ○ is chosen"));
}

// The ends of a logarithmic axis: a tenth beyond what lies on it.
function spread(values) {
  return [Math.min(...values) / 1.1, Math.max(...values) * 1.1];
}

function linkChart(plan) {
  if (!plan.links.length) return null;
  const [width, height, left, bottom] = [560, 260, 74, 40];
  const [, high] = spread(plan.links.map(([, seconds]) => seconds));
  const own = plan.links.find(([factor]) => factor === 1);
  const [f0, f1] = [Math.log(plan.links[0][0]), Math.log(plan.links[plan.links.length - 1][0])];
  const x = (factor) => round(left + ((Math.log(factor) - f0) / (f1 - f0)) * (width - left - 24));
  const y = (seconds) => round(height - bottom - (seconds / high) * (height - bottom - 14));
  const dots = plan.links.map(([factor, seconds, bubble]) => [
    s("circle", { class: factor === 1 ? "peak" : "dot", cx: x(factor), cy: y(seconds), r: 4 }, tip(`links ${factor} times as fast: ${duration(seconds)} (${change(seconds, own[1])}), bubble ${share(bubble)}`)),
    label("dim s m", x(factor), height - bottom + 14, `${factor}×`),
    label("s m", x(factor), y(seconds) - 8, duration(seconds)),
  ]);
  const axes = [s("path", { class: "rule", d: `M${left} 8V${height - bottom}H${width - 8}` }), label("dim m", (left + width) / 2, height - 6, "bytes per second of the links"), label("dim e", left - 6, height / 2 - 10, "step")];
  const line = s("polyline", { class: "front", points: plan.links.map(([factor, seconds]) => `${x(factor)},${y(seconds)}`).join(" ") });
  return h("section", {}, h("h3", {}, "This plan with other links"), h("div", {}, picture("step with other links", width, height, axes, line, dots)));
}

const MAX_CANDIDATES = 80;

function candidatesTable(candidates) {
  const own = candidates.find((c) => c.chosen);
  const sorted = [...candidates].sort((a, b) => a.step_s - b.step_s || a.memory_bytes - b.memory_bytes).slice(0, MAX_CANDIDATES);
  const rows = sorted.map((c) => ({
    attributes: { class: c.chosen ? "own" : null },
    cells: [
      c.shape, c.schedule, String(c.microbatches), duration(c.step_s), c.chosen ? "chosen" : change(c.step_s, own.step_s),
      c.memory_bytes ? size(c.memory_bytes) : "", c.memory_bytes && isBest(c, candidates) ? "best" : "",
      c.call ? h("button", { type: "button", title: c.call, "data-call": c.call, onclick: () => copy(c.call) }, "copy as compile(...)") : "its order has no name",
    ],
  }));
  const header = ["stages x replicas", "schedule", "microbatches", "step", "against chosen", "memory", "", ""];
  const rest = candidates.length - sorted.length;
  return h("div", {}, h("div", { class: "wide" }, table(header, [false, false, true, true, true, true, false, false], rows)), rest > 0 ? h("p", { class: "note" }, `${rest} slower ones are not listed.`) : null);
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    say(`copied: ${text}`);
  } catch {
    say(`this page may not write to the clipboard; copy it from here: ${text}`);
  }
}
