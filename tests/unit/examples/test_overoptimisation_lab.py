"""The laboratory's world and its arithmetic."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from conch.evaluation.curves import curve_of
from conch.evaluation.records import EvaluatedSample, EvaluationRecord, record_path, write_record
from conch.rewards.combined import EnsembleReward
from conch.rewards.function import FunctionReward
from conch.types import Completion, Prompt, Rollout
from examples.overoptimisation import laboratory
from examples.overoptimisation.laboratory.hidden_preference import (
    LETTERS,
    ZIPF,
    demonstrations,
    gold,
    labelled_pairs,
    letter_frequencies,
    letter_tokenizer,
    letters_by_liking,
    random_texts,
)
from examples.overoptimisation.laboratory.results import (
    Seconds,
    ensemble_reward,
    measure_best_of_n,
    outcome,
    report,
    table,
)

RNG_SEED = 5
CURVES = Path(laboratory.__file__).parent / "curves"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return random_texts(4000, np.random.default_rng(RNG_SEED))


def test_gold_is_one_function_of_the_text_alone(texts: list[str]) -> None:
    mixed = [*texts[:50], "", "abc", "z"]
    together = gold(mixed)
    assert together == pytest.approx([gold([text])[0] for text in mixed], abs=1e-5)
    assert together[50] == 0.0
    assert len({round(score, 4) for score in together}) > 45
    # The weights are a part of the experiment: other ones are another world.
    assert gold(["abcdefghij"])[0] == pytest.approx(-0.49573, abs=1e-4)


def test_the_language_is_of_letters_that_gold_likes(texts: list[str]) -> None:
    frequencies = letter_frequencies()
    assert "".join(frequencies) == letters_by_liking()
    assert sorted(frequencies) == sorted(LETTERS)
    shares = list(frequencies.values())
    assert sum(shares) == pytest.approx(1) and shares[0] == pytest.approx(60**ZIPF * shares[59])
    letters = "".join(texts)
    for place in (0, 1, 9):
        share = letters.count(list(frequencies)[place]) / len(letters)
        assert share == pytest.approx(shares[place], rel=0.15)
    rng = np.random.default_rng(RNG_SEED)
    any_letters = ["".join(row) for row in rng.choice(list(LETTERS), size=(2000, 10))]
    spread = np.std(gold(texts))
    assert np.mean(gold(texts)) - np.mean(gold(any_letters)) > spread
    shown = demonstrations(500, rng)
    assert np.mean(gold(shown)) - np.mean(gold(texts)) > spread / 2


def test_a_quarter_of_the_labels_is_wrong(texts: list[str]) -> None:
    rows = labelled_pairs(texts, 0.25, np.random.default_rng(0))
    assert len(rows) == 2000
    assert {*rows[0].values()} == {*texts[:2]}
    ahead = np.array(gold([row["chosen"] for row in rows])) - np.array(
        gold([row["rejected"] for row in rows])
    )
    assert np.mean(ahead < 0) == pytest.approx(0.25, abs=0.03)
    sure = labelled_pairs(texts[:100], 0.0, np.random.default_rng(0))
    assert all(gold([row["chosen"]]) >= gold([row["rejected"]]) for row in sure)


def test_letters_survive_the_tokenizer() -> None:
    tokenizer = letter_tokenizer()
    ids = tokenizer(LETTERS).input_ids
    assert len(ids) == len(LETTERS) and tokenizer.decode(ids) == LETTERS
    assert len(tokenizer) == len(LETTERS) + 3


@pytest.mark.parametrize("arm", ["mean", "wco", "uwo"])
def test_best_of_n_chooses_by_what_ppo_is_trained_on(arm: str) -> None:
    rng = np.random.default_rng(1)
    members = rng.normal(size=(5, 1, 6))
    rollouts = [
        Rollout(Prompt("a", (3,), {}), Completion(str(k), (4,), (0.0,), "length"), policy_version=0)
        for k in range(6)
    ]
    sources = {
        f"m{k}": FunctionReward(lambda samples, row=row, **_: [float(row[int(each[1:])]) for each in samples])
        for k, row in enumerate(members[:, 0])
    }
    ensemble = EnsembleReward(sources, arm, uwo_weight=2.0)  # pyright: ignore[reportArgumentType]
    try:
        expected = [next(iter(each.scores.values())) for each in ensemble.submit(rollouts).result()]
    finally:
        ensemble.close()
    assert ensemble_reward(arm, members, 2.0)[0] == pytest.approx(expected)
    assert (ensemble_reward("single_3", members, 2.0) == members[3]).all()


def test_best_of_n_is_normalised_and_starts_at_the_starting_policy(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    gold_scores = rng.normal(loc=7, scale=3, size=(2, 8))
    np.savez(tmp_path / "scores.npz", members=gold_scores[None].repeat(2, axis=0), gold=gold_scores)
    found = measure_best_of_n(tmp_path / "scores.npz", "mean", 1.0, tmp_path / "best")
    normalised = (gold_scores - gold_scores.mean()) / gold_scores.std(ddof=1)
    assert list(found) == [1, 2, 4, 8]
    assert found[1] == pytest.approx(0.0, abs=1e-9)
    assert found[8] == pytest.approx(normalised.max(axis=1).mean())
    assert curve_of(tmp_path / "best").variance == pytest.approx(np.zeros(4))


def keep_evaluations(folder: Path, means: dict[int, float]) -> Path:
    """A run's evaluations: step -> mean gold of four samples."""
    for step, mean in means.items():
        samples = tuple(
            EvaluatedSample(0, "a", "b", 1, {"reward": float(-score), "gold": float(score)})
            for score in mean + np.array([-2.0, 2.0, -2.0, 2.0])
        )
        write_record(
            record_path(folder, step), EvaluationRecord(step, samples, metrics={"eval/kl": step / 10 + 1})
        )
    return folder


def test_each_run_loses_of_the_gain_at_its_own_peak(tmp_path: Path) -> None:
    early = keep_evaluations(tmp_path / "early", {0: 10.0, 10: 14.0, 20: 13.0, 30: 11.0})
    late = keep_evaluations(tmp_path / "late", {0: 10.0, 10: 9.0, 20: 10.0, 30: 16.0})
    found = outcome([early, late])
    spread = np.std([-2.0, 2.0, -2.0, 2.0], ddof=1)
    assert found.peak == pytest.approx(5 / spread) and found.peak_step == 20
    assert (found.final, found.sqrt_kl) == (pytest.approx(3.5 / spread), 2.0)
    assert found.loss == pytest.approx(3 / 10)
    assert found.standard_error == pytest.approx(0.5 / np.sqrt(2))


def test_csv_files_tell_seeds_and_members_apart(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    folders = {seed: tmp_path / f"seed_{seed}" for seed in (4, 7)}
    rewards = {"single": ["single_0", "single_1"], "mean": ["mean"]}
    names = [name for names in rewards.values() for name in names]
    for folder in folders.values():
        for name in names:
            keep_evaluations(folder / f"ppo_{name}", {0: 10.0, 10: 14.0, 20: 13.0})
        np.savez(folder / "best_of_n.npz", members=rng.normal(size=(2, 2, 8)), gold=rng.normal(size=(2, 8)))
    report(folders, rewards, 2.0, tmp_path, Seconds())
    for kind in ("ppo", "best_of_n"):
        with (tmp_path / f"{kind}.csv").open(encoding="utf-8") as file:
            labels = [*dict.fromkeys(row["seed"] for row in csv.DictReader(file))]
        assert sorted(labels) == sorted(f"seed_{seed}/{kind}_{name}" for seed in folders for name in names)


@pytest.mark.parametrize("kind", ["ppo", "best_of_n"])
def test_csv_files_of_the_shown_figures_have_five_seeds_of_each_reward(kind: str) -> None:
    with (CURVES / f"{kind}.csv").open(encoding="utf-8") as file:
        labels = {row["seed"] for row in csv.DictReader(file)}
    names = [*(f"single_{number}" for number in range(5)), "mean", "wco", "uwo"]
    assert labels == {f"seed_{seed}/{kind}_{name}" for seed in range(5) for name in names}


def test_losses_that_the_page_tells_are_those_of_the_shown_curves() -> None:
    gains: dict[str, dict[str, list[float]]] = {}
    with (CURVES / "ppo.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            gains.setdefault(row["group"], {}).setdefault(row["seed"], []).append(float(row["gold_gain"]))

    def lost(group: str, seeds: str) -> float:
        runs = [curve for label, curve in gains[group].items() if label[len("seed_")] in seeds]
        return 1 - sum(curve[-1] for curve in runs) / sum(max(curve) for curve in runs)

    page = " ".join((CURVES.parents[3] / "docs/overoptimisation.md").read_text(encoding="utf-8").split())
    first, third = lost("uwo", "012"), lost("single", "012") / 3
    told = f"on seeds 0 to 2 alone UWO loses {first:.1%}, and a third of what single members lose "
    assert f"{told}({3 * third:.1%}) is {third:.1%}".replace("%", " %") in page
    for group, share in (("single", "**32 %**"), ("mean", "15 %"), ("wco", "**2 %**"), ("uwo", "**7 %**")):
        assert f"{lost(group, '01234'):.0%}".replace("%", " %") == share.strip("*") and share in page
    middle = [sum(column) / 25 for column in zip(*gains["single"].values(), strict=True)]
    assert max(middle) - middle[-1] < 0.02, "the mean curve is flat, as the page says"


def test_seconds_of_a_call_are_added_to_those_of_the_calls_before(tmp_path: Path) -> None:
    first = Seconds.read(tmp_path)
    first.add(3, "start", 2.0)
    first.keep(tmp_path, 5.0)
    first.add(3, "ppo_mean", 4.0)
    first.keep(tmp_path, 9.0)
    second = Seconds.read(tmp_path)
    assert (second.calls, second.parts) == (9.0, {3: {"start": 2.0, "ppo_mean": 4.0}})
    second.add(3, "ppo_mean", 1.5)
    second.add(4, "start", 3.0)
    second.keep(tmp_path, 6.0)
    assert second.total == 15.0
    third = Seconds.read(tmp_path)
    assert (third.total, third.parts) == (15.0, {3: {"start": 2.0, "ppo_mean": 5.5}, 4: {"start": 3.0}})


def test_nothing_gained_is_nothing_lost(tmp_path: Path) -> None:
    found = outcome([keep_evaluations(tmp_path, {0: 10.0, 10: 9.0})])
    assert found.loss is None and found.peak == 0.0
    assert " -" in table({0: {"single": found}}, {0: {"single": {1: 0.0}}})
