"""The page of `conch report` in headless Chromium: loads without an error, filters, compares, follows a run.

Screenshots of every tab, light and dark, go to the folder that REPORT_SCREENSHOTS names.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conch.evaluation.records import EvaluatedSample, EvaluationRecord, record_path, write_record
from conch.report.__main__ import main
from conch.report.collect import Collector
from conch.report.live import LiveReport
from tests.peers import leave_out

pytest.importorskip("plotly", reason="the page's charts come with plotly: pip install plotly")
api = pytest.importorskip(
    "playwright.sync_api", reason="the browser is driven by playwright: pip install playwright"
)

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

END = "</script><script>document.title = 'broken'</script><b>bold</b>"
TABS = ("overview", "curves", "samples", "compare", "changes", "rewards", "server", "alarms", "settings")
WORDS = ["river", "cold", "water", "past", "mill", "whose", "wheel", "turns", "children", "throw", "stones"]
DEADLINE_MS = 60_000


def write_run(folder: Path, seed: int, *, steps: int = 60, prompts: int = 12, repeats: int = 2) -> Path:
    """A run with everything that a report shows: ensemble, gold, an alarm, an outage, rollouts."""
    draw = random.Random(seed)
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for step in range(steps + 1):
        done = step / steps
        row: dict[str, Any] = {"step": step}
        if step:
            row |= {
                "reward/mean": done * 2 + draw.gauss(0, 0.1),
                "policy/kl": 12 * done,
                "train/loss": 1 - done / 2,
            }
            row |= {
                "rollout/length_mean": 20 + 20 * done,
                "reward/latency_p50_s": 0.05,
                "reward/latency_p99_s": 0.3,
            }
            row |= {
                "reward/requests": 8.0,
                "reward/retries": 3.0 * (step == 20),
                "reward/failed_fraction": 0.0,
            }
            row |= {"reward/wait_s": 90.0 if step == 20 else 0.2, "reward/members_variance": 0.2 + done}
            row |= {"time/rollout_s": 2 + draw.random(), "time/update_s": 1.0, "time/tokens_per_s": 900.0}
            row |= {"staleness/mean": draw.random(), "staleness/max": 2.0}
        if step % 20 == 0:
            row |= {"eval/reward": 2 * done, "eval/reward_standard_error": 0.1, "eval/kl": 12 * done}
            row |= {"eval/gold/reward": done - done**2, "alarm/gold_falls": float(step == steps)}
            write_evaluation(folder, step, draw, done, prompts, repeats)
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    alarm = {"step": steps, "name": "gold_falls", "message": "gold has fallen <b>by 0.1</b>"}
    (folder / "alarms.jsonl").write_text(json.dumps(alarm) + "\n")
    (folder / "best_metric.txt").write_text("eval/gold/reward\n")
    settings = {
        "model": {"path": "gpt2"},
        "ppo": {"epochs": 4},
        "train": {"seed": seed, "total_steps": steps},
    }
    (folder / "config.yaml").write_text(json.dumps(settings))  # JSON is YAML
    (folder / "rollouts").mkdir()
    line = {
        "prompt": "Tell me of rivers 1.",
        "output": f"{END} é",
        "reward_status": "ok",
        "scores": {"reward": 1.5},
    }
    (folder / "rollouts/step_3.jsonl").write_text(json.dumps(line, ensure_ascii=False) + "\n")
    return folder


def write_evaluation(
    folder: Path, step: int, draw: random.Random, done: float, prompts: int, repeats: int
) -> None:
    samples = []
    for place in range(prompts * repeats):
        words = " ".join(draw.choices(WORDS, k=30))
        output = f"needle{step}x{place} {words}"
        scores = {"reward": 2 * done + draw.gauss(0, 1), "gold": done - done**2 + draw.gauss(0, 0.3)}
        members = {"a": scores["reward"] - 0.1, "b": scores["reward"] + 0.1}
        prompt = place // repeats
        samples.append(EvaluatedSample(prompt, f"Tell me of rivers {prompt}.", output, 30, scores, members))
    write_record(record_path(folder, step), EvaluationRecord(step, tuple(samples)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [write_run(folder / "first", 1), write_run(folder / "second", 2)]


@pytest.fixture(scope="module")
def report(runs: list[Path]) -> Path:
    path = runs[0].parent / "report.html"
    main([*map(str, runs), "--output", str(path)])
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        leave_out("no Chromium is installed: apt-get install chromium")
    with api.sync_playwright() as playwright:
        # A container's user is often root, for whom Chromium has no sandbox; the pages are ours.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Watched:
    """A page that notes errors of its console, and requests beyond `origin`."""

    def __init__(self, browser: Any, url: str, scheme: str = "light") -> None:
        self.page = browser.new_page(viewport={"width": 1440, "height": 900}, color_scheme=scheme)
        self.page.set_default_timeout(DEADLINE_MS)
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self._note(message.type, message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self._ask(request.url))
        self.page.goto(url)
        self.page.wait_for_selector("#tab-overview")

    def _note(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.errors.append(text)

    def _ask(self, url: str) -> None:
        if not url.startswith(("data:", "blob:")):  # which are within the page
            self.requests.append(url)

    def show(self, tab: str) -> None:
        self.page.click(f"#to-{tab}")
        self.page.wait_for_selector(f"#tab-{tab}", state="visible")

    def find(self, text: str, expected: str) -> None:
        """Look for a text, and wait for the number of samples."""
        self.page.fill("#search", text)
        self.page.wait_for_function(
            "text => document.getElementById('found').textContent.startsWith(text)", arg=expected
        )

    def outputs(self) -> list[str]:
        return self.page.locator("#sample-list .row > span:last-child").all_text_contents()


@pytest.fixture
def opened(browser: Any, report: Path) -> Iterator[Watched]:
    watched = Watched(browser, report.as_uri())
    yield watched
    watched.page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_tab_draws_without_an_error_or_a_request(browser: Any, report: Path, scheme: str) -> None:
    watched = Watched(browser, report.as_uri(), scheme)
    pictures = os.environ.get("REPORT_SCREENSHOTS")
    for tab in TABS:
        watched.show(tab)
        assert watched.page.inner_text(f"#tab-{tab}").strip()
        if tab in ("overview", "curves", "changes", "rewards", "server", "alarms"):
            watched.page.wait_for_selector(f"#tab-{tab} .plot svg")
        if pictures:
            watched.page.wait_for_timeout(500)
            watched.page.screenshot(path=f"{pictures}/{scheme}_{tab}.png")
    assert watched.page.evaluate("document.documentElement.dataset.theme") == scheme
    watched.page.close()

    assert watched.errors == []
    assert watched.requests == [report.as_uri()], "nothing but the file itself"


@pytest.mark.parametrize("width", [1400, 1000])
def test_table_of_runs_fits_the_window_with_long_folders(browser: Any, tmp_path: Path, width: int) -> None:
    runs = [write_run(tmp_path / ("a_long_name_of_an_experiment_" * 3) / name, 1) for name in ("one", "two")]
    output = tmp_path / "report.html"
    main([*map(str, runs), "--output", str(output)])
    watched = Watched(browser, output.as_uri())
    watched.page.set_viewport_size({"width": width, "height": 800})

    cut = watched.page.evaluate(
        "[...document.querySelectorAll('#tab-overview .scroll')].map(e => e.scrollWidth - e.clientWidth)"
    )

    head = watched.page.locator("#tab-overview th")
    assert head.all_text_contents()[-1] == "samples"
    assert cut == [0]
    watched.page.close()


def test_both_runs_are_overlaid_and_can_be_hidden(opened: Watched) -> None:
    # While a plot is drawn anew it has no data.
    lines = (
        "(document.querySelector('#tab-overview .plot')?.data ?? [])"
        ".filter(each => each.name).map(each => each.name)"
    )
    opened.page.wait_for_selector("#tab-overview .plot svg")
    both = opened.page.evaluate(lines)
    opened.page.click(".chip >> text=second")

    assert both == ["first · training", "second · training", "first · evaluation", "second · evaluation"]
    opened.page.wait_for_function(f"() => ({lines}).length === 2")


def test_samples_are_found_by_text_step_and_reward(opened: Watched) -> None:
    opened.show("samples")
    opened.find("NEEDLE40x7 ", "2 of 194 samples")
    assert all(text.startswith("needle40x7 ") for text in opened.outputs())
    assert opened.page.locator("#sample-list mark").first.text_content() == "needle40x7 "

    opened.find("", "194 samples")
    opened.page.fill("#first-step", "40")
    opened.page.fill("#last-step", "59")
    opened.find("needle", "48 of 194 samples")
    opened.page.fill("#low", "100")
    opened.find("needle", "0 of 194 samples")
    opened.page.fill("#low", "")
    opened.page.check("#pattern")
    opened.find("^needle40x[01] ", "4 of 194 samples")
    opened.page.fill("#search", "(")
    opened.page.wait_for_selector("#search.wrong")
    assert opened.errors == []


def test_text_of_a_sample_is_shown_and_never_run(opened: Watched) -> None:
    opened.show("samples")
    opened.find("bold", "2 of 194 samples")
    opened.page.locator("#sample-list .row").first.click()

    assert opened.page.text_content("#output") == f"{END} é"
    assert opened.page.locator("#output b").count() == 0
    opened.show("alarms")
    assert "<b>by 0.1</b>" in opened.page.inner_text("#tab-alarms")
    assert opened.page.title().startswith("Conch report") and opened.errors == []


def test_a_prompt_is_compared_step_against_step(opened: Watched) -> None:
    opened.show("samples")
    opened.find("needle60x4 ", "2 of 194 samples")
    opened.page.locator("#sample-list .row").first.click()
    opened.page.click("#compare-this")
    opened.page.wait_for_selector("#tab-compare", state="visible")

    assert opened.page.text_content("#compared-prompt") == "Tell me of rivers 2."
    slots = opened.page.locator(".slot")
    assert slots.count() == 2
    first, second = (slots.nth(place).inner_text() for place in (0, 1))
    assert "needle0x4 " in first and "needle0x5 " in first and "needle60x4" in second
    assert "needle60x4" in opened.page.locator(".slot ins").first.text_content()
    assert "needle0x4" in opened.page.locator(".slot del").first.text_content()
    opened.page.click("text=next →")
    assert opened.page.text_content("#compared-prompt") == "Tell me of rivers 3."
    assert opened.errors == []


def test_changes_lead_from_a_prompt_to_its_completions(opened: Watched) -> None:
    opened.show("changes")
    changes = opened.page.locator("#change-list .row b").all_text_contents()

    assert len(changes) == 12 and changes == sorted(changes, key=float)
    assert "mean change" in opened.page.inner_text("#tab-changes")
    opened.page.locator("#change-list .row").first.click()
    opened.page.wait_for_selector("#tab-compare", state="visible")
    assert opened.page.locator(".slot").count() == 2 and opened.errors == []


def test_outage_and_configuration_are_told(opened: Watched) -> None:
    opened.show("server")
    incidents = opened.page.inner_text("#incidents")
    assert "waited 90.0 s" in incidents and "3 of 8 requests" in incidents

    opened.show("settings")
    keys = opened.page.locator(".settings td:first-child")
    assert keys.all_text_contents() == ["train.seed"]
    opened.page.click("#settings-changed")
    assert {"model.path", "train.total_steps"} <= {*keys.all_text_contents()}
    assert opened.errors == []


def test_a_hundred_thousand_samples_stay_usable(browser: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "large", 3, steps=200, prompts=2500, repeats=4)  # 11 evaluations
    assert sum(1 for _ in (run / "evaluations").iterdir()) == 11
    output = tmp_path / "report.html"
    main([str(run), "--output", str(output), "--max-samples", "1000000"])
    watched = Watched(browser, output.as_uri())
    watched.show("samples")
    watched.find("", "110,001 samples")

    watched.find("needle200x9999 ", "1 of 110,001 samples")
    watched.find("", "110,001 samples")
    rows = watched.page.locator("#sample-list .row")
    assert rows.count() < 80, "rows that are out of sight are no elements"
    watched.page.evaluate("document.getElementById('sample-list').scrollTop = 1e9")
    watched.page.wait_for_function(
        "() => document.querySelector('#sample-list .row:last-child').textContent.includes('bold')"
    )
    watched.page.click("#tab-samples .rowhead >> text=reward")
    watched.page.wait_for_function("() => samples.sort === 'reward' && samples.found.length === 110001")
    best = watched.page.locator("#sample-list .row").first.locator("span").nth(2).text_content()
    assert float(best) > 3
    for tab in TABS:
        watched.show(tab)
    watched.page.close()
    assert watched.errors == []


def test_live_page_follows_a_run_without_reloading(browser: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 4)
    live = LiveReport(Collector({"run": run}, 10_000), title="Conch report: run")
    thread = threading.Thread(target=live.serve)
    thread.start()
    try:
        watched = Watched(browser, live.url)
        watched.show("samples")
        watched.find("", "97 samples")
        write_evaluation(run, 80, random.Random(5), 1.0, 12, 2)
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 80, "eval/reward": 7.0}\n{"step": 81, "half')
        watched.page.wait_for_function(
            "() => document.getElementById('status').textContent === 'live · step 80'"
        )
        watched.page.click("#more")
        watched.find("needle80x", "24 of 121 samples")
        watched.page.close()
        assert watched.errors == []
        assert {url.partition("?")[0] for url in watched.requests} == {live.url, f"{live.url}data"}
    finally:
        live.close()
        thread.join()
