"use strict";
/* What the page knows: runs, strings, blocks of samples; and helpers that insert texts as text, never as HTML. */

const store = {
  mode: document.documentElement.dataset.mode,
  version: 0,
  session: "",       // of the server that the data is from
  strings: [],       // prompts and metadata, which blocks point into
  blocks: new Map(), // id -> samples of one file
  runs: [],
  settings: { rows: [] },
  hidden: new Set(), // labels of runs that are switched off
  count: 0,          // of samples
  blockOf: new Uint32Array(0), // sample -> place in blockList
  rowOf: new Uint32Array(0),   // sample -> its row there
  blockList: [],
};

const COLOURS = ["#3b76f0", "#e8683f", "#1fa97c", "#9a62e0", "#d99a06", "#0ea5b7", "#d9467f", "#7c8798"];
const colourOf = (run) => COLOURS[run % COLOURS.length];
const isShown = (run) => !store.hidden.has(store.runs[run].label);
const shownRuns = () => store.runs.map((_, run) => run).filter(isShown);

/** Data of the page itself: gzip in base64. */
async function unpack(text) {
  const binary = atob(text.trim());
  const bytes = new Uint8Array(binary.length);
  for (let k = 0; k < binary.length; k++) bytes[k] = binary.charCodeAt(k);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

/** Take up what is new. The result leads from a sample's old number to its new one, -1 where it is gone. */
function applyUpdate(update) {
  const before = { blockList: store.blockList, blockOf: store.blockOf, rowOf: store.rowOf };
  store.version = update.version;
  store.session = update.session ?? "";
  store.made = update.made;
  store.conch = update.conch;
  store.runs = update.runs;
  store.settings = update.settings;
  store.strings.length = update.first_string;
  for (const text of update.strings) store.strings.push(text);
  store.lowStrings = null;
  for (const block of update.blocks) store.blocks.set(block.id, block);
  const valid = new Set(update.ids);
  for (const id of [...store.blocks.keys()]) if (!valid.has(id)) store.blocks.delete(id);
  // In a file's order an evaluation comes before the rollouts of later steps.
  store.blockList = [...store.blocks.values()].sort(
    (a, b) => a.run - b.run || a.source.localeCompare(b.source) || a.step - b.step || a.variant.localeCompare(b.variant));
  store.count = store.blockList.reduce((sum, block) => sum + block.output.length, 0);
  store.blockOf = new Uint32Array(store.count);
  store.rowOf = new Uint32Array(store.count);
  let place = 0;
  const starts = new Map();
  store.blockList.forEach((block, index) => {
    starts.set(block.id, place);
    for (let row = 0; row < block.output.length; row++, place++) {
      store.blockOf[place] = index;
      store.rowOf[place] = row;
    }
  });
  return (sample) => {
    const id = before.blockList[before.blockOf[sample]].id, row = before.rowOf[sample];
    return starts.has(id) && row < store.blocks.get(id).output.length ? starts.get(id) + row : -1;
  };
}

const blockAt = (sample) => store.blockList[store.blockOf[sample]];
const valueOf = (block, row, name) => block.columns[name]?.[row] ?? null;

/** Names of figures that samples have, `reward` and `gold` first. */
function scoreNames(blocks = store.blockList) {
  const names = new Set();
  for (const block of blocks) for (const name of Object.keys(block.columns)) names.add(name);
  const first = ["reward", "gold"].filter((name) => names.has(name));
  return [...first, ...[...names].filter((name) => !first.includes(name)).sort()];
}

const SOURCES = { evaluation: "evaluation", rollout: "training", table: "evaluation (first rows)" };

function blockName(block, withRun = store.runs.length > 1) {
  const run = withRun ? `${store.runs[block.run].label} · ` : "";
  const source = block.source === "rollout" ? " (training)" : "";
  return `${run}step ${block.step}${source}${block.variant ? ` ${block.variant}` : ""}`;
}

/** Prompt -> rows of a block. */
function rowsByPrompt(block) {
  if (!block.byPrompt) {
    block.byPrompt = new Map();
    block.prompt.forEach((prompt, row) => {
      if (!block.byPrompt.has(prompt)) block.byPrompt.set(prompt, []);
      block.byPrompt.get(prompt).push(row);
    });
  }
  return block.byPrompt;
}

/** Prompt -> mean of a figure over its completions in a block. */
function meansByPrompt(block, name) {
  const means = new Map();
  for (const [prompt, rows] of rowsByPrompt(block)) {
    const values = rows.map((row) => valueOf(block, row, name)).filter((value) => value !== null);
    if (values.length) means.set(prompt, mean(values));
  }
  return means;
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

function shown(value, digits = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return String(value);
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : String(Number(value.toPrecision(digits)));
}

/** A new element; strings among the children become text. Event handlers are given as `onclick` and so on. */
function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else if (name === "style") Object.assign(element.style, value);
    else if (name in element && typeof value !== "string") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

const dot = (run) => el("span", { class: "dot", style: { background: colourOf(run) } });

/** Let a handler run once no further event has come for a moment. */
function settled(handler, milliseconds = 90) {
  let timer;
  return (...args) => {
    clearTimeout(timer);
    timer = setTimeout(() => handler(...args), milliseconds);
  };
}

function fillSelect(select, choices, value) {
  select.replaceChildren(...choices.map(([key, text]) => el("option", { value: String(key) }, text)));
  const keys = choices.map(([key]) => String(key));
  select.value = keys.includes(String(value)) ? String(value) : keys[0] ?? "";
  return select.value;
}

/** A list of any length, of which only the rows in sight are elements. */
class VirtualList {
  constructor(kind, height, makeRow, onChoose) {
    Object.assign(this, { kind, height, makeRow, onChoose, items: [], chosen: -1 });
    this.space = el("div", { class: "space" });
    this.root = el("div", { class: "list", tabindex: "0", role: "listbox" }, this.space);
    this.root.addEventListener("scroll", () => this.draw());
    this.root.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.draw()).observe(this.root);
  }

  show(items, keepScroll = false) {
    this.items = items;
    // Browsers stop at about 17 million pixels: what is further down is reached by a filter.
    this.space.style.height = `${Math.min(items.length * this.height, 16e6)}px`;
    if (!keepScroll) this.root.scrollTop = 0;
    this.draw();
  }

  draw() {
    const first = Math.max(0, Math.floor(this.root.scrollTop / this.height) - 4);
    const last = Math.min(this.items.length, first + Math.ceil(this.root.clientHeight / this.height) + 9);
    const rows = [];
    for (let place = first; place < last; place++) {
      const row = el("div", { class: `row ${this.kind}${place === this.chosen ? " chosen" : ""}`, role: "option" },
        ...this.makeRow(this.items[place]));
      row.style.top = `${place * this.height}px`;
      row.style.height = `${this.height}px`;
      row.addEventListener("click", () => this.choose(place));
      rows.push(row);
    }
    this.space.replaceChildren(...rows);
  }

  choose(place) {
    if (place < 0 || place >= this.items.length) return;
    this.chosen = place;
    const top = place * this.height;
    if (top < this.root.scrollTop) this.root.scrollTop = top;
    if (top + this.height > this.root.scrollTop + this.root.clientHeight) {
      this.root.scrollTop = top + this.height - this.root.clientHeight;
    }
    this.draw();
    this.onChoose(this.items[place]);
  }

  key(event) {
    const moves = { ArrowDown: 1, ArrowUp: -1, j: 1, k: -1, PageDown: 15, PageUp: -15 };
    if (!(event.key in moves)) return;
    event.preventDefault();
    const place = this.chosen + moves[event.key];
    this.choose(Math.max(0, Math.min(this.items.length - 1, place)));
  }
}

/** A text with the places of a pattern marked. */
function marked(text, pattern) {
  if (!pattern) return [text];
  const parts = [];
  let end = 0;
  for (const match of text.matchAll(pattern)) {
    if (match[0] === "" || parts.length > 400) continue;
    parts.push(text.slice(end, match.index), el("mark", {}, match[0]));
    end = match.index + match[0].length;
  }
  return [...parts, text.slice(end)];
}
