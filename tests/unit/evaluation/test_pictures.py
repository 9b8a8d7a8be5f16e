"""The figure of overoptimisation: its groups, its points, its fits, and what it says on its axes."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from conch.errors import ConfigError, DataError
from conch.evaluation.best_of_n import best_of_n
from conch.evaluation.curves import RESULTS, Curve, Start, curve_of, results_json
from conch.evaluation.fits import Form
from conch.evaluation.pictures import AXES, Axis, draw, draw_folder, group_of, groups_of, main
from conch.evaluation.records import EvaluatedSample, EvaluationRecord, record_path, write_record


def curve(label: str = "run", *, alpha: float = 1.0, form: Form = "rl", **columns: Any) -> Curve:
    step = np.array(columns.pop("step", [0.0, 100, 200, 300, 400]))
    kl = step / 40
    d = np.sqrt(kl)
    gold = d * (alpha - 0.4 * np.log(np.where(d > 0, d, 1.0))) if form == "rl" else d * (alpha - 0.4 * d)
    settings: dict[str, Any] = {
        "proxy": 5 + 2 * gold,
        "gold": 10 + 3 * gold,
        "variance": np.full(len(step), math.nan),
        **columns,
    }
    return Curve(
        label, step, kl, **settings, form=form, proxy_start=Start(5.0, 2.0), gold_start=Start(10.0, 3.0)
    )


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def keep_run(folder: Path, scale: float) -> Path:
    for step in (0, 10, 20, 30):
        samples = tuple(
            EvaluatedSample(
                number, "p", "o", 1, {"reward": number + step * scale, "gold": number - step / 30}
            )
            for number in range(4)
        )
        write_record(record_path(folder, step), EvaluationRecord(step, samples, {"eval/kl": step / 5}))
    return folder


def test_figure_has_its_points_and_fits_beside_it(tmp_path: Path) -> None:
    png, points, fits = draw({"single": [curve("a"), curve("b", alpha=1.2)]}, tmp_path)

    assert png.read_bytes().startswith(b"\x89PNG")
    rows = rows_of(points)
    assert [row["seed"] for row in rows] == ["a"] * 5 + ["b"] * 5
    assert (rows[0]["step"], rows[0]["gold"], rows[0]["gold_gain"]) == ("0", "10", "0")
    assert float(rows[4]["sqrt_kl"]) == pytest.approx(math.sqrt(10))
    assert rows[0]["members_variance"] == ""
    gold, proxy = rows_of(fits)
    assert (gold["series"], gold["seeds"]) == ("gold", "2")
    assert (float(gold["alpha"]), float(gold["beta"])) == pytest.approx((1.1, 0.4))
    assert float(gold["gamma"]) == pytest.approx(0.0, abs=1e-9)
    assert float(proxy["alpha"]) == pytest.approx(1.1)


def test_seeds_are_brought_to_the_steps_that_all_have() -> None:
    short = curve("short", step=[0.0, 200, 400, 500, 600])
    group = group_of("g", [curve("long"), short])

    band = group.band("gold")
    assert band.at.tolist() == [0, 200, 400]
    assert band.low == pytest.approx(band.mean) and band.high == pytest.approx(band.mean)


def test_band_goes_from_the_least_seed_to_the_greatest() -> None:
    band = group_of("g", [curve(alpha=alpha) for alpha in (1.0, 1.1, 1.5)]).band("gold")

    d = math.sqrt(2.5)
    assert (band.mean[1], band.low[1], band.high[1]) == pytest.approx(
        tuple(d * (alpha - 0.4 * math.log(d)) for alpha in (1.2, 1.0, 1.5))
    )


def test_line_over_the_distance_goes_forward_where_the_seeds_distances_differ() -> None:
    near = replace(curve(gold=10 + 3 * np.array([0.0, 1, 2, 3, 4])), kl=np.array([0.0, 1, 4, 9, 16]))
    far = replace(curve(gold=10 + 3 * np.array([0.0, 2, 6, 4, 8])), kl=np.array([0.0, 4, 36, 16, 64]))

    band = group_of("g", [near, far]).band_over_distance("gold")

    # Of the second seed, gains at distances 0, 2, 4, 6, 8 are 0, 2, 4, 6, 8; of the first one they are d.
    assert band.at.tolist() == [0, 1, 2, 3, 4]
    assert band.mean == pytest.approx(band.at) and band.low == pytest.approx(band.high)


def test_line_over_the_distance_of_one_run_is_in_the_order_of_its_steps() -> None:
    run = replace(curve(), kl=np.array([0.0, 4, 36, 16, 64]))

    assert group_of("g", [run]).band_over_distance("gold").at.tolist() == [0, 2, 6, 4, 8]


def test_one_best_of_n_has_its_intervals_for_a_band(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    prompts = [{name: draws.normal(size=64) for name in ("reward", "gold")} for _ in range(4)]
    result = best_of_n(prompts, [1, 4, 16], proxy="reward", resamples=50)
    starts = {"reward": Start(1.0, 2.0), "gold": Start(1.0, 2.0)}
    (tmp_path / RESULTS).write_text(json.dumps(results_json(result, starts, {})))

    band = group_of("g", [curve_of(tmp_path)]).band("gold")

    low, high = result.interval["gold"]
    assert band.low == pytest.approx((low - 1) / 2) and band.high == pytest.approx((high - 1) / 2)
    assert (band.low < band.mean).all() and (band.mean < band.high).all()
    assert draw_folder(tmp_path)[0].name == "best_of_n.png"


def test_seeds_in_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for seed in ("seed_0", "seed_1"):
        keep_run(tmp_path / seed / "ppo", 0.5)

    main([f"ppo={tmp_path}/seed_0/ppo,{tmp_path}/seed_1/ppo", "--output", str(tmp_path / "out")])

    seeds = {row["seed"] for row in rows_of(tmp_path / "out/overoptimisation.csv")}
    assert seeds == {"seed_0/ppo", "seed_1/ppo"}


def test_group_of_two_kinds_or_without_a_common_step_is_refused() -> None:
    with pytest.raises(DataError, match="has runs and best-of-n"):
        group_of("g", [curve(), curve(form="best_of_n")])
    with pytest.raises(DataError, match="share no step"):
        group_of("g", [curve(), curve(step=[1.0, 2.0, 3.0])])


def test_too_few_evaluations_draw_without_a_fit_and_say_so(tmp_path: Path) -> None:
    group = group_of("g", [curve(step=[0.0, 100])])

    assert "too few for a fit" in group.note and not group.fits
    _, _, fits = draw({"g": [curve(step=[0.0, 100])]}, tmp_path)
    assert rows_of(fits) == []


@pytest.mark.parametrize(("axis", "furthest"), [("sqrt_kl", math.sqrt(10)), ("kl", 10.0)])
def test_first_panel_has_the_axis_that_is_asked_for(
    axis: Axis, furthest: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    draw({"several": [curve("a"), curve("b")], "one": [curve("c")]}, tmp_path, axis=axis)
    first, steps, *_ = figures[0].axes
    assert first.get_xlabel() == AXES[axis]
    reached = [float(np.max(line.get_xdata())) for line in first.lines[:-1]]  # the last is the zero line
    # Of both groups proxy, gold and the fit; of several also each run's gold.
    assert reached == pytest.approx([furthest] * 8)
    assert float(np.max(steps.lines[0].get_xdata())) == 400


def test_all_kinds_of_panels_are_drawn(tmp_path: Path) -> None:
    n = [1.0, 4, 16, 64, 256]
    nothing = np.full(5, math.nan)
    curves = {
        "ppo": [curve(variance=np.arange(5.0))],
        "bon": [curve(form="best_of_n", step=n)],
        "no gold": [curve(gold=nothing)],
    }

    png, points, _ = draw(curves, tmp_path)

    assert png.stat().st_size > 10_000
    assert {row["n"] for row in rows_of(points) if row["group"] == "bon"} == {"1", "4", "16", "64", "256"}


def test_command_draws_groups_of_runs_beside_best_of_n(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        keep_run(tmp_path / name, 0.5)
    draws = np.random.default_rng(0)
    prompts = [{name: draws.normal(size=64) for name in ("reward", "gold")} for _ in range(2)]
    result = best_of_n(prompts, [1, 2, 4, 8, 16], proxy="reward")
    (tmp_path / "bon").mkdir()
    starts = {"reward": Start(0.0, 1.0), "gold": Start(0.0, 1.0)}
    (tmp_path / "bon" / RESULTS).write_text(json.dumps(results_json(result, starts, {})))

    main(
        [
            f"ppo={tmp_path}/a,{tmp_path}/b",
            str(tmp_path / "bon"),
            "--axis",
            "kl",
            "--output",
            str(tmp_path / "out"),
        ]
    )

    written = [Path(line) for line in capsys.readouterr().out.split()]
    assert [path.name for path in written] == [
        "overoptimisation.png",
        "overoptimisation.csv",
        "overoptimisation_fits.csv",
    ]
    assert {(row["group"], row["seed"]) for row in rows_of(written[1])} == {
        ("ppo", "a"),
        ("ppo", "b"),
        ("bon", "bon"),
    }


def test_a_run_without_gold_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = tuple(EvaluatedSample(0, "p", "o", 1, {"reward": float(k)}) for k in range(3))
    for step in (0, 1):
        write_record(
            record_path(tmp_path / "a", step), EvaluationRecord(step, samples, {"eval/kl": float(step)})
        )

    main([f"{tmp_path}/a", "--output", str(tmp_path / "out")])

    assert f"{tmp_path}/a has no gold scores, so a is drawn without" in caplog.text


@pytest.mark.parametrize(
    ("words", "groups"),
    [
        (["runs/a"], {"a": ["runs/a"]}),
        (["x=a,b", "y=c"], {"x": ["a", "b"], "y": ["c"]}),
        (["p/eval", "q/eval"], {"eval": ["p/eval"], "q/eval": ["q/eval"]}),
    ],
)
def test_words_name_groups(words: list[str], groups: dict[str, list[str]]) -> None:
    assert {name: list(map(str, paths)) for name, paths in groups_of(words).items()} == groups


@pytest.mark.parametrize(("words", "sentence"), [(["x="], "no folder"), (["x=a", "x=b"], "stands twice")])
def test_words_that_name_no_groups_are_refused(words: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        groups_of(words)


def test_folder_with_an_equals_sign_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kl=0.1").mkdir()

    assert groups_of(["kl=0.1"]) == {"kl=0.1": [Path("kl=0.1")]}


def test_folder_whose_scores_are_all_alike_has_no_picture(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = best_of_n([{"reward": np.ones(4)}], [1, 2, 4], proxy="reward")
    content = results_json(result, {"reward": Start.of(np.ones(4))}, {})
    (tmp_path / RESULTS).write_text(json.dumps(content))

    assert draw_folder(tmp_path) == []
    assert "no picture" in caplog.text and "all alike" in caplog.text
