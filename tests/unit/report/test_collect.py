"""What a report shows of run folders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conch.errors import DataError
from conch.evaluation.records import EvaluatedSample, EvaluationRecord, record_path, write_record
from conch.report.collect import Collector, count_samples, curves, incidents, rows_of_each, thinned
from conch.runs.listing import summarise
from conch.runs.reading import SampleFile


def write_run(folder: Path, *rows: dict[str, Any], settings: str = "train: {}\n") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows or ({"step": 0},)))
    (folder / "config.yaml").write_text(settings)
    return folder


def write_evaluation(run: Path, step: int, outputs: list[str], prompts: int = 2) -> Path:
    samples = tuple(
        EvaluatedSample(
            place % prompts,
            f"prompt {place % prompts}",
            output,
            len(output),
            {"reward": place + step / 3, "gold": None},
            metadata={"answer": place % prompts},
        )
        for place, output in enumerate(outputs)
    )
    path = record_path(run, step)
    write_record(path, EvaluationRecord(step, samples))
    return path


def collected(**runs: Path) -> Collector:
    collector = Collector(runs, 1000)
    collector.refresh()
    return collector


def test_samples_stand_in_columns_and_prompts_once(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    for step in (0, 10):
        write_evaluation(run, step, ["a", "bb", "ccc"])
    update = collected(a=run).update()

    assert update["strings"] == ["prompt 0", "prompt 1", '{"answer": 0}', '{"answer": 1}']
    first, second = update["blocks"]
    assert first["prompt"] == second["prompt"] == [0, 1, 0] and first["metadata"] == [2, 3, 2]
    assert (second["step"], second["run"], second["output"]) == (10, 0, ["a", "bb", "ccc"])
    assert second["columns"] == {"reward": [3.3333, 4.3333, 5.3333], "num_tokens": [1, 2, 3]}, "no gold"
    [about] = update["runs"]
    assert (about["samples"], about["samples_shown"], about["state"]) == (6, 6, "stopped")
    json.dumps(update, allow_nan=False)


def test_two_runs_share_their_prompts(tmp_path: Path) -> None:
    for name in "ab":
        write_evaluation(write_run(tmp_path / name), 0, ["x", "y"])
    update = collected(a=tmp_path / "a", b=tmp_path / "b").update()

    assert len(update["strings"]) == 4
    assert [block["run"] for block in update["blocks"]] == [0, 1]
    assert [run["label"] for run in update["runs"]] == ["a", "b"]


def test_update_has_only_what_is_new(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    write_evaluation(run, 0, ["a", "b"])
    collector = collected(a=run)
    first = collector.update()
    collector.refresh()
    assert collector.version == first["version"], "nothing has changed"

    path = write_evaluation(run, 10, ["c", "d", "e"], prompts=3)
    collector.refresh()
    second = collector.update(since=first["version"], known_strings=len(first["strings"]))
    assert [block["step"] for block in second["blocks"]] == [10]
    assert second["first_string"] == 4 and second["strings"] == ["prompt 2", '{"answer": 2}']
    assert len(second["ids"]) == 2

    path.unlink()  # a resumed run deletes what it writes again
    collector.refresh()
    third = collector.update(since=second["version"], known_strings=6)
    assert third["version"] > second["version"] and third["blocks"] == [] and len(third["ids"]) == 1


def test_rewritten_file_comes_again(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    write_evaluation(run, 0, ["a"])
    collector = collected(a=run)
    write_evaluation(run, 0, ["another"])
    collector.refresh()

    [block] = collector.update(since=1, known_strings=2)["blocks"]
    assert block["output"] == ["another"]


def test_metrics_that_grow_make_a_new_version(tmp_path: Path) -> None:
    run = write_run(tmp_path, {"step": 1, "a": 1.0})
    collector = collected(a=run)
    write_run(run, {"step": 1, "a": 1.0}, {"step": 2, "a": 3.0})
    collector.refresh()

    assert collector.version == 2
    assert collector.update()["runs"][0]["series"]["a"] == [0, [1, 3]]


def test_metrics_and_settings_are_read_once_where_they_changed_and_not_where_they_did_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = "ppo: {gamma: 1.0}\n"
    run = write_run(tmp_path, {"step": 1, "a": 1.0}, settings=settings)
    collector = collected(a=run)
    read: list[str] = []

    def read_bytes(path: Path) -> bytes:
        read.append(path.name)
        with path.open("rb") as file:
            return file.read()

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    monkeypatch.setattr(Path, "read_text", lambda path, **_: read_bytes(path).decode())
    collector.refresh()
    assert not {"metrics.jsonl", "config.yaml"} & set(read)
    write_run(run, {"step": 1, "a": 1.0}, {"step": 2, "a": 3.0}, settings=settings)
    collector.refresh()
    assert (read.count("metrics.jsonl"), read.count("config.yaml")) == (1, 1)
    assert collector.update()["runs"][0]["algorithm"] == "ppo"


def test_patient_refresh_keeps_what_it_knew_of_a_damaged_run(tmp_path: Path) -> None:
    run = write_run(tmp_path, {"step": 1, "a": 1.0})
    write_evaluation(run, 0, ["a"])
    collector = collected(a=run)
    (run / "metrics.jsonl").write_text("no JSON\n{}\n")
    with pytest.raises(DataError, match=r"line 1 of .* is damaged"):
        collector.refresh()
    collector.refresh(patient=True)

    update = collector.update()
    assert "line 1" in update["runs"][0]["error"] and update["runs"][0]["series"]["a"] == [0, [1]]
    assert len(update["blocks"]) == 1


def test_too_many_samples_lose_the_last_of_each_evaluation(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    for step in (0, 1):
        write_evaluation(run, step, [str(k) for k in range(20)], prompts=20)
    write_evaluation(run, 2, ["few"])
    collector = Collector({"a": run}, 15)
    collector.refresh()
    update = collector.update()

    assert [block["output"] for block in update["blocks"]] == [[*"0123456"], [*"0123456"], ["few"]]
    assert update["runs"][0]["samples"] == 41 and update["runs"][0]["samples_shown"] == 15
    assert len(update["strings"]) == 14, "prompts of samples that are left out are left out"


@pytest.mark.parametrize(
    ("totals", "most", "each"), [([3, 3], 6, 3), ([3, 5], 6, 3), ([1, 100], 51, 50), ([9], 0, 1), ([], 5, 0)]
)
def test_room_is_shared_between_files(totals: list[int], most: int, each: int) -> None:
    expected = each if each < 16 else each - each % 4  # of 50 the four highest bits
    assert rows_of_each(totals, most) == expected


def test_samples_are_counted_without_reading_them(tmp_path: Path) -> None:
    path = write_evaluation(tmp_path, 0, ["a\nb", "c"])
    assert count_samples(SampleFile(path, "evaluation", 0, "")) == 2
    path.write_text('{"output": ""}\n{"outp')
    assert count_samples(SampleFile(path, "rollout", 0, "")) == 2


def test_half_of_a_surrogate_pair_does_not_stop_a_report(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    write_evaluation(run, 0, ["a\ud83d"])

    assert collected(a=run).update()["blocks"][0]["output"] == ["a?"]


def test_curves_share_their_steps_and_have_no_holes() -> None:
    rows = [{"step": 1, "a": 1.0, "b": None}, {"step": 2, "a": 0.123456789, "b": 2.0, "c": 3.0}]

    assert curves(rows) == {
        "axes": [[1, 2], [2]],
        "series": {"a": [0, [1, 0.1234568]], "b": [1, [2]], "c": [1, [3]]},
    }


def test_thinned_curve_keeps_its_peaks() -> None:
    values = [0.0] * 10_000
    values[7777], values[123] = 5.0, -5.0
    steps, kept = thinned(range(10_000), values, 100)

    assert len(steps) <= 100 and sorted(steps) == steps
    assert kept[steps.index(7777)] == 5.0 and kept[steps.index(123)] == -5.0


def test_incidents_join_steps_in_a_row() -> None:
    def row(step: int, **more: float) -> dict[str, Any]:
        usual = {"failed_fraction": 0.0, "wait_s": 0.1, "retries": 0.0, "requests": 10.0} | more
        return {"step": step, **{f"reward/{name}": value for name, value in usual.items()}}

    rows = [
        {"step": 0, "eval/reward": 1.0},
        row(1),
        row(2, retries=1.0, wait_s=4.9),
        row(3, retries=2.0, wait_s=60.0),
        row(4, failed_fraction=0.25),
        row(5),
        row(6, failed_fraction=0.5),
    ]
    found = [(each["kind"], each["first"], each["last"]) for each in incidents(rows)]
    assert found == [("retried", 2, 3), ("waited", 3, 3), ("failed", 4, 4), ("failed", 6, 6)]
    texts = [each["text"] for each in incidents(rows)]
    assert texts[0].startswith("3 of 20 requests") and "60.0 s" in texts[1] and "25.0%" in texts[2]


def test_run_that_asked_for_no_rewards_has_no_incidents() -> None:
    assert incidents([{"step": 1, "train/loss": 1.0}]) == []


def test_state_is_looked_at_again_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path)
    collector = collected(a=run)
    assert collector.update()["runs"][0]["state"] == "stopped"
    summary = replace(summarise(run), state="running")
    monkeypatch.setattr("conch.report.collect.summary_of", lambda *_: summary)
    monkeypatch.setattr("conch.report.collect._STATE_S", 0.0)
    collector.refresh()

    assert collector.update()["runs"][0]["state"] == "running" and collector.version == 2
