// Who is there, what for, how busy and how full.

import { bar, byId, el, swatch } from "./dom.js";
import { bytes, count, percent } from "./words.js";

const TONES = {
  ready: "good", exact: "good", closed: "good",
  starting: "warn", syncing: "warn", draining: "warn", degraded: "warn", trial: "warn", stale: "warn",
};

const toned = (word) => el("span", { class: word ? TONES[word] || "bad" : "quiet" }, word || "–");

export function showMembers(state, names) {
  const rows = state.members.map((one) => el("tr", {},
    el("td", { title: one.url }, swatch(names.color(one.url)), names.short(one.url)),
    el("td", {}, one.role),
    el("td", {}, toned(one.state),
      one.breaker === "closed" ? null : el("span", { class: "warn" }, ` · breaker ${one.breaker}`)),
    el("td", { class: "number" }, count(Math.max(one.running, one.in_flight))),
    el("td", { class: "number" }, count(one.waiting)),
    el("td", {}, filled(one.hbm_used_tokens, one.hbm_total_tokens, "HBM", (value) => `${count(value)} tok`)),
    el("td", {}, filled(one.dram_used_bytes, one.dram_total_bytes, "DRAM", bytes)),
    el("td", {}, toned(one.source)),
    el("td", { class: "error", title: one.error || null }, one.error || "")));
  if (!rows.length) {
    rows.push(el("tr", {}, el("td", { colspan: 9, class: "quiet" }, "No instance has been heard of yet.")));
  }
  byId("members").tBodies[0].replaceChildren(...rows);
}

function filled(used, total, what, shown) {
  if (!total) return el("span", { class: "quiet" }, "–");
  const label = `${what}: ${shown(used)} of ${shown(total)}`;
  return [bar(used, total, label), el("span", { title: label }, `${percent(used, total)} `),
    el("span", { class: "quiet" }, `of ${shown(total)}`)];
}
