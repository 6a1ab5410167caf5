// The keys, as a dialog.
const KEYS = [
  ["1 … 7", "go to a view"],
  ["n, p", "choose the next or previous stage"],
  ["/", "find a module or op"],
  ["u, f", "unfold the chosen box, fold what it is in"],
  ["+, -", "look closer at the step, or less close"],
  ["←, →", "earlier, later in the step"],
  ["Tab, Enter", "go through stages and boxes, choose one"],
  ["Esc", "choose nothing"],
  ["d", "light or dark"],
  ["?", "this help"],
];

function showHelp() {
  const dialog = h("dialog", { onclose: () => dialog.remove() });
  dialog.append(
    h("h2", {}, "Keys"),
    table(["key", "does"], [false, false], KEYS.map((cells) => ({ cells: cells.map((cell) => cell) }))),
    h("p", {}, "What you choose is in the address of the page: a link shows it to others who have the file."),
    h("button", { type: "button", onclick: () => dialog.close() }, "close"),
  );
  document.body.append(dialog);
  dialog.showModal();
}
