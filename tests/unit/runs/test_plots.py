"""A run's curves as PNG files."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest

from conch.errors import DataError
from conch.runs.plots import LABELS, main, plot_against, plot_run, read_metric
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


def test_plots_are_png_files_of_what_the_run_logged(tmp_path: Path) -> None:
    from matplotlib.image import imread

    paths = plot_run(write_run(tmp_path))

    assert [path.name for path in paths] == ["reward_mean.png", "eval_reward.png"]
    for path in paths:
        assert path.parent == tmp_path / "plots"
        assert png_size(path) == (840, 504)
        pixels = imread(path)[..., :3]
        colourful = (pixels.max(axis=-1) - pixels.min(axis=-1) > 0.2).sum()
        assert 20 < colourful < 20_000, "a curve on a white ground"


def test_plots_can_be_drawn_again(tmp_path: Path) -> None:
    assert plot_run(write_run(tmp_path), ["reward/mean"]) == plot_run(tmp_path, ["reward/mean"])


@pytest.mark.parametrize("line", [b'{"step": 11, "rew', b"7", b'{"reward/mean": 1}', b"\xff\xfe"])
def test_damaged_line_is_named_by_number(line: bytes, tmp_path: Path) -> None:
    path = write_run(tmp_path) / METRICS_FILE
    path.write_bytes(path.read_bytes() + line)

    with pytest.raises(DataError, match=f"line 11 of {path} is damaged: .*; delete that line"):
        plot_run(tmp_path)


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


def test_command_line_refuses_metrics_that_were_not_logged(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="logged none of the asked-for metrics"):
        main([str(write_run(tmp_path)), "no/such"])


def test_default_curves_have_titles_with_units() -> None:
    assert "nats" in LABELS["policy/kl"] and "mean" in LABELS["eval/reward"]


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
