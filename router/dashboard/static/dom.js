// Elements without markup: data only ever becomes text nodes and attributes.

const SVG = "http://www.w3.org/2000/svg";

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined) node.append(child);
  }
  return node;
}

export const el = (tag, attributes = {}, ...children) =>
  filled(document.createElement(tag), attributes, children);

export const svg = (tag, attributes = {}, ...children) =>
  filled(document.createElementNS(SVG, tag), attributes, children);

export const byId = (id) => document.getElementById(id);

export function swatch(color) {
  const mark = el("span", { class: "swatch", "aria-hidden": "true" });
  mark.style.background = color;
  return mark;
}

export function bar(used, total, label, fullAt = 0.95) {
  const share = total > 0 ? Math.min(used / total, 1) : 0;
  const fill = el("i", { class: share > fullAt ? "full" : null });
  fill.style.width = `${(100 * share).toFixed(1)}%`;
  return el("span", { class: "bar", role: "img", "aria-label": label }, fill);
}
