"""The Helpful & Harmless example: its data and its presets."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from conch.config import DataConfig
from conch.errors import ConfigError, DataError
from examples.hh.hh_data import comparison, comparisons, preset, split_answer
from examples.hh.smoke_table import main, ppo_figure

DIALOGUE = "\n\nHuman: a?\n\nAssistant: b\n\nHuman: c?\n\nAssistant:"


def test_dialogues_are_cut_behind_the_last_assistant() -> None:
    assert split_answer(DIALOGUE + " d\n\ne") == (DIALOGUE, " d\n\ne")
    with pytest.raises(DataError, match="without"):
        split_answer("\n\nHuman: a?")


def test_comparisons_come_whole_or_with_the_prompt_apart() -> None:
    whole = comparison({"chosen": DIALOGUE + " yes", "rejected": DIALOGUE + " no"})
    apart = comparison({"prompt": DIALOGUE, "chosen": " yes", "rejected": " no", "response": " yes"})
    assert whole == apart
    assert (whole.prompt, whole.chosen, whole.rejected) == (DIALOGUE, " yes", " no")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("abc", 'has no strings "chosen" and "rejected"'),
        ({"chosen": DIALOGUE + " yes"}, 'has no strings "chosen" and "rejected"'),
        ({"chosen": DIALOGUE + " yes", "rejected": DIALOGUE[:-1] + "? Assistant: no"}, "different prompts"),
        ({"chosen": DIALOGUE + " ", "rejected": DIALOGUE + " no"}, "has an empty prompt or answer"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, 'has no strings "chosen" and "rejected"'),
    ],
)
def test_what_compares_nothing_is_refused(row: object, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        comparison(row)


def written(path: Path, numbers: range) -> Path:
    """Three comparisons for each number's prompt."""
    rows = [
        {"prompt": f"{number}?", "chosen": " y", "rejected": f" {n}"} for number in numbers for n in "abc"
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_same_prompts_are_held_out_of_any_file_and_never_trained_on(tmp_path: Path) -> None:
    train, held_out = comparisons(DataConfig(train=str(written(tmp_path / "a.jsonl", range(200)))))
    assert len(train) + len(held_out) == 600
    assert 60 < len(held_out) < 180
    prompts = {row.prompt for row in held_out}
    assert not prompts & {row.prompt for row in train}
    _, others = comparisons(DataConfig(train=str(written(tmp_path / "b.jsonl", range(100, 300)))))
    known = {f"{number}?" for number in range(100, 200)}
    assert {row.prompt for row in others} & known == prompts & known


def test_evaluation_data_that_is_given_is_taken(tmp_path: Path) -> None:
    train, given = (written(tmp_path / name, range(end)) for name, end in (("a.jsonl", 3), ("b.jsonl", 2)))
    rows, held_out = comparisons(DataConfig(train=str(train), eval=str(given), max_eval_rows=4))
    assert (len(rows), len(held_out)) == (9, 4)


def test_too_few_comparisons_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="are too few to hold some out"):
        comparisons(DataConfig(train=str(written(tmp_path / "a.jsonl", range(1)))))


def test_presets_are_chosen_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONFIG_NAME", raising=False)
    assert preset("ppo") == "hh/ppo_6B"
    monkeypatch.setenv("CONFIG_NAME", "125M")
    assert preset("sft") == "hh/sft_125M"
    monkeypatch.setenv("CONFIG_NAME", "7B")
    with pytest.raises(ConfigError, match="CONFIG_NAME=7B is no preset: choose among 125M, 1B, 6B, 20B"):
        preset("ppo")


def evaluated(run: Path, gain: float) -> Path:
    """The samples of a PPO run whose rewards rose by `gain` +- 0.2 on 20 prompts: a standard error of
    0.046."""
    (run / "samples").mkdir(parents=True)
    for step, shift in ((0, 0.0), (30, gain)):
        with (run / f"samples/eval_{step:06d}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["prompt", "output", "reward"])
            for number in range(20):
                noise = 0.2 * (-1) ** number if step else 0.0
                writer.writerow([f"{number}?", " y", number + shift + noise])
    return run


@pytest.mark.parametrize(("gain", "ok"), [(0.5, True), (0.05, False)])
def test_a_gain_counts_by_its_standard_error(gain: float, ok: bool, tmp_path: Path) -> None:
    figure = ppo_figure(evaluated(tmp_path, gain))
    assert figure.ok is ok
    assert figure.after - figure.before == pytest.approx(gain)


def table(folder: Path, capsys: pytest.CaptureFixture[str], *, gain: float, accuracy: float) -> Any:
    """(exit code, errors) of the table of runs in which everything went well but perhaps two figures."""
    evaluated(folder / "ppo", gain)
    for run, metric, values in (
        ("sft", "eval/loss", (5.0, 4.0)),
        ("reward_model", "eval/accuracy", (0.5, accuracy)),
        ("ilql", "eval/reward", (0.1, 0.2)),
        ("sft_more", "eval/reward", (0.1, 0.2)),
    ):
        (folder / run).mkdir()
        lines = [json.dumps({metric: value}) + "\n" for value in values]
        (folder / run / "metrics.jsonl").write_text("".join(lines))
    code = main([str(written(folder / "a.jsonl", range(200))), str(folder)])
    return code, capsys.readouterr().err


def test_a_table_of_good_figures_ends_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert table(tmp_path, capsys, gain=0.5, accuracy=0.99) == (0, "")


def test_each_mark_that_was_missed_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, errors = table(tmp_path, capsys, gain=0.05, accuracy=0.52)
    assert code == 1
    assert [line.partition(":")[2].partition(" on ")[0] for line in errors.splitlines()] == [
        " reward model: accuracy",
        " PPO: reward",
    ]
    assert "went from 0.500 to 0.520, which is not what smoke.sh promises (above 0." in errors
