// Requests that live and requests that ended, with the reason of each decision.

import { bar, byId, el, swatch } from "./dom.js";
import { count, duration, percent } from "./words.js";

function who(url, names) {
  return url ? [swatch(names.color(url)), names.short(url)] : [el("span", { class: "quiet" }, "–")];
}

function phase(one) {
  if (one.phase !== "done") return el("span", { class: "warn" }, one.phase);
  const good = one.status >= 200 && one.status < 300;
  return el("span", { class: good ? "good" : "bad" }, one.status === 499 ? "client left" : String(one.status));
}

export function showRequests(state, names) {
  const ended = state.ended.slice(0, 40);
  byId("requests-about").textContent =
    `${state.living_total} live, ${count(state.totals.requests)} ended`;
  const rows = [...state.living, ...ended].map((one) => el("tr", {},
    el("td", {}, el("span", { class: "mono", title: one.id }, one.id.slice(0, 10)),
      el("span", { class: "quiet" }, ` ${one.route.replace("/v1/", "")}`),
      one.excerpt ? el("span", { class: "excerpt", title: one.excerpt }, one.excerpt) : null),
    el("td", {}, phase(one)),
    el("td", {}, cached(one)),
    el("td", {}, who(one.prefill, names), one.prefill === one.decode ? null : [" → ", who(one.decode, names)]),
    el("td", { class: "number" }, duration(one.ttft_s)),
    el("td", { class: "number" }, duration(one.total_s ?? one.age_s)),
    el("td", { class: "why quiet", title: one.reason }, el("span", { class: "lines" }, names.shortened(one.reason)))));
  if (!rows.length) rows.push(el("tr", {}, el("td", { colspan: 7, class: "quiet" }, "No request yet.")));
  byId("requests").tBodies[0].replaceChildren(...rows);
}

function cached(one) {
  if (!one.prompt_tokens) return el("span", { class: "quiet" }, "–");
  const part = one.cached_tokens ?? 0;
  const label = `${part} of ${one.prompt_tokens} prompt tokens cached`;
  return [bar(part, one.prompt_tokens, label, 1),
    el("span", { title: label }, `${count(one.prompt_tokens)}, ${percent(part, one.prompt_tokens)}`)];
}
