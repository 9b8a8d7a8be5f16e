"use strict";
/* The same prompt at several steps, of one run or of several; and how prompts changed between two evaluations. */

const compared = { prompt: -1, slots: [], find: "", score: "reward", differences: true, then: "", now: "" };

/** Blocks with more than one figure in common are compared first and last. */
function usualSlots() {
  const kept = store.blockList.filter((block) => isShown(block.run));
  const evaluations = kept.filter((block) => block.source !== "rollout");
  const from = evaluations.length ? evaluations : kept;
  const slots = [];
  for (const run of new Set(from.map((block) => block.run))) {
    const own = from.filter((block) => block.run === run);
    if (!slots.length) slots.push(own[0].id);
    slots.push(own[own.length - 1].id);
  }
  return [...new Set(slots)].slice(0, 4);
}

function comparePrompt(prompt, block) {
  compared.prompt = prompt;
  compared.slots = compared.slots.filter((id) => store.blocks.has(id));
  if (!compared.slots.includes(block.id)) {
    const first = store.blockList.find((other) => other.run === block.run && other.source === block.source && rowsByPrompt(other).has(prompt));
    compared.slots = [...new Set([first.id, block.id])];
  }
  showTab("compare");
}

const compareTab = {
  id: "compare",
  title: "Compare",
  mount(root) {
    const refresh = settled(() => this.refresh());
    this.list = new VirtualList("prompt", 34, (prompt) => [el("span", {}, tail(store.strings[prompt]))], (prompt) => {
      compared.prompt = prompt;
      this.draw();
    });
    this.list.root.id = "prompt-list";
    this.columns = el("div");
    root.append(el("div", { class: "split left" },
      el("div", { class: "card" }, el("div", { class: "rowhead" }, el("input", { type: "search", placeholder: "Find a prompt", "aria-label": "Find a prompt",
        oninput: (event) => { compared.find = event.target.value.toLowerCase(); refresh(); } })), this.list.root),
      this.columns));
  },
  refresh() {
    compared.slots = compared.slots.filter((id) => store.blocks.has(id));
    if (!compared.slots.length) compared.slots = usualSlots();
    const blocks = compared.slots.map((id) => store.blocks.get(id));
    const prompts = new Set(blocks.flatMap((block) => [...rowsByPrompt(block).keys()]));
    const low = lowered(store, "lowStrings", store.strings);
    const listed = [...prompts].filter((prompt) => low[prompt].includes(compared.find));
    if (!prompts.has(compared.prompt)) compared.prompt = listed[0] ?? -1;
    this.list.chosen = listed.indexOf(compared.prompt);
    this.list.show(listed);
    if (this.list.chosen >= 0) this.list.root.scrollTop = Math.max(0, this.list.chosen * 34 - 120);
    this.draw();
  },
  draw() {
    if (!store.count) {
      this.columns.replaceChildren(el("p", { class: "empty" }, "These runs kept no samples to compare."));
      return;
    }
    const places = this.list.items;
    const at = places.indexOf(compared.prompt);
    const move = (by) => this.list.choose(Math.max(0, Math.min(places.length - 1, at + by)));
    const slots = compared.slots.map((id, place) => this.slot(store.blocks.get(id), place));
    this.columns.replaceChildren(
      el("div", { class: "tools" },
        el("button", { class: "plain", type: "button", onclick: () => move(-1) }, "← previous"),
        el("button", { class: "plain", type: "button", onclick: () => move(1) }, "next →"),
        el("span", { class: "soft" }, `${at + 1} of ${places.length} prompts`),
        el("label", {}, el("input", { type: "checkbox", checked: compared.differences, onchange: (event) => { compared.differences = event.target.checked; this.draw(); } }), "mark differences to the first column"),
        el("button", { class: "plain", type: "button", onclick: () => { compared.slots.push(compared.slots[compared.slots.length - 1]); this.draw(); } }, "+ column")),
      el("pre", { class: "text", id: "compared-prompt" }, compared.prompt >= 0 ? store.strings[compared.prompt] : ""),
      el("div", { class: "columns", style: { marginTop: "12px" } }, slots));
  },
  slot(block, place) {
    const choices = store.blockList.filter((other) => isShown(other.run) || other.id === block.id).map((other) => [other.id, blockName(other)]);
    const select = el("select", { "aria-label": "Step", onchange: (event) => { compared.slots[place] = event.target.value; this.refresh(); } });
    fillSelect(select, choices, block.id);
    const rows = rowsByPrompt(block).get(compared.prompt) ?? [];
    const first = store.blocks.get(compared.slots[0]);
    const before = (rowsByPrompt(first).get(compared.prompt) ?? []).map((row) => first.output[row]);
    const completions = rows.slice(0, 50).map((row, k) => {
      const text = block.output[row];
      const other = before[Math.min(k, before.length - 1)];
      const body = place > 0 && compared.differences && other !== undefined ? differences(other, text) : [text];
      return el("div", { class: "completion" }, sampleFacts(block, row, true), el("pre", { class: "text" }, ...body));
    });
    const close = place > 0 ? el("button", { class: "quiet", type: "button", title: "Remove the column", onclick: () => { compared.slots.splice(place, 1); this.draw(); } }, "×") : null;
    const more = rows.length > 50 ? [el("p", { class: "soft" }, `and ${rows.length - 50} more`)] : [];
    return el("div", { class: "card slot" }, el("div", { class: "tools", style: { marginBottom: "0" } }, dot(block.run), select, close),
      completions.length ? completions : el("p", { class: "empty" }, "nothing for this prompt"), more);
  },
};

/** The words of `now`, those that `then` has not in `ins`, and what went in `del`. */
function differences(then, now) {
  const words = (text) => text.match(/\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu) ?? [];
  const a = words(then), b = words(now);
  if (a.length * b.length > 4e6) return [now];
  // Longest common subsequence, from the end: lengths[i][j] of a from i and b from j.
  const width = b.length + 1;
  const lengths = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      lengths[i * width + j] = a[i] === b[j] ? lengths[(i + 1) * width + j + 1] + 1 : Math.max(lengths[(i + 1) * width + j], lengths[i * width + j + 1]);
    }
  }
  const parts = [];
  const add = (tag, word) => {
    const last = parts[parts.length - 1];
    if (last && last[0] === tag) last[1] += word;
    else parts.push([tag, word]);
  };
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) { add("", b[j]); i++; j++; }
    else if (j >= b.length || (i < a.length && lengths[(i + 1) * width + j] >= lengths[i * width + j + 1])) add("del", a[i++]);
    else add("ins", b[j++]);
  }
  return parts.map(([tag, text]) => (tag ? el(tag, {}, text) : text));
}

/** Paired change of each prompt between two blocks. */
function changesBetween(then, now, score) {
  const before = meansByPrompt(then, score), after = meansByPrompt(now, score);
  const changes = [];
  for (const [prompt, value] of after) {
    if (before.has(prompt)) changes.push({ prompt, then: before.get(prompt), now: value, change: value - before.get(prompt) });
  }
  return changes.sort((a, b) => a.change - b.change);
}

const changesTab = {
  id: "changes",
  title: "Changes",
  mount(root) {
    const choose = (name) => (event) => { compared[name] = event.target.value; this.refresh(); };
    this.then = el("select", { id: "then", onchange: choose("then") });
    this.now = el("select", { id: "now", onchange: choose("now") });
    this.score = el("select", { "aria-label": "Score", onchange: choose("score") });
    this.figures = el("div", { class: "figures" });
    this.card = chartCard("Each prompt's mean, then and now", "below the line: fallen", { tall: true });
    this.list = new VirtualList("change", 34, (change) => [
      el("span", { class: "right" }, shown(change.then)), el("span", { class: "right" }, shown(change.now)),
      el("b", { class: `right ${change.change < 0 ? "down" : "up"}` }, `${change.change > 0 ? "+" : ""}${shown(change.change)}`),
      el("span", {}, tail(store.strings[change.prompt]))], (change) => {
      compared.slots = [...new Set([compared.then, compared.now])];
      compared.prompt = change.prompt;
      showTab("compare");
    });
    this.list.root.id = "change-list";
    this.body = el("div", {}, this.figures, el("div", { class: "split" },
      el("div", { class: "card" }, el("div", { class: "rowhead change" }, ...["then", "now", "change"].map((text) => el("span", { class: "right" }, text)), el("span", {}, "prompt, the greatest fall first; a click compares")), this.list.root),
      this.card.root));
    this.none = el("p", { class: "empty" }, "Two evaluations are needed that kept their completions (evaluation.keep).");
    root.append(el("div", { class: "tools" }, el("label", {}, "from", this.then), el("label", {}, "to", this.now), el("label", {}, "score", this.score)), this.none, this.body);
  },
  refresh() {
    const blocks = store.blockList.filter((block) => block.source !== "rollout" && isShown(block.run));
    const choices = blocks.map((block) => [block.id, blockName(block)]);
    const usual = blocks.filter((block) => block.run === blocks[0]?.run);
    compared.then = fillSelect(this.then, choices, compared.then || usual[0]?.id);
    compared.now = fillSelect(this.now, choices, store.blocks.has(compared.now) ? compared.now : usual[usual.length - 1]?.id);
    this.none.hidden = blocks.length > 1;
    this.body.hidden = blocks.length < 2;
    if (blocks.length < 2) return;
    const then = store.blocks.get(compared.then), now = store.blocks.get(compared.now);
    const names = scoreNames([then, now]);
    compared.score = fillSelect(this.score, names.map((name) => [name, name]), compared.score);
    const changes = changesBetween(then, now, compared.score);
    this.list.chosen = -1;
    this.list.show(changes);
    this.drawFigures(changes);
    const ends = [...changes.map((each) => each.then), ...changes.map((each) => each.now)];
    const low = ends.reduce((a, b) => Math.min(a, b), Infinity), high = ends.reduce((a, b) => Math.max(a, b), -Infinity);
    setChart(this.card.plot, [
      { x: [low, high], y: [low, high], mode: "lines", line: { color: css("--faint"), width: 1, dash: "dot" }, hoverinfo: "skip" },
      { x: changes.map((each) => each.then), y: changes.map((each) => each.now), mode: "markers", type: "scatter",
        marker: { size: 7, opacity: .75, color: changes.map((each) => (each.change < 0 ? css("--bad") : css("--good"))) },
        text: changes.map((each) => escaped(tail(store.strings[each.prompt]).slice(-70))), hovertemplate: "%{text}<br>%{x:.4g} → %{y:.4g}<extra></extra>" }],
      { hovermode: "closest", xaxis: { title: { text: `${compared.score}, ${blockName(then)}` } }, yaxis: { title: { text: blockName(now) } } });
    dropCharts();
  },
  drawFigures(changes) {
    const values = changes.map((each) => each.change);
    const average = values.length ? mean(values) : null;
    const error = values.length > 1 ? Math.sqrt(values.reduce((sum, value) => sum + (value - average) ** 2, 0) / (values.length - 1) / values.length) : null;
    const share = (test) => (values.length ? `${Math.round(100 * values.filter(test).length / values.length)} %` : "–");
    const figure = (value, text, kind = "") => el("div", { class: "card figure" }, el("b", { class: kind }, value), el("span", {}, text));
    this.figures.replaceChildren(figure(String(values.length), "prompts in both"),
      figure(`${average > 0 ? "+" : ""}${shown(average)}`, `mean change${error === null ? "" : ` ± ${shown(error, 2)} (standard error)`}`, average < 0 ? "down" : "up"),
      figure(share((value) => value > 0), "risen", "up"), figure(share((value) => value < 0), "fallen", "down"), figure(share((value) => value === 0), "the same"));
  },
};

/** A text for a label of a chart, which reads a few tags. */
const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;").replaceAll("%{", "% {");
