// Figures as people read them.

const SCALES = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];

export function count(value) {
  for (const [size, letter] of SCALES) {
    if (Math.abs(value) >= size * (letter === "k" ? 10 : 1)) {
      return `${(value / size).toPrecision(3)}${letter}`;
    }
  }
  return Math.abs(value) < 10 && !Number.isInteger(value)
    ? value.toFixed(1)
    : Math.round(value).toLocaleString("en");
}

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let place = 0;
  while (value >= 1024 && place < units.length - 1) {
    value /= 1024;
    place += 1;
  }
  return `${value >= 100 || place === 0 ? value.toFixed(0) : value.toPrecision(3)} ${units[place]}`;
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 1) return `${(1000 * seconds).toFixed(0)} ms`;
  if (seconds < 100) return `${seconds.toFixed(1)} s`;
  if (seconds < 7200) return `${(seconds / 60).toFixed(0)} min`;
  if (seconds < 172800) return `${(seconds / 3600).toFixed(1)} h`;
  return `${(seconds / 86400).toFixed(0)} d`;
}

export const percent = (part, whole) => (whole > 0 ? `${((100 * part) / whole).toFixed(0)} %` : "–");

// Instances by the shortest names that tell them apart, each with a color of its own.
const COLORS = [
  "#2f6fd6", "#d4641b", "#16916a", "#8a53c9", "#c23b6e", "#8a7414", "#0e8aa8", "#a2493f",
  "#5867b8", "#5f8a1e",
];

export class Names {
  constructor() {
    this.urls = [];
  }

  learn(urls) {
    for (const url of urls) if (!this.urls.includes(url)) this.urls.push(url);
    const hosts = new Set(this.urls.map((url) => url.replace(/:\d+$/, "")));
    this.alone = hosts.size === 1;
  }

  short(url) {
    const bare = url.replace(/^https?:\/\//, "");
    return this.alone ? bare.replace(/^.*(:\d+)$/, "$1") : bare;
  }

  // A sentence with instances in it, by their short names.
  shortened(text) {
    return text.replace(/https?:\/\/[^\s,;()]+/g, (url) => this.short(url));
  }

  color(url) {
    const place = this.urls.indexOf(url);
    return place < 0 ? "#888888" : COLORS[place % COLORS.length];
  }
}
