// The overview: what a reader wants to know first, one card for each question.
function overview(plan) {
  const { verdict, prediction, timelines } = plan;
  const crossing = plan.stages.reduce((sum, _, stage) => sum + bytesInto(plan, stage), 0);
  const cards = [
    ["A step takes", duration(prediction.step_s), [verdict.one_device, verdict.data_parallel, `${prediction.costs} costs`].filter(Boolean).join("; "), "timeline"],
    ["It is cut into", count(plan.stages.length, "stage"), `${verdict.cut}; ${verdict.limit}`, "graph"],
    ["Crosses for a microbatch", size(crossing), verdict.crossing, "stages"],
    ["Who waits, and why", share(waitedOf(timelines[0])), verdict.waiting, "timeline"],
    ["Memory", verdict.fit.split(":")[0], verdict.fit.split(": ").slice(1).join(": "), "memory"],
  ];
  const measured = timelines[1];
  if (measured) {
    const off = change(measured.makespan_s, timelines[0].makespan_s);
    cards.push(["Measured", duration(measured.makespan_s), `${off} against the simulated step`, "timeline"]);
  }
  const card = ([title, value, note, view]) =>
    h("section", { class: "card" }, h("h3", {}, h("a", { href: `#view=${view}`, onclick: jump(view) }, title)), h("b", {}, value), h("p", {}, note));
  return h("div", { class: "cards" }, cards.map(card));
}

// The share of all workers' time in which they neither compute nor send nor reduce.
function waitedOf(timeline) {
  return causesOf(timeline).reduce((sum, [, part]) => sum + part, 0);
}

// The share of all workers' time that they wait, by cause, most first.
function causesOf(timeline) {
  const total = timeline.makespan_s * timeline.workers || 1;
  const seconds = new Map();
  for (const [, start, end, cause] of timeline.waits) seconds.set(cause, (seconds.get(cause) || 0) + end - start);
  return [...seconds].map(([cause, sum]) => [cause, sum / total]).sort((a, b) => b[1] - a[1]);
}
