"use strict";
/* Tabs with curves: an overview, and every metric that any of the runs has. */

/* Each chart: title, unit, and its lines as [metric, meaning, metric with the standard error]. */
const GROUPS = [
  ["Reward", [
    ["Reward", "mean", [["reward/mean", "training"], ["eval/reward", "evaluation", "eval/reward_standard_error"]]],
    ["Gold, which watches only", "mean of evaluation", [["eval/gold/reward", "gold", "eval/gold/standard_error"]]],
    ["Spread of the rewards", "standard deviation", [["reward/std", "training"]]],
    ["Members' variance", "reward²", [["reward/members_variance", "training"], ["eval/members_variance", "evaluation"]]],
  ]],
  ["Policy", [
    ["KL to the start", "nats per sample", [["policy/kl", "training"], ["eval/kl", "evaluation"]]],
    ["Weight of the KL", "", [["policy/kl_coef", "training"]]],
    ["Entropy", "nats per token", [["policy/entropy", "training"]]],
    ["Length of completions", "tokens", [["rollout/length_mean", "training"], ["eval/length_mean", "evaluation"], ["rollout/length_max", "longest"]]],
    ["Truncated completions", "share", [["rollout/truncated_fraction", "training"]]],
    ["Sampler against trainer", "nats per token", [["rollout/logprob_diff", "training"]]],
  ]],
  ["Loss", [
    ["Loss", "", [["train/loss", "training"], ["eval/loss", "held out"]]],
    ["Policy loss", "", [["train/policy_loss", "training"]]],
    ["Value loss", "", [["train/value_loss", "training"]]],
    ["Clipped tokens", "share", [["train/clip_fraction", "training"]]],
    ["Approximate KL of an update", "nats per token", [["train/approx_kl", "training"]]],
    ["Gradient norm", "before clipping", [["train/grad_norm", "training"]]],
    ["Learning rate", "", [["train/learning_rate", "training"]]],
    ["Explained variance of values", "", [["value/explained_variance", "training"]]],
    ["Held-out accuracy and rank correlation", "", [["eval/accuracy", "accuracy"], ["eval/spearman", "Spearman"]]],
  ]],
  ["Asynchronous training", [
    ["Staleness", "updates", [["staleness/mean", "mean"], ["staleness/max", "oldest"]]],
    ["Idle", "share of the time", [["async/trainer_idle_fraction", "trainer"], ["async/sampler_idle_fraction", "samplers"]]],
    ["Groups", "count", [["async/buffered_groups", "waiting"], ["async/groups_under_way", "being sampled"]]],
  ]],
  ["Speed", [["Response tokens", "tokens/s", [["time/tokens_per_s", "training"]]]]],
];
const SERVER = [
  ["Latency of a reward", "s", [["reward/latency_p50_s", "median"], ["reward/latency_p99_s", "99th percentile"]]],
  ["The trainer waited", "s per step", [["reward/wait_s", "training"]]],
  ["Hidden behind other work", "share", [["reward/hidden_fraction", "training"]]],
  ["Requests and retries", "per step", [["reward/requests", "requests"], ["reward/retries", "retries"]]],
  ["Samples without a request", "equal ones were known", [["reward/deduplicated", "training"]]],
  ["Requests under way at once", "most", [["reward/in_flight", "training"]]],
  ["Failed and degraded samples", "share", [["reward/failed_fraction", "failed"], ["reward/degraded_fraction", "degraded"]]],
  ["Within the server", "s per request", [["reward/queue_s", "queue"], ["reward/compute_s", "compute"]]],
];
/** Metrics that stand in a chart as something else than a line. */
const BESIDE = new Set(["eval/reward_standard_error", "eval/gold/standard_error"]);
const isPhase = (name) => /^time\/\w+_s$/.test(name) && !/per_s$|reference_s$/.test(name);

const curves = { smooth: 0, find: "", logarithmic: false };
const metricNames = () => [...new Set(store.runs.flatMap((run) => Object.keys(run.series ?? {})))].sort();

function metricChart([title, unit, lines]) {
  const there = lines.filter(([name]) => shownRuns().some((run) => metricOf(run, name)));
  if (!there.length) return null;
  const key = there.length > 1 ? there.map(([, text], k) => [["", "dash", "dot"][k % 3], text]) : [];
  const card = chartCard(title, unit, { key });
  const traces = there.flatMap(([name, text, error], k) =>
    linesOf(name, { text: there.length > 1 ? text : "", error, smooth: curves.smooth, dash: DASHES[k % DASHES.length] }));
  const isFlat = traces.every((trace) => trace.y.every((y) => y === 0)); // else from -1 to 1
  setChart(card.plot, traces, { xaxis: { title: { text: "step" } },
    yaxis: { type: curves.logarithmic ? "log" : "linear", rangemode: isFlat ? "tozero" : "normal" } });
  return card.root;
}

/** Seconds of each phase: stacked over the steps of one run. */
function phaseChart(run) {
  const names = Object.keys(store.runs[run].series ?? {}).filter(isPhase);
  if (!names.length) return null;
  const label = store.runs.length > 1 ? ` · ${store.runs[run].label}` : "";
  const card = chartCard(`Time by phase${label}`, "s per step");
  setChart(card.plot, names.map((name, k) => ({ ...metricOf(run, name), name: phaseName(name), stackgroup: "time", mode: "lines",
    line: { width: 0.5, color: COLOURS[k % COLOURS.length] }, fillcolor: faded(COLOURS[k % COLOURS.length], .55), hovertemplate: "%{y:.3g} s" })),
    { xaxis: { title: { text: "step" } }, showlegend: true, legend: { orientation: "h", y: 1.14, font: { size: 11 } } });
  return card.root;
}

const phaseName = (name) => name.slice(5, -2);

/** Mean seconds of each phase, a bar a run. */
function phaseBars() {
  const runs = shownRuns().filter((run) => Object.keys(store.runs[run].series ?? {}).some(isPhase));
  if (runs.length < 2) return null;
  const names = [...new Set(runs.flatMap((run) => Object.keys(store.runs[run].series).filter(isPhase)))];
  const card = chartCard("Mean time of a step by phase", "s");
  setChart(card.plot, names.map((name, k) => ({ type: "bar", orientation: "h", name: phaseName(name), y: runs.map((run) => store.runs[run].label),
    x: runs.map((run) => (metricOf(run, name) ? mean(metricOf(run, name).y) : 0)), marker: { color: COLOURS[k % COLOURS.length] },
    hovertemplate: "%{x:.3g} s" })),
    { barmode: "stack", hovermode: "closest", showlegend: true, legend: { orientation: "h", y: 1.14, font: { size: 11 } }, yaxis: { autorange: "reversed" } });
  return card.root;
}

const curvesTab = {
  id: "curves",
  title: "Curves",
  mount(root) {
    this.content = el("div");
    const redraw = settled(() => this.refresh());
    root.append(el("div", { class: "tools" },
      el("input", { type: "search", class: "grow", placeholder: "Find a metric: kl, length, async …", "aria-label": "Find a metric",
        oninput: (event) => { curves.find = event.target.value.trim().toLowerCase(); redraw(); } }),
      el("label", {}, "smoothing", el("input", { type: "range", min: "0", max: "0.98", step: "0.02", value: "0",
        oninput: (event) => { curves.smooth = Number(event.target.value); redraw(); } })),
      el("label", {}, el("input", { type: "checkbox", onchange: (event) => { curves.logarithmic = event.target.checked; redraw(); } }), "logarithmic")),
      this.content);
  },
  refresh() {
    const wanted = (title, lines) => [title, ...lines.map(([name]) => name)].some((text) => text.toLowerCase().includes(curves.find));
    const known = new Set([...BESIDE, ...[...GROUPS.flatMap(([, charts]) => charts), ...SERVER].flatMap(([, , lines]) => lines.map(([name]) => name))]);
    const sections = GROUPS.map(([name, charts]) =>
      [name, charts.filter(([title, , lines]) => wanted(title, lines)).map(metricChart)]);
    if (wanted("time by phase", [])) sections.find(([name]) => name === "Speed")[1].push(phaseBars(), ...shownRuns().map(phaseChart));
    const others = metricNames().filter((name) => !known.has(name) && !isPhase(name) && !name.startsWith("alarm/"));
    sections.push(["Everything else", others.filter((name) => wanted(name, [])).map((name) => metricChart([name, "", [[name, ""]]]))]);
    const parts = sections.map(([name, cards]) => [name, cards.filter(Boolean)]).filter(([, cards]) => cards.length)
      .map(([name, cards]) => [el("h2", {}, name), el("div", { class: "grid" }, cards)]);
    this.content.replaceChildren(...(parts.length ? parts.flat() : [el("p", { class: "empty" }, "No metric has that in its name.")]));
    dropCharts();
  },
};

const overviewTab = {
  id: "overview",
  title: "Overview",
  mount(root) { this.root = root; },
  refresh() {
    const alarms = shownRuns().flatMap((run) => (store.runs[run].alarms ?? []).map((alarm) => [run, alarm]));
    const headline = [GROUPS[0][1][0], GROUPS[0][1][1], GROUPS[1][1][0], GROUPS[1][1][3], GROUPS[0][1][3], GROUPS[2][1][0]];
    this.root.replaceChildren(
      ...store.runs.filter((run) => run.error).map((run) => el("p", { class: "notice" }, `${run.label}: ${run.error}`)),
      ...alarms.map(([run, alarm]) => el("p", { class: "notice alarm" }, store.runs.length > 1 ? `${store.runs[run].label}, ` : "", `step ${alarm.step}, ${alarm.name}: ${alarm.message}`)),
      el("div", { class: "card scroll" }, runTable()),
      el("h2", {}, "How it went"),
      el("div", { class: "grid" }, headline.map(metricChart).filter(Boolean)));
    dropCharts();
  },
};

/** Last value of a metric, and where it began. */
function journey(run, name) {
  const points = metricOf(run, name);
  return points ? [points.y[0], points.y[points.y.length - 1]] : null;
}

function journeyCell(run, name) {
  const ends = journey(run, name);
  if (!ends) return el("td", { class: "num soft" }, "–");
  return el("td", { class: "num" }, el("span", { class: "soft" }, `${shown(ends[0], 3)} → `), el("b", {}, shown(ends[1], 3)));
}

function runTable() {
  const there = (name) => store.runs.some((_, run) => metricOf(run, name));
  const columns = [["reward/mean", "training reward"], ["eval/reward", "evaluation reward"], ["eval/gold/reward", "gold"], ["policy/kl", "KL"],
    ["rollout/length_mean", "length"], ...(there("reward/mean") ? [] : [["train/loss", "loss"]]), ["eval/loss", "held-out loss"], ["eval/accuracy", "accuracy"]]
    .filter(([name]) => there(name));
  const head = ["run", "algorithm", "state"].map((text) => el("th", {}, text))
    .concat(["step", "best", ...columns.map(([, text]) => text), "samples"].map((text) => el("th", { class: "num" }, text)));
  const rows = store.runs.map((run, place) => el("tr", {},
    el("td", {}, dot(place), " ", el("b", {}, run.label), el("div", { class: "soft mono" }, run.folder)),
    el("td", {}, run.algorithm || "–"),
    el("td", {}, el("span", { class: `pill ${run.state ?? ""}`, title: run.reason ? run.reason : run.updated ? `last written ${new Date(run.updated * 1000).toLocaleString()}` : "" }, run.state ?? "–")),
    el("td", { class: "num" }, `${run.step ?? 0}${run.total_steps ? ` / ${run.total_steps}` : ""}`),
    el("td", { class: "num" }, run.best === null || run.best === undefined ? "–" : [el("b", {}, shown(run.best)), el("div", { class: "soft" }, `${run.best_metric.replace("eval/", "")}, step ${run.best_step}`)]),
    columns.map(([name]) => journeyCell(place, name)),
    el("td", { class: "num" }, run.samples > run.samples_shown ? `${run.samples_shown} of ${run.samples}` : String(run.samples ?? 0))));
  return el("table", { class: "runs" }, el("thead", {}, el("tr", {}, head)), el("tbody", {}, rows));
}
