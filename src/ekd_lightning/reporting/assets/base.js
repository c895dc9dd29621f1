// Shared helpers: elements made without parsing markup, numbers as text, packed content.

const byId = (id) => document.getElementById(id);

/** An element, with attributes if `parts` begin with an object; those starting with "on" are listeners. Children are
 *  nodes or text, never markup. */
function h(tag, ...parts) {
  const [attributes, ...children] = parts[0]?.constructor === Object ? parts : [{}, ...parts];
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

const button = (text, onclick, more = {}) => h("button", { type: "button", ...more, onclick }, text);
const linkTo = (text, onclick) => button(text, onclick, { class: "link" });
/** A frame around a table that may be wider than the page. */
const scrolling = (label, table) =>
  h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, table);
/** A list to choose one of [value, text] from, with a label. */
function choice(label, id, pairs, chosen, take) {
  const options = pairs.map(([value, text]) => h("option", { value, selected: value === chosen }, text));
  return h("label", label, h("select", { id, onchange: (event) => take(event.target.value) }, options));
}
/** Names and what they stand for. */
const definitions = (pairs) => h("dl", pairs.flatMap(([name, value]) => [h("dt", name), h("dd", String(value))]));

function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const DASH = "–";
const known = (value) => value !== null && value !== undefined && !Number.isNaN(value);
const minus = (text) => text.replace("-", "−");
const signed = (value, digits) => minus((value >= 0 ? "+" : "") + value.toFixed(digits));

/** Numbers as texts, by kind. */
const FORMATS = {
  percent: (value) => minus((100 * value).toFixed(2)),
  points: (value) => signed(100 * value, 2),
  plain: (value) => minus(Math.abs(value) >= 1e-3 || value === 0 ? value.toFixed(3) : value.toExponential(1)),
  count: (value) => Math.round(value).toLocaleString("en-US"),
  millions: (value) => `${(value / 1e6).toFixed(2)} M`,
  bytes: (value) => (value >= 1e6 ? `${(value / 1e6).toFixed(1)} MB` : `${(value / 1e3).toFixed(0)} kB`),
  milliseconds: (value) => value.toPrecision(3),
  seconds: (value) => (value < 10 ? value.toFixed(1) : Math.round(value).toLocaleString("en-US")),
};
const format = (value, kind) => (known(value) ? FORMATS[kind](value) : DASH);
/** The ends of an interval around a mean. */
const ends = (figure, kind) => `[${format(figure.low, kind)}, ${format(figure.high, kind)}]`;
const pValue = (p) => (!known(p) ? "" : p < 0.001 ? "p < 0.001" : `p = ${p.toFixed(3)}`);
const plural = (count, word) => `${count.toLocaleString("en-US")} ${word}${count === 1 ? "" : "s"}`;
const share = (fraction, images) =>
  `${Number((100 * fraction).toPrecision(4))} %${images ? ` (${images.toLocaleString("en")})` : ""}`;
const compare = (a, b) =>
  typeof a === "number" && typeof b === "number"
    ? a - b
    : String(a).localeCompare(String(b), "en", { numeric: true });
const distinct = (values) => [...new Set(values)].sort(compare);
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

/** Unpacks gzip in base64. */
async function unpack(text) {
  if (typeof DecompressionStream === "undefined") throw new Error("this browser cannot unpack it (no DecompressionStream)");
  const bytes = Uint8Array.from(atob(text.trim()), (letter) => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

/** Marks a frame as long as it can be scrolled to the right. */
function markScroll(frame) {
  const mark = () => {
    const hidden = frame.scrollWidth - frame.clientWidth;
    const more = hidden - frame.scrollLeft > 4;
    const hint = frame.nextElementSibling?.classList.contains("hint") ? frame.nextElementSibling : null;
    frame.classList.toggle("more", more);
    if (more && !hint) frame.after(h("p", { class: "hint" }, "Scroll sideways for more columns."));
    if (hidden <= 4) hint?.remove();
  };
  frame.addEventListener("scroll", mark, { passive: true });
  new ResizeObserver(mark).observe(frame);
}

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
