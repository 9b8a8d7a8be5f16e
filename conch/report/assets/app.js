"use strict";
/* Tabs, theme, runs that are switched on and off, and news from a server. */

const TABS = [overviewTab, curvesTab, samplesTab, compareTab, changesTab, rewardsTab, serverTab, alarmsTab, settingsTab];
const POLL_MS = 2000;
const mounted = new Map(); // tab -> its element
let current = null;

function showTab(id) {
  current = TABS.find((tab) => tab.id === id) ?? TABS[0];
  if (!mounted.has(current)) {
    const root = el("section", { id: `tab-${current.id}`, role: "tabpanel" });
    document.getElementById("main").append(root);
    mounted.set(current, root);
    current.mount(root);
  }
  for (const [tab, root] of mounted) root.hidden = tab !== current;
  history.replaceState(null, "", `#${current.id}`);
  drawTabs();
  current.refresh();
}

function drawTabs() {
  document.getElementById("tabs").replaceChildren(...TABS.map((tab) => el("button",
    { role: "tab", type: "button", id: `to-${tab.id}`, "aria-selected": String(tab === current), onclick: () => showTab(tab.id) },
    tab.title, tab.badge?.() ? el("span", { class: "count" }, String(tab.badge())) : null)));
}

function drawChips() {
  document.getElementById("chips").replaceChildren(...store.runs.map((run, place) => el("button",
    { class: isShown(place) ? "chip" : "chip off", type: "button", title: run.folder, "aria-pressed": String(isShown(place)),
      onclick: () => {
        if (!store.hidden.delete(run.label)) store.hidden.add(run.label);
        drawChips();
        drawTabs();
        current.refresh();
      } },
    dot(place), run.label)));
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  current?.refresh();
}

function setStatus(text, kind = "") {
  const status = document.getElementById("status");
  status.textContent = text;
  status.className = `status ${kind}`;
}

/** Ask the server for what is new, for ever. */
async function follow() {
  for (;;) {
    try {
      const answer = await fetch(`data?since=${store.version}&strings=${store.strings.length}&session=${store.session}`);
      if (!answer.ok) throw new Error(`the server answers ${answer.status}`);
      if (answer.status === 200) {
        const isFirst = store.version === 0;
        const renumber = applyUpdate(await answer.json());
        if (isFirst) begin();
        else refreshAll(renumber);
      }
      const steps = store.runs.map((run) => run.step ?? 0);
      setStatus(`live · step ${Math.max(0, ...steps)}`, "live");
    } catch (error) {
      setStatus("no answer from the server", "lost");
    }
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  }
}

/** Draw news. Whoever reads samples keeps those that were found, and is told of the new ones. */
function refreshAll(renumber) {
  drawChips();
  drawTabs();
  if (mounted.has(samplesTab)) samplesTab.renumber(renumber);
  if (current !== samplesTab && current !== compareTab) current.refresh();
}

function begin() {
  document.getElementById("loading").remove();
  drawChips();
  showTab(location.hash.slice(1));
  prepareSearch([...store.blockList]);
}

/** Make the texts lower-case while nobody waits, so that the first search is as quick as the others. */
function prepareSearch(blocks) {
  const whenIdle = window.requestIdleCallback ?? ((task) => setTimeout(task, 200));
  whenIdle(() => {
    const block = blocks.pop();
    if (!block) return;
    lowered(block, "lowOutputs", block.output);
    prepareSearch(blocks);
  });
}

const dark = matchMedia("(prefers-color-scheme: dark)");
setTheme(dark.matches ? "dark" : "light");
dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
document.getElementById("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.target instanceof HTMLInputElement) return;
  event.preventDefault();
  showTab("samples");
  document.getElementById("search").focus();
});
window.addEventListener("hashchange", () => { if (location.hash.slice(1) !== current?.id) showTab(location.hash.slice(1)); });

if (store.mode === "live") {
  setStatus("connecting …", "lost");
  follow();
} else {
  const data = document.getElementById("data");
  unpack(data.textContent).then((update) => {
    data.remove(); // its text is large
    applyUpdate(update);
    setStatus(`written ${new Date(update.made * 1000).toLocaleString()} by Conch ${update.conch}`);
    begin();
  });
}
