"""A run's curves as PNG files."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from conch.errors import DataError
from conch.runs.plots import main, plot_against, plot_run, plot_runs, read_metric, with_unit
from conch.runs.tracking import METRICS_FILE


def write_run(folder: Path) -> Path:
    lines = [{"step": step, "reward/mean": step / 10, "policy/kl": None} for step in range(1, 11)]
    lines[4]["eval/reward"] = 0.5
    (folder / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", data[16:24])


def test_metric_is_read_with_its_steps(tmp_path: Path) -> None:
    write_run(tmp_path)

    assert read_metric(tmp_path, "eval/reward") == ([5], [0.5])
    assert read_metric(tmp_path, "reward/mean")[1][-1] == 1.0
    assert read_metric(tmp_path, "policy/kl") == ([], []), "null is no value"


def colourful_pixels(path: Path) -> int:
    from matplotlib.image import imread

    pixels = imread(path)[..., :3]
    return int((pixels.max(axis=-1) - pixels.min(axis=-1) > 0.2).sum())


def test_plots_of_metrics_are_png_files_of_what_the_run_logged(tmp_path: Path) -> None:
    paths = plot_run(write_run(tmp_path), ["reward/mean", "eval/reward"])

    assert [path.name for path in paths] == ["reward_mean.png", "eval_reward.png"]
    for path in paths:
        assert path.parent == tmp_path / "plots"
        assert png_size(path) == (840, 504)
        assert 20 < colourful_pixels(path) < 20_000, "a curve on a white ground"


def test_plots_can_be_drawn_again(tmp_path: Path) -> None:
    assert plot_run(write_run(tmp_path), ["reward/mean"]) == plot_run(tmp_path, ["reward/mean"])


MAIN_FIGURES = {
    "sft": ([{"train/loss": 2.0, "train/epoch": 0.1}] * 3, ["loss"]),
    "reward_model": (
        [{"train/loss": 0.7}, {"train/loss": 0.6, "eval/accuracy": 0.6}],
        ["loss", "accuracy (share)"],
    ),
    "ppo": (
        [{"reward/mean": 0.1, "policy/kl": 0.0, "policy/entropy": 2.0, "eval/gold/reward": 1.0}] * 2,
        ["reward", "kl (nats per sample)", "entropy (nats per token)", "gold"],
    ),
    "one step": ([{"train/loss": 2.0}], ["loss"]),
}


@pytest.mark.parametrize("kind", MAIN_FIGURES)
def test_run_of_any_algorithm_has_its_main_figures_in_one_picture(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, titles = MAIN_FIGURES[kind]
    write_rows(tmp_path, rows)
    drawn = panels(monkeypatch)

    main([str(tmp_path)])

    path = tmp_path / "plots/curves.png"
    assert capsys.readouterr().out == f"{path}\n"
    assert [axes.get_title() for axes in drawn] == titles
    assert all(axes.get_xlabel() == "step" for axes in drawn)
    assert colourful_pixels(path) > 20


def test_runs_are_drawn_over_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, rows in (
        ("a", [{"reward/mean": 0.1}] * 2),
        ("b", [{"reward/mean": 0.2, "train/loss": 1.0}] * 3),
    ):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name, rows)
    drawn = panels(monkeypatch)
    folders = [str(tmp_path / "a"), f"mine={tmp_path / 'b'}"]

    main(folders)
    main([*folders, "train/loss"])

    names = ["curves_a_vs_mine.png", "train_loss_a_vs_mine.png"]
    assert capsys.readouterr().out.split() == [f"{tmp_path}/a/plots/{name}" for name in names]
    reward, loss, metric = drawn
    assert [len(line.get_xdata()) for line in reward.get_lines()] == [2, 3]
    assert [len(line.get_xdata()) for line in loss.get_lines()] == [3], "only the other one has a loss"
    assert reward.get_lines()[1].get_color() == loss.get_lines()[0].get_color(), "a color is one run's"
    (legend,) = reward.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "mine"]
    assert [text.get_text() for text in metric.get_legend().get_texts()] == ["a", "mine"]


def write_rows(folder: Path, rows: Sequence[dict[str, float]]) -> None:
    lines = [json.dumps({"step": step, **row}) + "\n" for step, row in enumerate(rows)]
    (folder / METRICS_FILE).write_text("".join(lines))


def panels(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The panels of all pictures that are drawn from here on."""
    from matplotlib.figure import Figure

    drawn: list[Any] = []
    save = Figure.savefig

    def note(figure: Figure, *words: Any, **more: Any) -> None:
        drawn.extend(figure.axes)
        save(figure, *words, **more)

    monkeypatch.setattr(Figure, "savefig", note)
    return drawn


@pytest.mark.parametrize("line", [b'{"step": 11, "rew', b"7", b'{"reward/mean": 1}', b"\xff\xfe"])
def test_damaged_line_is_named_by_number(line: bytes, tmp_path: Path) -> None:
    path = write_run(tmp_path) / METRICS_FILE
    path.write_bytes(path.read_bytes() + line + b'\n{"step": 12}\n')

    with pytest.raises(DataError, match=f"line 11 of {path} is damaged: .*; delete that line"):
        plot_run(tmp_path)


def test_last_line_of_a_run_that_goes_on_may_be_half_written(tmp_path: Path) -> None:
    path = write_run(tmp_path) / METRICS_FILE
    path.write_bytes(path.read_bytes() + b'{"step": 11, "rew')

    assert plot_run(tmp_path) == [tmp_path / "plots/curves.png"]


def test_folder_without_metrics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{tmp_path} is not a run folder: it has no {METRICS_FILE}"):
        plot_run(tmp_path)


def test_folder_of_runs_names_the_newest(tmp_path: Path) -> None:
    for day in ("2026-01-01", "2026-01-02"):
        (tmp_path / day).mkdir()
        write_run(tmp_path / day)
        os.utime(tmp_path / day / METRICS_FILE, (int(day[-1]), int(day[-1])))
    with pytest.raises(DataError, match=f"is not a run folder.*newest run below it is {tmp_path}/2026-01-02"):
        plot_run(tmp_path)


def test_missing_folder_is_no_folder_rather_than_no_run(tmp_path: Path) -> None:
    (tmp_path / "outputs").mkdir()
    with pytest.raises(DataError, match=f"there is no folder {tmp_path}/output; did you mean .*/outputs\\?"):
        plot_run(tmp_path / "output")


def test_command_line_prints_the_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(write_run(tmp_path)), "reward/mean"])

    assert capsys.readouterr().out == f"{tmp_path}/plots/reward_mean.png\n"


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("reward/man", "; did you mean `reward/mean`?"),
        ("rew", "; names like it are: eval/reward, reward/mean"),
        ("no/such", "; there are: eval/reward, policy/kl, reward/mean"),
        ("policy/kl", "`policy/kl` of {name} is null at every step: it was no number"),
        ("{above}/othr", ", and there is no such folder; did you mean {above}/other?"),
    ],
)
def test_word_that_is_no_run_and_no_metric_is_refused_with_a_near_one(
    word: str, hint: str, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "run").mkdir()
    write_run(tmp_path / "run")
    word, hint = (text.format(above=tmp_path, name="run") for text in (word, hint))
    with pytest.raises(DataError) as caught:
        main([str(tmp_path / "run"), word])
    message = str(caught.value)
    assert message in (f"{tmp_path / 'run'} logged no `{word}`{hint}", hint)


def test_run_without_a_step_is_told_to_have_none(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text("")
    with pytest.raises(DataError, match=f"{tmp_path} logged no step yet"):
        main([str(tmp_path)])


def test_line_without_a_run_asks_for_one_and_names_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for newest in ("", "; the newest one is outputs/a"):
        with pytest.raises(SystemExit) as ended:
            main([])
        assert ended.value.code == 2
        assert capsys.readouterr().err == f"error: name the folder of a run{newest}\n"
        (tmp_path / "outputs/a").mkdir(parents=True, exist_ok=True)
        write_run(tmp_path / "outputs/a")


def test_long_names_of_many_runs_make_a_name_that_a_disk_takes(tmp_path: Path) -> None:
    runs = {f"{number}_{'long' * 20}": write_run(tmp_path) for number in range(12)}

    (path,) = plot_runs(runs)

    assert path.is_file()


def test_axes_name_the_unit_where_there_is_one() -> None:
    metrics = {
        "policy/kl": "policy/kl (nats per sample)",
        "eval/length_mean@temperature=1": "eval/length_mean@temperature=1 (tokens)",
        "eval/optimality": "eval/optimality (1 = shortest walks)",
        "time/rollout_s": "time/rollout_s (s)",
        "time/tokens_per_s": "time/tokens_per_s (tokens/s)",
        "train/clip_fraction": "train/clip_fraction (share)",
        "reward/mean": "reward/mean",
    }
    assert {name: with_unit(name) for name in metrics} == metrics


def test_metrics_are_drawn_over_another_one(tmp_path: Path) -> None:
    write_run(tmp_path)
    # The one was logged at ten steps, the other at one of them.
    path = plot_against(tmp_path, "eval/reward", "nats", {"reward/mean": "served"})

    assert path == tmp_path / "plots/reward_mean_over_eval_reward.png"
    assert png_size(path) == (840, 504)


def test_metrics_of_other_steps_are_not_drawn_over_one(tmp_path: Path) -> None:
    write_run(tmp_path)
    with pytest.raises(DataError, match="logged no `policy/kl` at a step at which it logged `reward/mean`"):
        plot_against(tmp_path, "reward/mean", "nats", {"eval/reward": "served", "policy/kl": "KL"})
