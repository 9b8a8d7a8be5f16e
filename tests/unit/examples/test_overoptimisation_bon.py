"""The paper's programs of best-of-n: gold stays with its answer, and no study overwrites another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conch.errors import ConfigError, DataError
from conch.evaluation.best_of_n import best_of_n_curve
from examples.overoptimisation import bon_models, run_bon_ensembles, run_bon_pipeline
from examples.overoptimisation.bon_files import DEFAULT_NS, Entry, choices, objective_of, read_sorted

REWARDS = """
from pathlib import Path


def _score(seed, text):
    return float((sum(map(ord, text)) * 7919 * (seed + 3)) % 101) / 10 + seed


def _asked(name, outputs):
    with Path({log!r}).open("a") as file:
        file.write(f"{{name}} {{len(outputs)}}\\n")


def seed1(outputs, **_):
    _asked("seed1", outputs)
    return [_score(1, output) for output in outputs]


def seed2(outputs, **_):
    _asked("seed2", outputs)
    return [_score(2, output) for output in outputs]


def seed3(outputs, **_):
    _asked("seed3", outputs)
    return [float(len(output) % 3) for output in outputs]
"""
NS = [1, 2, 8, 40]


class Study:
    """Answers with gold scores, and reward functions, in a folder that is the current one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "asked.txt"
        self.log.touch()
        (folder / "rewards.py").write_text(REWARDS.format(log=str(self.log)))
        draws = np.random.default_rng(0)
        self.rows = [
            {
                "instruction": f"do {number}",
                "answers": ["".join(draws.choice([*"abcdef"], size=draws.integers(3, 6))) for _ in range(40)],
                "gold_scores": draws.normal(size=40).tolist(),
            }
            for number in range(3)
        ]
        self.rows[0]["answers"][7] = self.rows[0]["answers"][8]  # a duplicate with a gold score of its own
        self.write(self.rows)

    def write(self, rows: list[dict[str, Any]], name: str = "answers.jsonl") -> None:
        (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(self, *words: str, output: str = "study", answers: str = "answers.jsonl") -> Path:
        run_bon_pipeline.main(
            [
                f"{self.folder}/rewards.py:seed{{seed}}",
                *("-o", output, "--gold-labelled-generations", answers, "--seeds", "1,2,3"),
                *("--sample-ns", "1,2,8,40", *words),
            ]
        )
        return self.folder / "runs" / output

    def asked(self) -> list[str]:
        lines = self.log.read_text().splitlines()
        self.log.write_text("")
        return lines


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blank_pictures: None) -> Study:
    monkeypatch.chdir(tmp_path)
    return Study(tmp_path)


def results(folder: Path) -> list[dict[str, float]]:
    return json.loads((folder / "bon_sampled_results.json").read_text())


def score(seed: int, text: str) -> float:
    return len(text) % 3 if seed == 3 else float((sum(map(ord, text)) * 7919 * (seed + 3)) % 101) / 10 + seed


def expected(study: Study, objective: Any) -> list[float]:
    curves = []
    for row in study.rows:
        proxy = np.array([objective([score(seed, text) for seed in (1, 2, 3)]) for text in row["answers"]])
        curves.append(best_of_n_curve(proxy.astype(float), np.array(row["gold_scores"]), NS))
    return np.mean(curves, axis=0).tolist()


def test_gold_of_every_seed_and_every_ensemble_is_that_of_the_answer_it_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    study = Study(tmp_path)
    folder = study.run("--uwo-weights", "0.5,2")

    objectives: dict[str, Any] = {
        **{f"seed{seed}": (lambda scores, place=seed - 1: scores[place]) for seed in (1, 2, 3)},
        "ensemble_mean": np.mean,
        "ensemble_WCO": min,
        "ensemble_UWO-0.5": lambda scores: np.mean(scores) - 0.5 * np.var(scores),
        "ensemble_UWO-2": lambda scores: np.mean(scores) - 2 * np.var(scores),
    }
    for name, objective in objectives.items():
        rows = results(folder / name)
        assert [row["n"] for row in rows] == NS
        assert rows[0].keys() == {"n", "proxy_score", "gold_score"}
        assert [row["gold_score"] for row in rows] == pytest.approx(expected(study, objective)), name
        for row, entry in zip(
            study.rows, json.loads((folder / name / "proxy_labelled_sorted.json").read_text()), strict=True
        ):
            assert entry["proxy_scores"] == sorted(entry["proxy_scores"])
            golds = sorted(zip(row["answers"], row["gold_scores"], strict=True))
            assert sorted(zip(entry["answers"], entry["gold_scores"], strict=True)) == golds
    assert (folder / "overoptimisation.png").read_bytes().startswith(b"\x89PNG")


def test_order_of_the_answers_in_the_file_changes_no_result(study: Study) -> None:
    first = study.run()
    order = np.random.default_rng(5).permutation(40)
    rows = [
        {**row, **{name: [row[name][place] for place in order] for name in ("answers", "gold_scores")}}
        for row in study.rows
    ]
    study.write(rows, "permuted.jsonl")

    second = study.run(output="permuted", answers="permuted.jsonl")

    for name in ("seed1", "seed3", "ensemble_mean", "ensemble_WCO", "ensemble_UWO-0.5"):
        for one, other in zip(results(first / name), results(second / name), strict=True):
            assert one == pytest.approx(other), name


def test_call_that_was_cut_short_asks_for_the_rest_only(study: Study) -> None:
    folder = study.run("--no-ensembles")
    assert study.asked() == [f"seed{seed} 40" for seed in (1, 1, 1, 2, 2, 2, 3, 3, 3)]
    assert not [*folder.glob("ensemble_*")]
    before = results(folder / "seed2")
    (folder / "seed2" / "scores" / "entry_000001.json").write_text('{"of": "", "sco')

    study.run()

    assert study.asked() == ["seed2 40"]
    assert results(folder / "seed2") == before


def test_other_answers_are_scored_anew(study: Study) -> None:
    study.run("--no-ensembles")
    study.asked()
    study.rows[1]["answers"][0] = "new"
    study.write(study.rows)

    study.run("--no-ensembles")

    assert study.asked() == ["seed1 40", "seed2 40", "seed3 40"]


def test_checkpoint_that_was_trained_anew_is_another_model(tmp_path: Path) -> None:
    entry = Entry({"instruction": "do"}, ("a", "b"), np.zeros(2))
    (tmp_path / "rm").mkdir()
    (tmp_path / "rm" / "model.safetensors").write_text("first")
    mark = bon_models.mark_of(str(tmp_path / "rm"), entry, "")

    assert bon_models.mark_of(str(tmp_path / "rm"), entry, "") == mark
    (tmp_path / "rm" / "model.safetensors").write_text("second")
    assert bon_models.mark_of(str(tmp_path / "rm"), entry, "") != mark


def test_files_of_the_paper_s_code_are_brought_together_by_their_texts(study: Study) -> None:
    folder = study.run()
    before = {path.name: results(path) for path in folder.glob("ensemble_*")}
    for path in folder.glob("seed*/proxy_labelled_sorted.json"):
        rows = json.loads(path.read_text())
        path.write_text(json.dumps([{k: v for k, v in row.items() if k != "indices"} for row in rows]))

    run_bon_ensembles.main(["study", "--sample-ns", "1,2,8,40", "--seeds", "1,2,3"])

    for name, rows in before.items():
        # The duplicate's two gold scores may change places, which no proxy can tell apart.
        assert [row["proxy_score"] for row in results(folder / name)] == pytest.approx(
            [row["proxy_score"] for row in rows]
        )
        assert [row["gold_score"] for row in results(folder / name)] == pytest.approx(
            [row["gold_score"] for row in rows]
        )


def test_ensembles_of_other_seeds_stand_beside(study: Study) -> None:
    folder = study.run()
    before = results(folder / "ensemble_mean")

    run_bon_ensembles.main(["study", "--sample-ns", "1,2,8,40", "--seeds", "1,3", "--variance", "sample"])

    assert results(folder / "ensemble_mean") == before
    assert results(folder / "ensemble_mean_seeds1-3_sample") != before
    assert (folder / "ensemble_UWO-0.5_seeds1-3_sample").is_dir()


def test_lambda_of_a_variance_over_n_less_one_is_another_number() -> None:
    scores = np.array([[1.0, 2.0], [3.0, 2.0], [8.0, 5.0]])

    value, spread = objective_of(scores, "UWO", 0.1, "sample")

    assert spread == pytest.approx([13.0, 3.0])
    assert value == pytest.approx([4 - 1.3, 3 - 0.3])
    assert objective_of(scores, "UWO", 0.1)[0] == pytest.approx([4 - 0.1 * 26 / 3, 3 - 0.2])
    with pytest.raises(ConfigError, match="one member"):
        objective_of(scores[:1], "mean", variance="sample")


def test_n_above_the_answers_is_refused_and_the_default_leaves_it_out(study: Study) -> None:
    with pytest.raises(DataError, match="best of 64 cannot be told from 40 samples"):
        study.run("--sample-ns", "1,64")
    assert study.asked() == [], "before anything is scored"
    assert choices(None, 40) == [1, 2, 4, 8, 16, 32]
    assert choices(None, 12600) == [*DEFAULT_NS]


def test_several_seeds_need_a_place_in_the_path(study: Study) -> None:
    with pytest.raises(ConfigError, match=r"put \{seed\} into it"):
        run_bon_pipeline.main(["models/rm", "--gold-labelled-generations", "answers.jsonl", "--seeds", "1,2"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"answers": ["a"]}, "has 1 answers and 40 gold_scores"),
        ({"instruction": None}, "needs `instruction`, `answers` and `gold_scores`"),
    ],
)
def test_rows_without_what_it_takes_are_refused(study: Study, change: dict[str, Any], sentence: str) -> None:
    study.write([{**study.rows[0], **change}])

    with pytest.raises(DataError, match=sentence):
        study.run()


def test_ensembles_of_seeds_that_were_never_scored_are_refused(study: Study) -> None:
    with pytest.raises(ConfigError, match="holds no scored seeds"):
        run_bon_ensembles.main(["study"])
    folder = study.run("--no-ensembles")
    with pytest.raises(DataError, match=r"run run_bon_pipeline\.py for this seed first"):
        run_bon_ensembles.main(["study", "--seeds", "1,4"])
    rows = json.loads((folder / "seed2" / "proxy_labelled_sorted.json").read_text())
    rows[0]["answers"][0] = "never"
    (folder / "seed2" / "proxy_labelled_sorted.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match="scored on other answers"):
        run_bon_ensembles.main(["study", "--seeds", "1,2"])


def test_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "proxy_labelled_sorted.json"
    path.write_text('[{"instruction": "a", "answers": ["b"], "gold_scores": [1.0]}]')

    with pytest.raises(DataError, match=r"entry 0 of .*proxy_scores"):
        read_sorted(path)
