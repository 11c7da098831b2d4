// The stream of events, read with fetch: an EventSource could not show a key.

const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 10000;
const SILENCE_MS = 15000;

export class Stream {
  constructor(handlers, onState) {
    this.handlers = handlers;
    this.onState = onState;
    this.key = sessionStorage.getItem("memserve-key") || "";
    this.pause = FIRST_PAUSE_MS;
  }

  use(key) {
    this.key = key;
    sessionStorage.setItem("memserve-key", key);
    this.wake?.();
  }

  async run() {
    for (;;) {
      try {
        const ended = await this.read();
        if (ended === "refused") await new Promise((resolve) => { this.wake = resolve; });
        // A stream that ends well is asked for again at once; so ends do not pile up in time.
        this.pause = FIRST_PAUSE_MS;
      } catch (error) {
        this.onState("broken", String(error.message || error));
        await new Promise((resolve) => setTimeout(resolve, this.pause));
        this.pause = Math.min(2 * this.pause, LONGEST_PAUSE_MS);
      }
    }
  }

  async read() {
    const abort = new AbortController();
    let timer = setTimeout(() => abort.abort(), SILENCE_MS);
    const headers = this.key ? { Authorization: `Bearer ${this.key}` } : {};
    try {
      const response = await fetch("/dashboard/events", { headers, signal: abort.signal });
      if (response.status === 401) {
        this.onState("refused", this.key ? "not this key" : "");
        return "refused";
      }
      if (!response.ok) throw new Error(`the router answered ${response.status}`);
      this.onState("live", "");
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      let waiting = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) return "ended";
        clearTimeout(timer);
        timer = setTimeout(() => abort.abort(), SILENCE_MS);
        waiting += value;
        const frames = waiting.split("\n\n");
        waiting = frames.pop();
        frames.forEach((frame) => this.handle(frame));
      }
    } finally {
      clearTimeout(timer);
      abort.abort();
    }
  }

  handle(frame) {
    let kind = "message";
    const data = [];
    for (const line of frame.split("\n")) {
      if (line.startsWith("event: ")) kind = line.slice(7);
      if (line.startsWith("data: ")) data.push(line.slice(6));
    }
    this.handlers[kind]?.(JSON.parse(data.join("\n")));
  }
}
