"use strict";
/* Charts of plotly in cards; each is drawn once it comes into sight, and again when data or theme change. */

const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const CHART = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };

const drawings = new Map(); // element -> { traces, layout }
const pending = new Set();
const sight = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting && pending.delete(entry.target)) drawNow(entry.target);
}, { rootMargin: "300px" });

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function faded(colour, share) {
  const [red, green, blue] = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  return `rgba(${red},${green},${blue},${share})`;
}

function baseLayout() {
  const axis = {
    gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--line"), automargin: true,
    tickfont: { color: css("--soft"), size: 11 }, title: { font: { color: css("--soft"), size: 11 }, standoff: 6 },
  };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 46, r: 12, t: 8, b: 34 },
    font: { family: "system-ui, sans-serif", color: css("--text"), size: 12 }, showlegend: false,
    hovermode: "x unified", hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--text") } },
    xaxis: axis, yaxis: structuredClone(axis), colorway: COLOURS,
  };
}

function merge(base, over) {
  for (const [name, value] of Object.entries(over)) {
    const inner = value && typeof value === "object" && !Array.isArray(value);
    base[name] = inner ? merge(base[name] ?? {}, value) : value;
  }
  return base;
}

/** A card with a chart. key: [class of a line, its meaning] for each kind of line. */
function chartCard(title, unit = "", { key = [], tall = false } = {}) {
  const plot = el("div", { class: tall ? "plot tall" : "plot" });
  const lines = key.map(([kind, text]) => el("span", {}, el("i", { class: kind }), text));
  const head = el("header", {}, el("h3", {}, title), el("span", { class: "unit" }, unit), el("span", { class: "key" }, lines));
  return { root: el("section", { class: "card chart" }, head, plot), plot };
}

function setChart(plot, traces, layout = {}) {
  drawings.set(plot, { traces, layout });
  pending.add(plot);
  sight.unobserve(plot);
  sight.observe(plot);
}

function drawNow(plot) {
  const { traces, layout } = drawings.get(plot);
  Plotly.react(plot, traces, merge(baseLayout(), layout), CHART);
}

/** Forget charts that are no longer part of the page. */
function dropCharts() {
  for (const plot of [...drawings.keys()]) {
    if (plot.isConnected) continue;
    drawings.delete(plot);
    pending.delete(plot);
    sight.unobserve(plot);
    Plotly.purge(plot);
  }
}

/** Steps and values of a run's metric; null where it has none. */
function metricOf(run, name) {
  const series = store.runs[run].series?.[name];
  return series ? { x: store.runs[run].axes[series[0]], y: series[1] } : null;
}

function smoothed(values, weight) {
  let sum = 0, total = 0;
  return values.map((value) => {
    sum = sum * weight + value;
    total = total * weight + 1;
    return sum / total;
  });
}

/** Lines of one metric, one a run. error: name of a metric with the standard error. */
function linesOf(name, { text = "", dash = "solid", error = "", smooth = 0 } = {}) {
  const traces = [];
  for (const run of shownRuns()) {
    const points = metricOf(run, name);
    if (!points) continue;
    const colour = colourOf(run);
    const label = [store.runs.length > 1 ? store.runs[run].label : "", text].filter(Boolean).join(" · ") || name;
    const few = points.x.length <= 40;
    const isSmooth = smooth > 0 && points.x.length > 20;
    const errors = error ? metricOf(run, error) : null;
    if (errors && errors.x.length === points.x.length) {
      const edges = [...points.y.map((y, k) => y + 2 * errors.y[k]), ...points.y.map((y, k) => y - 2 * errors.y[k]).reverse()];
      traces.push({ x: [...points.x, ...[...points.x].reverse()], y: edges, fill: "toself", mode: "lines", hoverinfo: "skip",
        fillcolor: faded(colour, .13), line: { width: 0, color: colour } });
    }
    if (isSmooth) {
      traces.push({ ...points, mode: "lines", hoverinfo: "skip", line: { color: faded(colour, .25), width: 1 } });
    }
    traces.push({ x: points.x, y: isSmooth ? smoothed(points.y, smooth) : points.y, name: label,
      mode: few ? "lines+markers" : "lines", marker: { size: 5, color: colour },
      line: { color: colour, width: 1.8, dash }, hovertemplate: "%{y:.5g}" });
  }
  return traces;
}
