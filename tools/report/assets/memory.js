// What each worker holds over the step, its limit, and who is alive where it is at its fullest.
const MAX_CHARTS = 16;
const CHART = 74;

function memoryView(plan) {
  const [timeline] = plan.timelines;
  const fullest = [...plan.memory].sort((a, b) => b.peak_bytes - a.peak_bytes || a.worker - b.worker).slice(0, MAX_CHARTS);
  const hidden = plan.memory.length - fullest.length;
  const charts = fullest.sort((a, b) => a.worker - b.worker).map((own) => memoryChart(plan, own, timeline));
  return h("div", { class: "charts" }, charts, hidden ? h("p", { class: "note" }, `${hidden} more workers hold less and are not drawn.`) : null);
}

function memoryChart(plan, own, timeline) {
  const width = 560;
  const limit = own.limit_bytes;
  const near = limit !== null && limit < own.peak_bytes * 3;
  const top = Math.max(own.peak_bytes, near ? limit : 0) * 1.08 || 1;
  const end = timeline.makespan_s || 1;
  const x = (second) => round((second / end) * width);
  const y = (bytes) => round(CHART - (bytes / top) * CHART);
  const stages = plan.stagesOf(own.worker);
  let d = `M0 ${CHART}`;
  own.steps.forEach(([second, bytes]) => (d += `H${x(second)}V${y(bytes)}`));
  d += `H${width}V${CHART}Z`;
  const limitText = limit === null ? "no limit" : near ? `limit ${size(limit)}` : `limit ${size(limit)}, far above`;
  const svg = picture(
    `memory of worker ${own.worker}`,
    width,
    CHART + 4,
    s("path", { class: `area ${plan.colour(stages[0] || 0)}`, d }),
    near ? s("path", { class: "limit", d: `M0 ${y(limit)}H${width}` }) : null,
    s("path", { class: "rule", d: `M0 ${CHART}H${width}` }),
    s("circle", { class: "peak", cx: x(own.peak_s), cy: y(own.peak_bytes), r: 3.5 }, tip(`${size(own.peak_bytes)} at ${duration(own.peak_s)}`)),
  );
  const alive = own.alive.map(([what, bytes]) => h("li", {}, `${what}: ${size(bytes)}`));
  return h(
    "section",
    { class: "chart", "data-stages": stages.join(" ") },
    h("h3", {}, `worker ${own.worker} (${stageName(plan, stages)}): ${size(own.peak_bytes)} at its fullest, ${limitText}`),
    h("div", {}, svg),
    h("details", {}, h("summary", {}, `alive at ${duration(own.peak_s)}, the peak`), h("ul", {}, alive)),
  );
}
