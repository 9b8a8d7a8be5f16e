"use strict";
/* What the reward server did, alarms, and configurations. */

const KINDS = { failed: "no reward", waited: "long wait", retried: "retries", degraded: "members missing" };

const serverTab = {
  id: "server",
  title: "Reward server",
  mount(root) { this.root = root; },
  refresh() {
    const incidents = shownRuns().flatMap((run) => (store.runs[run].incidents ?? []).map((incident) => [run, incident]));
    const cards = SERVER.map(metricChart).filter(Boolean);
    if (!cards.length) {
      this.root.replaceChildren(el("p", { class: "empty" }, "These runs asked for no rewards while they trained."));
      return;
    }
    const steps = ({ first, last }) => (first === last ? `step ${first}` : `steps ${first} to ${last}`);
    const rows = incidents.slice(0, 500).map(([run, incident]) => el("tr", {}, el("td", {}, dot(run), " ", store.runs[run].label), el("td", { class: "num" }, steps(incident)),
      el("td", {}, el("span", { class: `pill ${incident.kind}` }, KINDS[incident.kind])), el("td", {}, incident.text)));
    const more = incidents.length > rows.length ? [el("p", { class: "soft" }, `and ${incidents.length - rows.length} more`)] : [];
    this.root.replaceChildren(
      el("h2", {}, "What went wrong"),
      rows.length ? el("div", { class: "card scroll", id: "incidents" }, el("table", {}, el("tbody", {}, rows))) : el("p", { class: "soft" }, "Nothing: every sample had its reward, without a retry or a long wait."),
      ...more, el("h2", {}, "What it did"), el("div", { class: "grid" }, cards));
    dropCharts();
  },
};

const alarmsTab = {
  id: "alarms",
  title: "Alarms",
  badge: () => shownRuns().reduce((sum, run) => sum + (store.runs[run].alarms ?? []).length, 0),
  mount(root) { this.root = root; },
  refresh() {
    const alarms = shownRuns().flatMap((run) => (store.runs[run].alarms ?? []).map((alarm) => [run, alarm])).sort(([, a], [, b]) => a.step - b.step);
    const look = (run, alarm) => {
      const block = store.blockList.find((each) => each.run === run && each.source !== "rollout" && each.step === alarm.step);
      if (!block) return "";
      return el("button", { class: "plain", type: "button", onclick: () => {
        compared.then = store.blockList.find((each) => each.run === run && each.source === block.source).id;
        [compared.now, compared.score] = [block.id, alarm.name === "gold_falls" ? "gold" : alarm.name === "length_drift" ? "num_tokens" : "reward"];
        showTab("changes");
      } }, "See the prompts");
    };
    const rows = alarms.map(([run, alarm]) => el("tr", {}, el("td", {}, dot(run), " ", store.runs[run].label), el("td", { class: "num" }, `step ${alarm.step}`),
      el("td", {}, el("span", { class: "pill alarm" }, alarm.name)), el("td", {}, alarm.message), el("td", {}, look(run, alarm))));
    const names = metricNames().filter((name) => name.startsWith("alarm/"));
    const strips = names.map((name) => {
      const card = chartCard(name.slice(6).replaceAll("_", " "), "1 while it is on");
      setChart(card.plot, linesOf(name).map((trace) => ({ ...trace, line: { ...trace.line, shape: "hv" } })), { xaxis: { title: { text: "step" } }, yaxis: { range: [-.08, 1.08], dtick: 1 } });
      return card.root;
    });
    this.root.replaceChildren(rows.length ? el("div", { class: "card scroll" }, el("table", {}, el("tbody", {}, rows))) : el("p", { class: "soft" }, "No alarm began."),
      ...(strips.length ? [el("h2", {}, "When they were on"), el("div", { class: "grid" }, strips)] : []));
    dropCharts();
  },
};

const settings = { find: "", which: "changed" };

const settingsTab = {
  id: "settings",
  title: "Configuration",
  mount(root) {
    const choices = store.runs.length > 1 ? [["differs", "differs between runs"], ["changed", "differs from the defaults"], ["all", "everything"]] : [["changed", "differs from the defaults"], ["all", "everything"]];
    settings.which = choices[0][0];
    this.buttons = choices.map(([which, text]) => el("button", { class: "plain", type: "button", id: `settings-${which}`, onclick: () => { settings.which = which; this.refresh(); } }, text));
    this.content = el("div", { class: "card scroll" });
    root.append(el("div", { class: "tools" }, this.buttons,
      el("input", { type: "search", class: "grow", placeholder: "Find a key or a value", oninput: settled((event) => { settings.find = event.target.value.toLowerCase(); this.refresh(); }) })), this.content);
  },
  refresh() {
    for (const button of this.buttons) button.setAttribute("aria-pressed", String(button.id === `settings-${settings.which}`));
    const runs = shownRuns();
    const differs = (row) => new Set(runs.map((run) => row.values[run])).size > 1;
    const wanted = store.settings.rows.filter((row) =>
      (settings.which === "all" || (!row.place && (settings.which === "changed" ? row.changed : differs(row))))
      && [row.key, ...row.values].some((text) => text.toLowerCase().includes(settings.find)));
    if (!wanted.length) {
      this.content.replaceChildren(el("p", { class: "empty" }, settings.which === "differs" && !settings.find ? "These runs have the same configuration." : "No key is like that."));
      return;
    }
    // Runs of one algorithm have one column of defaults.
    const usual = [...new Set(runs.map((run) => store.runs[run].algorithm))];
    const first = usual.map((algorithm) => runs.find((run) => store.runs[run].algorithm === algorithm));
    const head = el("tr", {}, el("th", {}, "key"), runs.map((run) => el("th", {}, dot(run), " ", store.runs[run].label)),
      usual.map((algorithm) => el("th", {}, usual.length > 1 ? `default of ${algorithm}` : "default")));
    const rows = wanted.map((row) => el("tr", { class: runs.length > 1 && differs(row) && settings.which !== "differs" ? "differs" : "" }, el("td", {}, row.key),
      runs.map((run) => el("td", { class: row.values[run] !== row.defaults[run] && !row.place ? "changed" : "" }, row.values[run])), first.map((run) => el("td", { class: "soft" }, row.defaults[run]))));
    this.content.replaceChildren(el("table", { class: "settings" }, el("thead", {}, head), el("tbody", {}, rows)));
  },
};
