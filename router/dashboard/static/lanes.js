// Transfers: a lane from each source (left) to each target (right), thicker for more bytes.

import { byId, el, svg, swatch } from "./dom.js";
import { bytes, count, duration } from "./words.js";

const WIDTH = 420;
const ROW = 26;
const SHOWN = 24;
const BUSY_S = 3;

export function showLanes(state, names) {
  const pairs = state.pairs.slice(0, SHOWN);
  if (!pairs.length) {
    byId("lanes").replaceChildren(el("p", { class: "quiet" }, "Nothing has been moved yet."));
    return;
  }
  const sources = [...new Set(pairs.map((pair) => pair.source))].sort();
  const targets = [...new Set(pairs.map((pair) => pair.target))].sort();
  const height = ROW * Math.max(sources.length, targets.length);
  const most = Math.max(...pairs.map((pair) => pair.bytes), 1);
  const lanes = pairs.map((pair) => {
    const y0 = ROW * (sources.indexOf(pair.source) + 0.5);
    const y1 = ROW * (targets.indexOf(pair.target) + 0.5);
    const width = 1.5 + 7 * Math.sqrt(pair.bytes / most);
    return svg("path", {
      class: pair.idle_s < BUSY_S ? "lane busy" : "lane",
      d: `M110,${y0} C210,${y0} 210,${y1} ${WIDTH - 110},${y1}`,
      stroke: names.color(pair.source),
      "stroke-width": width.toFixed(1),
    }, svg("title", {}, `${names.short(pair.source)} → ${names.short(pair.target)}: ${bytes(pair.bytes)}`));
  });
  const label = (url, y, anchor, x) =>
    svg("text", { x, y: y + 4, "text-anchor": anchor }, names.short(url));
  const picture = svg("svg", {
    viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": "Transfers between instances",
  }, lanes,
  sources.map((url, i) => label(url, ROW * (i + 0.5), "end", 102)),
  targets.map((url, i) => label(url, ROW * (i + 0.5), "start", WIDTH - 102)));
  const rows = pairs.slice(0, 8).map((pair) => el("tr", {},
    el("td", {}, swatch(names.color(pair.source)), names.short(pair.source), " → ",
      swatch(names.color(pair.target)), names.short(pair.target)),
    el("td", { class: "number" }, bytes(pair.bytes)),
    el("td", { class: "number" }, pair.seconds > 0 ? `${bytes(pair.bytes / pair.seconds)}/s` : "–"),
    el("td", { class: "number" }, count(pair.fetches),
      pair.partial ? el("span", { class: "quiet" }, ` (${pair.partial} partial)`) : null,
      pair.short ? el("span", { class: "warn" }, ` (${pair.short} short)`) : null),
    el("td", { class: "number quiet" }, pair.idle_s < 1 ? "now" : `${duration(pair.idle_s)} ago`)));
  const head = el("thead", {}, el("tr", {}, ["From → to", "Bytes", "Speed", "Fetches", "Last"].map((name, i) =>
    el("th", { scope: "col", class: i ? "number" : null }, name))));
  byId("lanes").replaceChildren(picture, el("div", { class: "scroll" }, el("table", {}, head, el("tbody", {}, rows))));
}
