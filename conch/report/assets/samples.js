"use strict";
/* The samples of all runs: filtered, sorted, and shown one by one. */

const samples = {
  text: "", isPattern: false, source: "", firstStep: "", lastStep: "", low: "", high: "", score: "reward", sort: "order", down: true,
  found: new Int32Array(0), milliseconds: 0,
};

/** The pattern that is looked for; null for none. Throws for a regular expression that is none. */
function searchPattern(flags) {
  if (!samples.text) return null;
  return new RegExp(samples.isPattern ? samples.text : samples.text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"), flags);
}

/** Places of the strings that hold the text that is looked for. */
function matchingStrings(test) {
  const found = new Uint8Array(store.strings.length);
  store.strings.forEach((text, place) => { found[place] = test(text, place, store) ? 1 : 0; });
  return found;
}

/** Lower-case texts, made once: searching them is several times as fast as a pattern that ignores case. */
function lowered(holder, field, texts) {
  if (!holder[field]) holder[field] = texts.map((text) => text.toLowerCase());
  return holder[field];
}

function filterSamples() {
  const started = performance.now();
  const pattern = samples.isPattern ? searchPattern("iu") : null;
  const needle = samples.text.toLowerCase();
  let inPrompt = null;
  if (samples.text) {
    const prompts = pattern ? store.strings : lowered(store, "lowStrings", store.strings);
    inPrompt = matchingStrings((_, place) => (pattern ? pattern.test(prompts[place]) : prompts[place].includes(needle)));
  }
  const number = (text, otherwise) => (text === "" ? otherwise : Number(text));
  const firstStep = number(samples.firstStep, -Infinity), lastStep = number(samples.lastStep, Infinity);
  const low = number(samples.low, -Infinity), high = number(samples.high, Infinity);
  const isBounded = samples.low !== "" || samples.high !== "";
  const found = new Int32Array(store.count);
  let size = 0, start = 0;
  for (const block of store.blockList) {
    const length = block.output.length;
    if (isShown(block.run) && (!samples.source || block.source === samples.source) && block.step >= firstStep && block.step <= lastStep) {
      const outputs = samples.text && !pattern ? lowered(block, "lowOutputs", block.output) : block.output;
      const scores = block.columns[samples.score];
      for (let row = 0; row < length; row++) {
        if (isBounded) {
          const score = scores ? scores[row] : null;
          if (score === null || score < low || score > high) continue;
        }
        if (inPrompt && !inPrompt[block.prompt[row]]) {
          if (!(pattern ? pattern.test(outputs[row]) : outputs[row].includes(needle))) continue;
        }
        found[size++] = start + row;
      }
    }
    start += length;
  }
  samples.found = sortSamples(found.subarray(0, size));
  samples.milliseconds = performance.now() - started;
}

/** Samples by a figure; those without one come last. */
function sortSamples(found) {
  if (samples.sort === "order") return found;
  const keys = new Float64Array(store.count);
  const sign = samples.down ? -1 : 1;
  for (const sample of found) {
    const block = blockAt(sample);
    const value = samples.sort === "step" ? block.step : valueOf(block, store.rowOf[sample], samples.sort);
    keys[sample] = value === null ? Infinity : sign * value;
  }
  return found.slice().sort((a, b) => keys[a] - keys[b] || a - b);
}

const samplesTab = {
  id: "samples",
  title: "Samples",
  mount(root) {
    const refresh = settled(() => this.refresh());
    const input = (type, name, attributes) => el("input", { type, ...attributes, oninput: (event) => { samples[name] = event.target.value; refresh(); } });
    this.search = input("search", "text", { class: "grow", id: "search", placeholder: "Find in prompts and outputs   ( / )", "aria-label": "Find a text" });
    this.source = el("select", { "aria-label": "Source", onchange: (event) => { samples.source = event.target.value; refresh(); } });
    this.score = el("select", { "aria-label": "Score", onchange: (event) => { samples.score = event.target.value; refresh(); } });
    this.count = el("span", { class: "soft num", id: "found" });
    root.append(el("div", { class: "tools" }, this.search,
      el("label", {}, el("input", { type: "checkbox", id: "pattern", onchange: (event) => { samples.isPattern = event.target.checked; refresh(); } }), "pattern"),
      this.source,
      el("label", {}, "steps", input("number", "firstStep", { id: "first-step", placeholder: "first", min: "0" }), "–", input("number", "lastStep", { id: "last-step", placeholder: "last", min: "0" })),
      el("label", {}, this.score, input("number", "low", { id: "low", placeholder: "from", step: "any" }), "–", input("number", "high", { id: "high", placeholder: "to", step: "any" })),
      this.count));
    this.head = el("div", { class: "rowhead sample" });
    this.list = new VirtualList("sample", 34, (sample) => this.row(sample), (sample) => this.open(sample));
    this.list.root.id = "sample-list";
    this.detail = el("div", { class: "card detail", id: "detail" }, el("p", { class: "empty" }, "Choose a sample; the arrow keys go on from it."));
    root.append(el("div", { class: "split" }, el("div", { class: "card" }, this.head, this.list.root), this.detail));
  },
  refresh() {
    const kinds = [...new Set(store.blockList.map((block) => block.source))];
    samples.source = fillSelect(this.source, [["", "all sources"], ...kinds.map((kind) => [kind, SOURCES[kind]])], samples.source);
    samples.score = fillSelect(this.score, scoreNames().map((name) => [name, name]), samples.score);
    this.drawHead();
    try {
      filterSamples();
      this.search.classList.remove("wrong");
    } catch (error) { // a pattern that is half typed
      if (!(error instanceof SyntaxError)) throw error;
      this.search.classList.add("wrong");
      return;
    }
    this.seen = store.count;
    const all = samples.found.length === store.count;
    this.count.textContent = `${samples.found.length.toLocaleString("en")}${all ? "" : ` of ${store.count.toLocaleString("en")}`} samples`;
    this.count.title = `found in ${samples.milliseconds.toFixed(0)} ms`;
    this.list.chosen = -1;
    this.list.show(samples.found);
    if (store.count === 0) this.detail.replaceChildren(el("p", { class: "empty" }, "These runs kept no samples: evaluation.keep and tracking.rollouts ask for them."));
  },
  /** Go on showing the same samples, whose numbers have changed. */
  renumber(numberOf) {
    const chosen = this.list.items[this.list.chosen];
    samples.found = samples.found.map(numberOf).filter((sample) => sample >= 0);
    this.list.chosen = chosen === undefined ? -1 : samples.found.indexOf(numberOf(chosen));
    this.list.show(samples.found, true);
    if (store.count === this.seen) return;
    const more = el("button", { class: "plain", type: "button", id: "more", onclick: () => this.refresh() }, "new samples: show them");
    this.count.replaceChildren(more);
  },
  drawHead() {
    const sorter = (name, text, right = false) => {
      const sign = samples.sort === name ? (samples.down ? " ↓" : " ↑") : "";
      return el("button", { class: right ? "right" : "", type: "button", title: "Sort", onclick: () => {
        if (samples.sort !== name) [samples.sort, samples.down] = [name, true];
        else if (samples.down) samples.down = false;
        else samples.sort = "order";
        this.refresh();
      } }, text + sign);
    };
    const second = this.secondScore();
    this.head.replaceChildren(el("span"), sorter("step", "step", true), sorter(samples.score || "reward", samples.score || "reward", true),
      second ? sorter(second, second, true) : el("span"), sorter("num_tokens", "tokens", true), el("span", {}, "prompt"), el("span", {}, "output"));
  },
  secondScore() {
    return scoreNames().find((name) => name !== samples.score && name !== "num_tokens") ?? "";
  },
  row(sample) {
    const block = blockAt(sample), row = store.rowOf[sample];
    const second = this.secondScore();
    const number = (name) => el("span", { class: "right" }, name ? shown(valueOf(block, row, name)) : "");
    const pattern = searchPattern("giu");
    const prompt = store.strings[block.prompt[row]], output = block.output[row];
    return [dot(block.run), el("span", { class: "right" }, String(block.step)), number(samples.score), number(second), number("num_tokens"),
      el("span", { class: "soft" }, ...marked(tail(prompt), pattern)), el("span", {}, ...marked(around(output, pattern), pattern))];
  },
  open(sample) {
    const block = blockAt(sample), row = store.rowOf[sample];
    const pattern = searchPattern("giu");
    const prompt = store.strings[block.prompt[row]];
    const metadata = block.metadata && block.metadata[row] >= 0 ? store.strings[block.metadata[row]] : "";
    this.detail.replaceChildren(
      el("div", { class: "tools" }, dot(block.run), el("b", {}, blockName(block, true)),
        el("button", { class: "plain", type: "button", id: "compare-this", onclick: () => comparePrompt(block.prompt[row], block) }, "Compare this prompt")),
      sampleFacts(block, row),
      el("h3", {}, "Prompt"), el("pre", { class: "text" }, ...marked(prompt, pattern)),
      el("h3", {}, "Output"), el("pre", { class: "text", id: "output" }, ...marked(block.output[row], pattern)),
      ...(metadata ? [el("h3", {}, "What came with the prompt"), el("pre", { class: "text" }, metadata)] : []));
    this.detail.scrollTop = 0;
  },
};

/** Figures of a sample. brief: without those of an ensemble's members, and other facts. */
function sampleFacts(block, row, brief = false) {
  const numbers = Object.keys(block.columns).filter((name) => !brief || !name.includes("/")).map((name) => [name, shown(valueOf(block, row, name))]);
  const texts = Object.entries(block.texts).map(([name, column]) => [name, column[row]]);
  return el("div", { class: "facts" }, [...numbers, ...texts].filter(([, value]) => value !== "–" && value !== "")
    .map(([name, value]) => el("span", {}, `${name.replaceAll("_", " ")} `, el("b", {}, value))));
}

/** The end of a prompt, which tells prompts with the same beginning apart, on one line. */
function tail(text) {
  const line = text.replace(/\s+/g, " ");
  return line.length > 160 ? `… ${line.slice(-150)}` : line;
}

/** What stands around the first match, on one line. */
function around(text, pattern) {
  const match = pattern ? text.search(pattern) : -1;
  const start = match > 60 ? match - 40 : 0;
  return (start ? "… " : "") + text.slice(start, start + 240).replace(/\s+/g, " ");
}
