// Puts the parts of the page together.

import { byId } from "./dom.js";
import { showLanes } from "./lanes.js";
import { showMembers } from "./members.js";
import { showRequests } from "./requests.js";
import { Stream } from "./stream.js";
import { showTiles } from "./tiles.js";
import { Tree } from "./tree.js";
import { duration, Names } from "./words.js";

const names = new Names();
const tree = new Tree(names);
const TONES = { live: "good", broken: "bad", refused: "warn" };

function onState(kind, why) {
  const pill = byId("live");
  pill.className = `pill ${TONES[kind]}`;
  pill.textContent = kind === "broken" ? `no answer (${why})` : kind === "refused" ? "locked" : kind;
  byId("ask").hidden = kind !== "refused";
  byId("main").hidden = kind === "refused";
  byId("refused").textContent = why && kind === "refused" ? why : "";
}

const stream = new Stream({
  state(state) {
    names.learn(state.members.map((one) => one.url).sort());
    tree.sized(state.router.page_size, state.router.page_bytes);
    byId("about").textContent = [state.router.model, `policy ${state.router.policy}`,
      `up ${duration(state.router.uptime_s)}`, `version ${state.router.version}`].filter(Boolean).join(" · ");
    showTiles(state);
    showMembers(state, names);
    showRequests(state, names);
    showLanes(state, names);
    document.documentElement.dataset.ready = "state";
  },
  tree(view) {
    names.learn(view.members);
    tree.learn(view);
  },
}, onState);

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  stream.use(byId("key").value);
  byId("key").value = "";
});

byId("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("memserve-theme", root.dataset.theme);
});
const theme = localStorage.getItem("memserve-theme");
if (theme) document.documentElement.dataset.theme = theme;

stream.run();
