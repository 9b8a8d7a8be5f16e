"""A report of many samples: size of the file, time to write it, to open it, and to find a text in it.

    python -m benchmarks.report --samples 100000

A run of twenty evaluations is made, with prompts of 25 words and outputs of 60, and its report opened in
headless Chromium by playwright. "Open" ends when the first tab is drawn; "first search" makes the
texts lower-case, later ones find them so. Times of searching and sorting are the page's own, until
the rows are drawn.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conch.cli import run_main
from conch.errors import ConfigError
from conch.evaluation.records import EvaluatedSample, EvaluationRecord, record_path, write_record
from conch.report.collect import Collector
from conch.report.page import write_page

_EVALUATIONS = 20
_WORDS = 4000
"""Different words; texts draw from them."""


def make_run(folder: Path, samples: int) -> Path:
    """A run of twenty evaluations that together have so many samples, two a prompt."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(_WORDS)]
    each = samples // _EVALUATIONS
    prompts = [" ".join(draw.choices(words, k=25)) for _ in range(-(-each // 2))]
    folder.mkdir(parents=True)
    for evaluation in range(_EVALUATIONS):
        rows = tuple(
            EvaluatedSample(
                place // 2,
                prompts[place // 2],
                " ".join(draw.choices(words, k=60)),
                80,
                {"reward": draw.gauss(evaluation / 10, 1), "gold": draw.gauss(0, 1)},
            )
            for place in range(each)
        )
        write_record(record_path(folder, evaluation * 10), EvaluationRecord(evaluation * 10, rows))
    lines = ({"step": step, "reward/mean": draw.random()} for step in range(10 * _EVALUATIONS))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text("ppo: {}\n")
    return folder


def time_page(path: Path, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each thing that a person does with the page.

    Raises:
        ConfigError: there is no Chromium, or no playwright.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise ConfigError("this drives a browser by playwright: pip install playwright") from error
    chromium = shutil.which("chromium")
    if chromium is None:
        raise ConfigError("there is no Chromium here: apt-get install chromium")
    milliseconds: dict[str, list[float]] = {}

    def note(name: str, value: Any) -> None:
        milliseconds.setdefault(name, []).append(float(value))

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for _ in range(rounds):
            page = browser.new_page(viewport={"width": 1440, "height": 900})
            started = time.perf_counter()
            page.goto(path.as_uri())
            page.wait_for_selector("#tab-overview .plot svg", timeout=120_000)
            note("open", 1000 * (time.perf_counter() - started))
            page.click("#to-samples")
            page.wait_for_selector("#sample-list .row")
            for name, changed in (
                ("first search", "samples.text = 'abc'"),
                ("search", "samples.text = 'zxq'"),
                ("regular expression", "samples.text = 'a[bc]+d'; samples.isPattern = true"),
                ("steps and reward", "Object.assign(samples, {text: '', low: '2', firstStep: '100'})"),
                ("sort all by reward", "Object.assign(samples, {low: '', firstStep: '', sort: 'reward'})"),
            ):
                timed = "const t = performance.now(); samplesTab.refresh(); return performance.now() - t"
                note(name, page.evaluate(f"() => {{ {changed}; {timed}; }}"))
            page.close()
        browser.close()
    return milliseconds


def main(argv: Sequence[str]) -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder, "run"), arguments.samples)
        kept = sum(file.stat().st_size for file in (run / "evaluations").iterdir())
        started, processor = time.perf_counter(), time.process_time()
        collector = Collector({"run": run}, arguments.samples)
        collector.refresh()
        report = Path(folder, "report.html")
        write_page(report, collector.update(), title="benchmark")
        seconds, processor_s = time.perf_counter() - started, time.process_time() - processor
        size = report.stat().st_size
        print(f"samples {arguments.samples}, evaluations {kept / 1e6:.1f} MB, page {size / 1e6:.1f} MB")
        print(f"written in {seconds:.1f} s, {processor_s:.1f} s of them processor time")
        for name, values in time_page(report, arguments.rounds).items():
            ordered = sorted(values)
            print(f"{name}: {ordered[len(ordered) // 2]:.0f} ({ordered[0]:.0f}-{ordered[-1]:.0f}) ms")


if __name__ == "__main__":
    run_main(main)
