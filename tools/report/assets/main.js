// The page: its head, its views one below the other, and what keys do.
const VIEWS = [
  ["overview", "Overview", overview],
  ["graph", "Where it is cut", graphView],
  ["stages", "Stages", stagesView],
  ["timeline", "When who works", timelineView],
  ["memory", "Memory over the step", memoryView],
  ["whatif", "What if", whatifView],
  ["compare", "Compare", compareView],
];
const sections = new Map();
// Which views look different when this changes; the rest only marks what is chosen.
const REDRAWN = { toggled: ["graph"], op: ["graph"], node: ["graph"], from: ["timeline", "compare"], to: ["timeline", "compare"] };

function say(text) {
  document.getElementById("status").textContent = text;
}

function jump(view) {
  return (event) => {
    event.preventDefault();
    choose({ view });
    sections.get(view).scrollIntoView({ block: "start" });
  };
}

function views() {
  return VIEWS.filter(([name]) => name !== "compare" || report.comparison);
}

function head() {
  const plan = shown();
  const options = plans.map((each, index) => h("option", { value: index, selected: index === state.plan }, each.name));
  const select = h("select", { id: "plan", "aria-label": "plan", onchange: () => choose({ ...DEFAULTS, theme: state.theme, view: state.view, plan: Number(select.value) }) }, options);
  const order = `${plan.schedule}, ${count(plan.microbatches, "microbatch", "microbatches")}${plan.replicas > 1 ? " a replica" : ""}, ${count(plan.rows, "row")}`;
  return h(
    "header",
    {},
    h("div", { class: "title" }, h("h1", {}, `${plan.model}: ${count(plan.stages.length, "stage")}, ${order}`), plans.length > 1 ? select : null),
    h("nav", { "aria-label": "views" }, views().map(([name, title], index) => h("a", { href: `#view=${name}`, "data-view": name, onclick: jump(name) }, `${index + 1} ${title}`)),
      h("button", { type: "button", onclick: toggleTheme }, "light / dark"), h("button", { type: "button", onclick: showHelp }, "? keys")),
  );
}

function drawAll() {
  const root = document.getElementById("report");
  sections.clear();
  const plan = shown();
  for (const name of Object.keys(chosenFilters)) chosenFilters[name] = "";
  const parts = views().map(([name, title, view]) => {
    const section = h("section", { id: name, class: "view", tabindex: -1 }, name === "overview" ? null : h("h2", {}, title), view(plan));
    sections.set(name, section);
    return section;
  });
  root.replaceChildren(head(), h("main", {}, parts), h("div", { id: "aside" }), h("p", { id: "status", role: "status", "aria-live": "polite" }));
  root.hidden = false;
  mark();
}

function redraw(name) {
  const section = sections.get(name);
  if (!section) return;
  const [, title, view] = VIEWS.find(([own]) => own === name);
  const focused = section.contains(document.activeElement) ? keyOfFocus(document.activeElement) : null;
  const scrolled = section.querySelector(".wide") ? section.querySelector(".wide").scrollLeft : 0;
  section.replaceChildren(h("h2", {}, title), view(shown()));
  if (section.querySelector(".wide")) section.querySelector(".wide").scrollLeft = scrolled;
  const again = focused && [...section.querySelectorAll("[data-key],button,input,select")].find((each) => keyOfFocus(each) === focused);
  if (again) again.focus({ preventScroll: true });
}

// What has the focus keeps it when its view is drawn again.
function keyOfFocus(element) {
  return element.dataset.key || element.id || element.textContent;
}

// Mark what belongs to the chosen stage in every view.
function mark() {
  const root = document.getElementById("report");
  const stage = state.stage === null ? null : String(state.stage);
  root.classList.toggle("choosing", stage !== null);
  for (const each of root.querySelectorAll("[data-stage],[data-stages],[data-from],[data-to]")) {
    const { stage: own, stages, from, to } = each.dataset;
    const whose = [own, from, ...(to || "").split(" "), ...(stages || "").split(" ")];
    each.classList.toggle("chosen", stage !== null && whose.includes(stage));
  }
  for (const link of root.querySelectorAll("nav a")) link.setAttribute("aria-current", String(link.dataset.view === state.view));
  document.getElementById("aside").replaceChildren(...[details(shown())].filter(Boolean));
  document.documentElement.dataset.theme = state.theme || "";
}

function toggleTheme() {
  const dark = state.theme ? state.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  choose({ theme: dark ? "light" : "dark" });
}

function stepStage(by) {
  const n = shown().stages.length;
  const next = state.stage === null ? (by > 0 ? 0 : n - 1) : (state.stage + by + n) % n;
  choose({ stage: next, op: null, node: null });
}

function unfoldChosen() {
  if (state.node !== null && !unfoldedOf(shown()).has(state.node)) toggle(shown(), [state.node]);
}

// Fold the innermost unfolded box that what is chosen is, or is in.
function foldChosen() {
  const { nodes, node_of: nodeOf } = shown().graph;
  const unfolded = unfoldedOf(shown());
  let node = state.op !== null ? nodeOf[state.op] : state.node !== null ? state.node : -1;
  while (node >= 0 && !unfolded.has(node)) node = nodes[node][2];
  if (node >= 0) foldNode(shown(), node);
}

const ACTIONS = {
  n: () => stepStage(1),
  p: () => stepStage(-1),
  u: unfoldChosen,
  f: foldChosen,
  "+": () => zoomBy(0.5),
  "-": () => zoomBy(2),
  ArrowLeft: () => shiftBy(-0.25),
  ArrowRight: () => shiftBy(0.25),
  Escape: () => choose({ op: null, node: null, stage: null }),
  d: toggleTheme,
  "?": showHelp,
  "/": () => document.getElementById("search").focus(),
};

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const view = views()[Number(event.key) - 1];
  const action = view ? () => jump(view[0])(event) : ACTIONS[event.key];
  if (!action) return;
  event.preventDefault();
  action();
}

async function start() {
  await unpack();
  Object.assign(state, bounded(state));
  drawAll();
  if (state.view !== DEFAULTS.view) sections.get(state.view).scrollIntoView({ block: "start" });
  follow((changed) => {
    if (changed.has("plan")) {
      drawAll();
      const select = document.getElementById("plan");
      if (select) select.focus({ preventScroll: true });
      return;
    }
    const views = new Set([...changed].flatMap((name) => REDRAWN[name] || []));
    for (const name of views) redraw(name);
    mark();
  });
  window.addEventListener("keydown", pressed);
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth !== width) for (const name of ["graph", "timeline", "compare"]) redraw(name);
    width = window.innerWidth;
    mark();
  });
}

// For a look from the console, and for tests.
window.stagecut = { fold, firstUnfolded, layout, moved, plans: () => plans, state };

// What goes wrong before anything is drawn is said: a blank page says nothing.
start().catch((error) => {
  const root = document.getElementById("report");
  root.hidden = false;
  root.textContent = `This page could not be drawn (${error}). It needs a browser of 2023 or later; without JavaScript it shows pictures and tables.`;
});
