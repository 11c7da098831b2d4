// The merged tree as an icicle: width is tokens, rows go down a prefix, bands are holders.
// A solid band is HBM, a hatched one DRAM, both is solid above hatched.

import { byId, el, svg, swatch } from "./dom.js";
import { bytes, count, duration } from "./words.js";

const ROW = 30;
const BANDS = 5;
const LEAST_WIDTH = 1.5;
const HBM = 1;
const DRAM = 2;

export class Tree {
  constructor(names) {
    this.names = names;
    this.nodes = [];
    this.root = null; // key of the node that fills the width; null: the whole tree
    this.chosen = null;
    this.pageSize = 0;
    this.pageBytes = 0;
    byId("whole").addEventListener("click", () => this.zoom(null));
    new ResizeObserver(() => this.draw()).observe(byId("tree"));
  }

  learn(tree) {
    this.members = tree.members;
    this.about = tree;
    const column = Object.fromEntries(tree.columns.map((name, i) => [name, i]));
    this.nodes = tree.nodes.map((row, place) => {
      const node = { place, children: [] };
      for (const [name, i] of Object.entries(column)) node[name] = row[i];
      node.id = node.key || `rest of ${node.above < 0 ? "all" : tree.nodes[node.above][column.key]}`;
      return node;
    });
    this.roots = [];
    for (const node of this.nodes) {
      (node.above < 0 ? this.roots : this.nodes[node.above].children).push(node);
    }
    this.draw();
  }

  sized(pageSize, pageBytes) {
    this.pageSize = pageSize;
    this.pageBytes = pageBytes;
  }

  zoom(id) {
    this.root = id;
    this.draw();
    this.focusOn(this.chosen);
  }

  draw() {
    const area = byId("tree");
    const width = area.clientWidth;
    if (!width || !this.about) return;
    byId("tree-about").textContent = `${count(this.about.pages * this.pageSize)} tokens in `
      + `${count(this.about.runs)} runs${this.about.complete ? "" : " (not all surveyed)"}`;
    const top = this.root === null ? null : this.nodes.find((node) => node.id === this.root);
    byId("whole").hidden = !top;
    if (!this.nodes.length) {
      area.replaceChildren(el("p", { class: "quiet" }, "No instance holds a page yet."));
      return;
    }
    const held = area.contains(document.activeElement);
    this.groups = new Map();
    this.depth = 0;
    const groups = [];
    const place = (nodes, x, room, row) => {
      const total = nodes.reduce((sum, node) => sum + node.weight, 0);
      let at = x;
      for (const node of nodes) {
        const share = (room * node.weight) / total;
        if (share >= LEAST_WIDTH) {
          groups.push(this.group(node, at, row * ROW, share));
          this.depth = Math.max(this.depth, row + 1);
          // A run's own pages are no longer than its subtree: children share what is below it.
          const below = node.children.reduce((sum, child) => sum + child.weight, 0);
          if (below) place(node.children, at, (share * below) / node.weight, row + 1);
        }
        at += share;
      }
    };
    place(top ? [top] : this.roots, 0, width, 0);
    area.replaceChildren(svg("svg", {
      width, height: this.depth * ROW + 2, role: "group", "aria-label": "Merged prefix tree",
    }, this.patterns(), groups));
    this.legend();
    const first = this.chosen && this.groups.has(this.chosen) ? this.chosen : groups.length && this.first;
    if (first) this.groups.get(first).setAttribute("tabindex", "0");
    if (held) this.focusOn(first);
    const chosen = this.nodes.find((node) => node.id === this.chosen);
    if (chosen) this.detail(chosen);
  }

  group(node, x, y, width) {
    if (!this.groups.size) this.first = node.id;
    const height = ROW - 2;
    const holders = node.holders.slice(0, BANDS);
    const band = height / Math.max(holders.length, 1);
    const bands = holders.flatMap(([who, tiers], i) => {
      const top = y + i * band;
      const solid = { x, y: top, width, height: band, fill: this.names.color(this.members[who]) };
      const hatched = { ...solid, fill: `url(#hatch-${who})` };
      if (tiers === HBM) return [svg("rect", solid)];
      if (tiers === DRAM) return [svg("rect", hatched)];
      return [svg("rect", { ...solid, height: band / 2 }),
        svg("rect", { ...hatched, y: top + band / 2, height: band / 2 })];
    });
    const label = `${count(node.pages * this.pageSize)}${node.key ? "" : " in smaller runs"}`;
    const group = svg("g", {
      class: "run", role: "button", tabindex: "-1", "aria-pressed": String(node.id === this.chosen),
      "aria-label": this.spoken(node),
      onclick: () => this.choose(node),
      ondblclick: () => this.zoom(node.children.length ? node.id : this.root),
      onkeydown: (event) => this.moved(event, node),
    },
    svg("rect", { class: "back", x, y, width, height }), bands,
    svg("rect", { class: "frame", x: x + 0.5, y: y + 0.5, width: Math.max(width - 1, 0.5), height: height - 1 }),
    width > 8 * label.length + 10 ? svg("text", { x: x + 6, y: y + 18 }, label) : null,
    svg("title", {}, this.spoken(node)));
    this.groups.set(node.id, group);
    return group;
  }

  spoken(node) {
    const who = node.holders.map(([at, tiers]) => `${this.names.short(this.members[at])} ${tierWords(tiers)}`);
    const what = node.key ? `${count(node.pages * this.pageSize)} tokens` : `${count(node.runs)} smaller runs`;
    return `${what} after ${count(node.start * this.pageSize)}: ${who.join(", ")}`;
  }

  choose(node) {
    const before = this.groups.get(this.chosen);
    before?.setAttribute("aria-pressed", "false");
    this.chosen = node.id;
    for (const group of this.groups.values()) group.setAttribute("tabindex", "-1");
    const group = this.groups.get(node.id);
    group?.setAttribute("aria-pressed", "true");
    group?.setAttribute("tabindex", "0");
    this.detail(node);
  }

  moved(event, node) {
    const siblings = (node.above < 0 ? this.roots : this.nodes[node.above].children)
      .filter((one) => this.groups.has(one.id));
    const at = siblings.indexOf(node);
    const steps = {
      ArrowUp: () => this.nodes[node.above],
      ArrowDown: () => node.children.find((one) => this.groups.has(one.id)),
      ArrowLeft: () => siblings[at - 1],
      ArrowRight: () => siblings[at + 1],
    };
    if (event.key === "Enter" || event.key === " ") this.zoom(node.children.length ? node.id : this.root);
    else if (event.key === "Escape") this.zoom(null);
    else if (steps[event.key]) {
      const next = steps[event.key]();
      if (next && this.groups.has(next.id)) {
        this.choose(next);
        this.focusOn(next.id);
      }
    } else return;
    event.preventDefault();
  }

  focusOn(id) {
    this.groups?.get(id)?.focus();
  }

  detail(node) {
    const fact = (name, value) => [el("dt", {}, name), el("dd", {}, value)];
    const tokens = node.pages * this.pageSize;
    byId("detail").replaceChildren(
      el("h3", {}, node.key ? "Run of pages" : `${count(node.runs)} smaller runs together`),
      el("dl", {},
        node.key ? fact("First page", el("span", { class: "mono" }, node.key)) : [],
        fact("Tokens", count(tokens)),
        fact("Comes after", `${count(node.start * this.pageSize)} tokens`),
        fact("Bytes, a copy", bytes(node.pages * this.pageBytes)),
        fact("Below it", `${count((node.weight - node.pages) * this.pageSize)} tokens`),
        fact("Hits", `${count(node.hits)} through it`),
        fact("Last hit", node.used_s === null ? "none seen" : `${duration(node.used_s)} ago`),
        node.known_s === null ? [] : fact("First hit", `${duration(node.known_s)} ago`)),
      el("h3", {}, `Held by ${node.holders.length}`),
      el("ul", {}, node.holders.map(([who, tiers]) => el("li", {},
        swatch(this.names.color(this.members[who])), this.names.short(this.members[who]),
        el("span", { class: "quiet" }, ` ${tierWords(tiers)}`)))));
  }

  patterns() {
    return svg("defs", {}, this.members.map((url, who) => svg("pattern", {
      id: `hatch-${who}`, width: 6, height: 6, patternUnits: "userSpaceOnUse",
      patternTransform: "rotate(45)",
    },
    svg("rect", { width: 6, height: 6, fill: this.names.color(url), opacity: 0.35 }),
    svg("rect", { width: 3, height: 6, fill: this.names.color(url), opacity: 0.9 }))));
  }

  legend() {
    const sample = (fill) => svg("svg", { viewBox: "0 0 14 14", "aria-hidden": "true" },
      svg("rect", { width: 14, height: 14, rx: 3, fill }));
    const shown = this.members.slice(0, 16);
    byId("legend").replaceChildren(
      ...shown.map((url) => el("li", {}, sample(this.names.color(url)), this.names.short(url))),
      this.members.length > shown.length
        ? el("li", { class: "quiet" }, `and ${this.members.length - shown.length} more`) : "",
      this.members.length ? el("li", { class: "quiet" }, "solid: HBM, ", sample("url(#hatch-0)"), "hatched: DRAM") : "");
  }
}

function tierWords(tiers) {
  return { [HBM]: "HBM", [DRAM]: "DRAM", [HBM + DRAM]: "HBM and DRAM" }[tiers] || "";
}
