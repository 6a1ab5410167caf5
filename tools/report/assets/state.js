// What is chosen and unfolded. It is in the URL, so that a link shows what its sender saw.
const DEFAULTS = { plan: 0, view: "overview", stage: null, op: null, node: null, from: 0, to: 1, toggled: [], theme: null };
const state = { ...DEFAULTS, ...readHash() };
const followers = [];

function readHash() {
  const given = new URLSearchParams(location.hash.slice(1));
  const whole = (name) => (/^\d+$/.test(given.get(name) || "") ? Number(given.get(name)) : undefined);
  const [from, to] = (given.get("t") || "").split("-").map(Number);
  const found = {
    plan: whole("plan"),
    stage: whole("stage"),
    op: whole("op"),
    node: whole("node"),
    view: given.get("view") || undefined,
    theme: ["light", "dark"].includes(given.get("theme")) ? given.get("theme") : undefined,
    toggled: /^\d+(\.\d+)*$/.test(given.get("toggled") || "") ? given.get("toggled").split(".").map(Number) : undefined,
    from: from >= 0 && to <= 1 && from < to ? from : undefined,
    to: from >= 0 && to <= 1 && from < to ? to : undefined,
  };
  return Object.fromEntries(Object.entries(found).filter(([, value]) => value !== undefined));
}

function hashOf(current) {
  const parts = [];
  for (const name of ["plan", "view", "stage", "op", "node", "theme"]) {
    if (current[name] !== DEFAULTS[name] && current[name] !== null) parts.push(`${name}=${current[name]}`);
  }
  if (current.toggled.length) parts.push(`toggled=${current.toggled.join(".")}`);
  if (current.from > 0 || current.to < 1) parts.push(`t=${digits(current.from, 7)}-${digits(current.to, 7)}`);
  return parts.length ? `#${parts.join("&")}` : "#";
}

// In a frame that was made of text, addresses are resolved against the page around it; only the hash is its own.
function writeHash(hash) {
  if (location.protocol === "about:") location.hash = hash;
  else history.replaceState(null, "", hash);
}

function follow(follower) {
  followers.push(follower);
}

// Change what is chosen; every view hears which names changed.
function choose(patch) {
  const changed = Object.keys(patch).filter((name) => patch[name] !== state[name]);
  if (!changed.length) return;
  say("");
  Object.assign(state, patch);
  writeHash(hashOf(state));
  for (const follower of followers) follower(new Set(changed));
}

function chooseStage(stage, plan = state.plan) {
  const same = plan === state.plan && state.stage === stage;
  choose({ ...(plan === state.plan ? {} : { ...DEFAULTS, theme: state.theme, view: state.view, plan }), stage: same ? null : stage, op: null, node: null });
}

window.addEventListener("hashchange", () => {
  if (hashOf(state) === (location.hash || "#")) return;
  const next = bounded({ ...DEFAULTS, ...readHash() });
  const changed = Object.keys(next).filter((name) => String(next[name]) !== String(state[name]));
  Object.assign(state, next);
  for (const follower of followers) follower(new Set(changed));
});

// A link may be of another report: what is not here is not chosen.
function bounded(given) {
  const plan = plans[given.plan] ? given.plan : 0;
  const { stages, graph } = plans[plan];
  const within = (value, length) => (value !== null && value < length ? value : null);
  return {
    ...given,
    plan,
    view: views().some(([name]) => name === given.view) ? given.view : DEFAULTS.view,
    stage: within(given.stage, stages.length),
    op: within(given.op, graph.names.length),
    node: within(given.node, graph.nodes.length),
    toggled: given.toggled.filter((node) => node < graph.nodes.length),
  };
}
