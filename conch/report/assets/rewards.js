"use strict";
/* Distributions of scores by step. */

const rewards = { score: "reward", source: "", step: null };
const BINS = 40;

/** Steps of a run with the values of a score at each. */
function valuesByStep(run, source, score) {
  const steps = new Map();
  for (const block of store.blockList) {
    if (block.run !== run || block.source !== source || !block.columns[score]) continue;
    if (!steps.has(block.step)) steps.set(block.step, []);
    const values = steps.get(block.step);
    for (const value of block.columns[score]) if (value !== null) values.push(value);
  }
  return new Map([...steps].filter(([, values]) => values.length).sort(([a], [b]) => a - b));
}

function histogram(values, low, width) {
  const counts = new Array(BINS).fill(0);
  for (const value of values) counts[Math.max(0, Math.min(BINS - 1, Math.floor((value - low) / width)))]++;
  return counts.map((count) => count / values.length);
}

const rewardsTab = {
  id: "rewards",
  title: "Rewards",
  mount(root) {
    this.score = el("select", { onchange: (event) => { rewards.score = event.target.value; this.refresh(); } });
    this.source = el("select", { onchange: (event) => { rewards.source = event.target.value; this.refresh(); } });
    this.slider = el("input", { type: "range", min: "0", step: "1", style: { width: "260px" }, oninput: (event) => { rewards.step = Number(event.target.value); this.drawStep(); } });
    this.stepName = el("span", { class: "num" });
    this.content = el("div", { class: "grid wide" });
    root.append(el("div", { class: "tools" }, el("label", {}, "score", this.score), el("label", {}, "of", this.source), el("label", {}, "histogram at", this.slider, this.stepName)), this.content);
  },
  refresh() {
    const kinds = [...new Set(store.blockList.map((block) => block.source))];
    rewards.source = fillSelect(this.source, kinds.map((kind) => [kind, SOURCES[kind]]), rewards.source);
    const blocks = store.blockList.filter((block) => block.source === rewards.source && isShown(block.run));
    rewards.score = fillSelect(this.score, scoreNames(blocks).map((name) => [name, name]), rewards.score);
    this.values = new Map(shownRuns().map((run) => [run, valuesByStep(run, rewards.source, rewards.score)]).filter(([, steps]) => steps.size));
    if (!this.values.size) {
      this.content.replaceChildren(el("p", { class: "empty" }, "These runs kept no samples with a score."));
      return;
    }
    const all = [...this.values.values()].flatMap((steps) => [...steps.values()]);
    this.low = Math.min(...all.map((values) => values.reduce((a, b) => Math.min(a, b))));
    const high = Math.max(...all.map((values) => values.reduce((a, b) => Math.max(a, b))));
    this.width = (high - this.low) / BINS || 1;
    this.steps = [...new Set([...this.values.values()].flatMap((steps) => [...steps.keys()]))].sort((a, b) => a - b);
    this.slider.max = String(this.steps.length - 1);
    if (rewards.step === null || rewards.step >= this.steps.length) rewards.step = this.steps.length - 1;
    this.slider.value = String(rewards.step);
    this.single = chartCard("Histogram", `${rewards.score}, dotted: the first step`);
    const maps = [...this.values].map(([run, steps]) => this.map(run, steps));
    this.content.replaceChildren(this.single.root, ...maps);
    this.drawStep();
    dropCharts();
  },
  centres() {
    return Array.from({ length: BINS }, (_, k) => this.low + (k + .5) * this.width);
  },
  map(run, steps) {
    const label = store.runs.length > 1 ? ` · ${store.runs[run].label}` : "";
    const card = chartCard(`By step${label}`, "share of the samples; line: mean");
    const columns = [...steps.values()].map((values) => histogram(values, this.low, this.width));
    const shares = this.centres().map((_, bin) => columns.map((column) => column[bin]));
    const colour = colourOf(run);
    setChart(card.plot, [
      { type: "heatmap", x: [...steps.keys()], y: this.centres(), z: shares, showscale: false, hovertemplate: "step %{x}, %{y:.3g}: %{z:.1%}<extra></extra>",
        colorscale: [[0, css("--card")], [.15, faded(colour, .35)], [.5, faded(colour, .8)], [1, colour]] },
      { x: [...steps.keys()], y: [...steps.values()].map(mean), mode: "lines+markers", line: { color: css("--text"), width: 1.5 }, marker: { size: 4 }, hovertemplate: "mean %{y:.4g}<extra></extra>" }],
      { hovermode: "closest", xaxis: { title: { text: "step" } }, yaxis: { title: { text: rewards.score } } });
    return card.root;
  },
  drawStep() {
    const step = this.steps[rewards.step];
    this.stepName.textContent = `step ${step}`;
    const traces = [];
    for (const [run, steps] of this.values) {
      const first = [...steps.keys()][0];
      const label = store.runs.length > 1 ? `${store.runs[run].label} · ` : "";
      const line = (at, dash, width) => ({ x: this.centres(), y: histogram(steps.get(at), this.low, this.width), name: `${label}step ${at}`, mode: "lines",
        line: { color: colourOf(run), shape: "hvh", dash, width }, hovertemplate: "%{y:.1%}" });
      if (steps.has(step)) traces.push({ ...line(step, "solid", 2), fill: "tozeroy", fillcolor: faded(colourOf(run), .18) });
      if (first !== step) traces.push(line(first, "dot", 1.4));
    }
    setChart(this.single.plot, traces, { xaxis: { title: { text: rewards.score } }, yaxis: { title: { text: "share" }, tickformat: ".0%" } });
  },
};
