"""A gold server that dies in the middle of an evaluation of two ranks: the run goes on to its end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conch.evaluation.records import read_record, record_path
from conch.runs.checkpoint import steps_of
from tests.fakes.json_rewards import endpoint
from tests.footprint import wait_until
from tests.integration.gold_run import watched_trainer
from tests.launches import ROOT, finish, start, torchrun
from tests.runs import PROMPTS, vowels

# Each rank's probe, its eight different samples of the first evaluation, and some of the second.
DIES_AT = 2 * (1 + 8) + 4


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A process that dies when it is asked for the DIES_AT-th time, and its address."""
    file = tmp_path / "url"
    command = [sys.executable, "-m", "tests.integration.gold_server_run", str(file), str(DIES_AT)]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        wait_until(file.exists, lambda: "the server told no address", 60.0)
        yield process, file.read_text()
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_two_ranks_go_on_without_gold_and_keep_their_samples_together(
    tmp_path: Path, server: tuple[subprocess.Popen[bytes], str]
) -> None:
    process, url = server
    run = tmp_path / "run"
    output = finish(start([*torchrun(2), "-m", "tests.integration.gold_run", str(run), url]))

    assert process.wait(60.0) == -9, "the server has died in the run"
    assert max(steps_of(run)) == 3
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    failed = [row["eval/gold/failed_fraction"] for row in rows]
    assert failed[0] == 0.0 and 0 < failed[1] < 1 and failed[2:] == [1.0, 1.0]
    assert rows[0]["eval/gold/requests"] == 16.0
    told = output.count("the run goes on, and this is told once")
    assert 1 <= told <= 2, "once by each rank that saw it"
    for step in range(4):
        samples = read_record(record_path(run, step)).samples
        assert [sample.prompt for sample in samples] == [place // 2 for place in range(16)]
        assert [sample.input for sample in samples] == [text for text in PROMPTS for _ in range(2)]
        for sample in samples:
            assert sample.scores["reward"] == vowels([sample.output])[0]
            assert sample.scores["gold"] in (None, float(len(str(sample.input)) + len(sample.output)))
    golds = [sample.scores["gold"] for sample in read_record(record_path(run, 1)).samples]
    assert golds.count(None) == failed[1] * 16

    with endpoint() as alive:
        alone = watched_trainer(tmp_path / "alone", alive.url)
        alone.evaluate()
        alone.close()
    assert alone.evaluation is not None
    assert alone.evaluation.record.samples == read_record(record_path(run, 0)).samples
