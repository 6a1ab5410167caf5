// Plans beside each other: their numbers, what moved, and their steps on one axis.
function compareView() {
  const { header, rows, moves } = report.comparison;
  const numbers = table([...header], header.map((_, index) => index > 0), rows.map((cells) => ({ cells: [...cells] })));
  const moved = moves.map((lines, index) => h("div", {}, h("h3", {}, `${plans[index + 1].name} against ${plans[0].name}`), h("ul", {}, lines.map((line) => h("li", {}, line)))));
  const lanes = plans.map((plan) => ({ plan, timeline: plan.timelines[0], name: plan.name }));
  return h("div", {}, h("div", { class: "wide" }, numbers), moved, h("h3", {}, "Their steps on one axis"), timelinesPicture(lanes));
}
