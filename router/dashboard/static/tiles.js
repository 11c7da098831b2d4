// Rates over the last seconds, each with its last two minutes.

import { byId, el, svg } from "./dom.js";
import { bytes, count, duration } from "./words.js";

const KEPT = 120;
const WINDOW_S = 10;
const WIDTH = 160;
const HEIGHT = 28;

const history = [];
const series = new Map();

function rate(name) {
  const last = history[history.length - 1];
  const first = history.find((one) => last.at - one.at <= WINDOW_S) || last;
  const seconds = last.at - first.at;
  return seconds > 0 ? Math.max(last.totals[name] - first.totals[name], 0) / seconds : 0;
}

function median(values) {
  const sorted = values.filter((value) => value !== null).sort((a, b) => a - b);
  return sorted.length ? sorted[Math.floor(sorted.length / 2)] : null;
}

function hitShare(state) {
  const cached = rate("cached_tokens");
  const prompt = rate("prompt_tokens");
  if (prompt > 0) return cached / prompt;
  return state.totals.prompt_tokens > 0 ? state.totals.cached_tokens / state.totals.prompt_tokens : 0;
}

export function showTiles(state) {
  if (history.length && history[history.length - 1].totals.requests > state.totals.requests) {
    history.length = 0; // the router was started anew
  }
  history.push({ at: state.at, totals: state.totals });
  if (history.length > KEPT) history.shift();
  const ttft = median(state.ended.slice(0, 50).map((one) => one.ttft_s));
  const speed = bytes(rate("transfer_bytes")).split(" ");
  const tiles = [
    ["Requests", rate("requests"), count(rate("requests")), "/s"],
    ["In flight", state.living_total, count(state.living_total), ""],
    ["Prompt tokens", rate("prompt_tokens"), count(rate("prompt_tokens")), "/s"],
    ["Not computed again", hitShare(state), (100 * hitShare(state)).toFixed(0), "% of prompts"],
    ["Moved", rate("transfer_bytes"), speed[0], `${speed[1]}/s`],
    ["TTFT, median", ttft ?? 0, ...duration(ttft).split(" "), "of the last 50"],
  ];
  byId("tiles").replaceChildren(...tiles.map(([name, value, shown, ...unit]) => {
    const past = series.get(name) || [];
    past.push(value);
    if (past.length > KEPT) past.shift();
    series.set(name, past);
    return el("div", {},
      el("dt", {}, name),
      el("dd", { class: "value" }, shown, el("span", { class: "unit" }, unit.join(" "))),
      el("dd", { "aria-hidden": "true" }, spark(past)));
  }));
}

function spark(values) {
  if (values.length < 2) return svg("svg", {});
  const most = Math.max(...values, 1e-9);
  const points = values.map((value, i) => {
    const x = WIDTH - (values.length - 1 - i) * (WIDTH / (KEPT - 1));
    return `${x.toFixed(1)},${(HEIGHT - 2 - (HEIGHT - 4) * (value / most)).toFixed(1)}`;
  });
  const from = WIDTH - (values.length - 1) * (WIDTH / (KEPT - 1));
  return svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none" },
    svg("polygon", { class: "spark-area", points: `${from},${HEIGHT} ${points.join(" ")} ${WIDTH},${HEIGHT}` }),
    svg("polyline", { class: "spark-line", points: points.join(" ") }));
}
