// Numbers with units, as the terminal writes them.
function digits(value, n = 3) {
  return String(Number(value.toPrecision(n)));
}

function duration(seconds) {
  if (seconds >= 10) return `${digits(seconds)} s`;
  return seconds < 1 ? `${digits(seconds * 1e3)} ms` : `${seconds.toFixed(2)} s`;
}

function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (Math.abs(bytes) >= 1000 && unit < units.length - 1) {
    bytes /= 1024;
    unit += 1;
  }
  return `${digits(bytes)} ${units[unit]}`;
}

function share(value) {
  return value > 0 && value < 0.005 ? "<1%" : `${Math.round(value * 100)}%`;
}

function count(number, noun, plural) {
  return `${number} ${number === 1 ? noun : plural || `${noun}s`}`;
}

function change(after, before) {
  if (!before) return "";
  const percent = ((after / before - 1) * 100).toFixed(1);
  return Number(percent) ? `${percent < 0 ? "" : "+"}${percent}%` : "0%"; // no sign on what is too small to see
}

function shorten(text, limit) {
  return text.length <= limit ? text : `…${text.slice(text.length - limit + 1)}`;
}

const OPS = { F: "forward", B: "backward", I: "input gradient", W: "weight gradient" };
