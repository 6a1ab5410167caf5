// Elements of HTML and SVG; what comes from a model is only ever text or the value of an attribute here.
const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false) element.append(child);
  }
  return element;
}

const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const tip = (text) => s("title", {}, text);

function label(kind, x, y, text) {
  return s("text", { class: kind || null, x: round(x), y: round(y) }, text);
}

function round(value) {
  return Math.round(value * 100) / 100;
}

function picture(name, width, height, ...children) {
  return s("svg", { viewBox: `0 0 ${round(width)} ${round(height)}`, role: "group", "aria-label": name }, ...children);
}

// Enter and space do what a click does, for everything that can be chosen.
function choosable(attributes, choose) {
  const onkeydown = (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    event.stopPropagation();
    choose(event);
  };
  return { tabindex: 0, role: "button", ...attributes, onclick: choose, onkeydown };
}

function table(header, right, rows) {
  const cell = (tag, value, index) => h(tag, { class: right[index] ? "right" : null }, value);
  return h(
    "table",
    {},
    h("thead", {}, h("tr", {}, header.map((name, index) => cell("th", name, index)))),
    h("tbody", {}, rows.map((row) => h("tr", row.attributes || {}, row.cells.map((value, i) => cell("td", value, i))))),
  );
}
