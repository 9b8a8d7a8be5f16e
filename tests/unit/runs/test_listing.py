from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from conch.config import load as load_config
from conch.config.algorithms import run_config_of
from conch.errors import DataError
from conch.runs.command import age, difference_table, main
from conch.runs.listing import differences, find_runs, summarise
from conch.runs.reading import load
from conch.runs.state import noted_state


def make_run(folder: Path, rows: list[dict[str, Any]], config: dict[str, Any], changed: float = 0) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "checkpoints/step_4").mkdir(parents=True)
    (folder / "checkpoints/step_4/metrics.jsonl").write_text("")
    os.utime(folder / "metrics.jsonl", (changed, changed))
    return folder


ROWS = [
    {"step": 0, "eval/reward": 0.5},
    {"step": 2, "eval/reward": 0.75, "train/loss": 3.0},
    {"step": 3, "train/loss": 2.0},
    {"step": 4, "eval/reward": None},
]
CONFIG = {"train": {"total_steps": 4, "seed": 0, "run_dir": "a"}, "ppo": {"gamma": 1.0, "kl": {"coef": 0.05}}}


def test_runs_are_found_below_a_folder_newest_first(tmp_path: Path) -> None:
    old = make_run(tmp_path / "a/b", ROWS, CONFIG, changed=10)
    new = make_run(tmp_path / "c", ROWS, CONFIG, changed=20)
    assert find_runs(tmp_path) == [new, old]
    assert find_runs(old) == [old]
    with pytest.raises(DataError, match="there is no folder"):
        find_runs(tmp_path / "nowhere")


def test_run_of_a_training_service_is_listed_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "id" / "train", [{"step": 1}], {"grpo": {}})
    said = {"settings": {}, "state": "running", "reason": "", "version": 1, "time": 0.0}
    (tmp_path / "runs" / "id" / "run.json").write_text(json.dumps(said))
    assert find_runs(tmp_path) == [run]


def test_summary_of_a_run_without_a_record_is_read_from_its_files(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ROWS, CONFIG, changed=10)
    (run / "best_metric.txt").write_text("eval/reward\n")
    summary = summarise(run)
    assert (summary.algorithm, summary.state, summary.step, summary.total_steps) == ("ppo", "finished", 4, 4)
    assert (summary.metric, summary.best, summary.best_step, summary.changed) == ("eval/reward", 0.75, 2, 10)


@pytest.mark.parametrize(
    ("sections", "algorithm"),
    [
        (["grpo", "asynchronous"], "async_grpo"),
        (["grpo"], "grpo"),
        (["reward_model"], "reward_model"),
        ([], ""),
    ],
)
def test_algorithm_is_told_by_its_section(sections: list[str], algorithm: str, tmp_path: Path) -> None:
    config = {"train": {"total_steps": 9}, **{name: {} for name in sections}}
    summary = summarise(make_run(tmp_path / "run", ROWS, config))
    assert (summary.algorithm, summary.state) == (algorithm, "stopped")


def test_best_of_a_loss_is_the_least(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ROWS, CONFIG)
    (run / "best_metric.txt").write_text("train/loss\n")
    assert (summarise(run).best, summarise(run).best_step) == (2.0, 3)


def test_run_that_begins_and_rows_that_are_half_written_are_listed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ROWS, CONFIG)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "eval/re')
    (tmp_path / "new").mkdir()
    with noted_state(run, "ppo", 8), noted_state(tmp_path / "new", "sft", 3):
        assert (summarise(run).state, summarise(run).step, summarise(run).total_steps) == ("running", 4, 8)
        assert summarise(tmp_path / "new").step is None
        assert set(find_runs(tmp_path)) == {run, tmp_path / "new"}


def test_list_names_runs_with_state_step_and_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "sub/run", ROWS, CONFIG, changed=10)
    (run / "best_metric.txt").write_text("eval/reward\n")
    (tmp_path / "broken").mkdir()
    with pytest.raises(ValueError), noted_state(tmp_path / "broken", "grpo", 3):
        raise ValueError("no luck")
    main([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "algorithm", "state", "step", "best", "age"]
    assert lines[1].split()[:5] == ["broken", "grpo", "failed", "-/3", "-"]
    assert lines[2].split()[:8] == ["sub/run", "ppo", "finished", "4/4", "eval/reward", "0.75", "at", "2"]
    assert lines[-1] == "broken: no luck"


def test_list_as_json_has_an_object_for_each_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run", ROWS, CONFIG, changed=10)
    main([str(tmp_path), "--json"])
    assert json.loads(capsys.readouterr().out)["folder"] == str(tmp_path / "run")


def test_folder_without_runs_is_said_to_have_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(tmp_path)])
    assert capsys.readouterr().out == f"no runs in {tmp_path}\n"


def test_diff_shows_settings_that_differ_but_not_where_runs_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CONFIG | {"ppo": {"gamma": 1.0, "kl": {"coef": 0.25}}}
    other = {"train": {"total_steps": 4, "seed": 1, "run_dir": "b"}, "ppo": {"gamma": 1.0, "kl": {}}}
    first, second = make_run(tmp_path / "a", [], config), make_run(tmp_path / "b", [], other)
    main(["diff", str(first), f"new={second}"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["setting", "a", "new"],
        ["train.seed", "0", "1"],
        ["ppo.kl.coef", "0.25", "-"],
        ["ppo.kl", "-", "{}"],
    ]
    main(["diff", str(first), str(second), "--all", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["train.run_dir"] == ["a", "b"] and found["ppo.kl.coef"] == [0.25, None]
    main(["diff", str(first), str(make_run(tmp_path / "c", [], config))])
    assert capsys.readouterr().out == "no setting differs\n"


def test_diff_of_two_algorithms_names_them_and_leaves_out_defaults_that_one_alone_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = []
    for name, other in (("ppo", {"ppo": {"epochs": 9}}), ("sft", {"sft": {"max_length": 7}})):
        values = {
            "model": {"path": "m"},
            "data": {"train": "d"},
            "train": {"total_steps": 1, "seed": len(words)},
        }
        config = load_config(run_config_of(name), values | other)
        words.append(str(tmp_path / name))
        make_run(tmp_path / name, [], config.model_dump(mode="json"))
    main(["diff", *words])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["setting", *("ppo", "sft")],
        ["algorithm", '"ppo"', '"sft"'],
        ["scheduler.name", '"linear"', '"cosine"'],
        ["train.seed", "0", "1"],
        ["train.eval_every", "20", "100"],
        ["ppo.epochs", "9", "-"],
        ["sft.max_length", "-", "7"],
    ]
    main(["diff", *words, "--all"])
    assert len(capsys.readouterr().out.splitlines()) > 40


def test_long_values_are_cut_in_their_middle_for_paths_differ_at_their_ends() -> None:
    values = [f"/data/{'folder/' * 20}{name}" for name in ("one", "two")]
    row = difference_table({"model.path": values}, ["a", "b"]).splitlines()[1].split()
    assert row[1].endswith('one"') and row[2].endswith('two"') and max(map(len, row)) == 40


def test_diff_of_what_is_no_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "a", [], CONFIG)
    with pytest.raises(DataError, match="is no run's folder"):
        main(["diff", str(run), str(tmp_path)])
    with pytest.raises(SystemExit):
        main(["diff", str(run)])
    assert capsys.readouterr().err == "error: name at least two runs\n"


@pytest.mark.parametrize("content", [b"train: [", b"- a\n", b"a: \xff\n"], ids=["YAML", "a list", "no text"])
def test_damaged_settings_are_told_alike_by_all_and_passed_over_by_a_list(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", ROWS, CONFIG)
    (run / "config.yaml").write_bytes(content)
    for told in (lambda: load(run).settings, lambda: load(run).algorithm, lambda: differences([run, run])):
        with pytest.raises(DataError, match=rf"^{run}/config\.yaml is damaged: "):
            told()
    main([str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[1].split()[:4] == ["run", "-", "stopped", "4/-"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1.0, "0 s"), (59.0, "59 s"), (60.0, "1 min"), (7200.0, "2 h"), (2e5, "2 d")]
)
def test_age_is_told_in_its_largest_unit(seconds: float, text: str) -> None:
    assert age(seconds) == text
