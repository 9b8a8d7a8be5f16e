"""The laboratory of overoptimisation: its chain and how it goes on, and, slowly, what it shows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from conch.evaluation.records import GOLD, read_record, records_of
from examples.overoptimisation.laboratory.chain import run
from examples.overoptimisation.laboratory.parts import places
from examples.overoptimisation.laboratory.settings import LaboratoryConfig

SMALL = {
    **{"num_demonstrations": 128, "num_pairs": 64, "num_members": 2, "best_of": 16},
    **{"num_single": 1, "num_start_texts": 200, "ppo_steps": 2, "eval_repeats": 4, "workers": 1},
}


@pytest.mark.slow
def test_a_chain_has_all_its_parts_and_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    config = LaboratoryConfig(seed=(3,), output=tmp_path, **SMALL)
    summary = run(config)
    at = places(config, 3)
    pairs = [at.pairs(member).read_text() for member in range(2)]
    assert [len(each.splitlines()) for each in pairs] == [64, 64] and pairs[0] != pairs[1]
    for name in ("single_0", "mean", "wco", "uwo"):
        first, *_, last = [read_record(path) for path in records_of(at.policy(name))]
        assert (first.step, last.step) == (0, 2) and len(last.samples) == 8 * 4
        assert all(sample.scores[GOLD] is not None for sample in last.samples)
        assert bool(last.samples[0].members) == (name != "single_0")
    assert list(summary["best_of_n"][3]["wco"]) == [1, 2, 4, 8, 16]
    assert json.loads((tmp_path / "summary.json").read_text())["ppo"]["3"] == summary["ppo"][3]

    kept = (at.policy("mean") / "metrics.jsonl").stat().st_mtime_ns
    shutil.rmtree(at.policy("uwo") / "checkpoints")
    at.best_of_n.unlink()
    again = run(config)
    assert again["seconds"] > summary["seconds"]
    took, before = again["part_seconds"][3], summary["part_seconds"][3]
    assert took.keys() == before.keys() and all(took[name] >= before[name] for name in took)
    assert took["ppo_uwo"] > before["ppo_uwo"], "what was lost was done again"
    assert again["ppo"] == summary["ppo"] and again["best_of_n"] == summary["best_of_n"]
    assert (at.policy("mean") / "metrics.jsonl").stat().st_mtime_ns == kept


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(LaboratoryConfig(output=tmp_path_factory.mktemp("laboratory")))


@pytest.mark.slow
def test_a_single_model_is_overoptimised_and_ensembles_are_much_less(summary: dict[str, Any]) -> None:
    arms = summary["all_seeds"]["ppo"]
    single = arms["single"]
    assert single["peak"] > 0.3 and single["loss"] >= 0.15
    assert single["peak"] - single["final"] > 4 * single["standard_error"]
    for arm in ("wco", "uwo"):
        assert arms[arm]["loss"] <= single["loss"] / 3
        assert arms[arm]["final"] - single["final"] > 4 * single["standard_error"]


@pytest.mark.slow
def test_the_best_of_many_by_a_single_model_is_worth_least(summary: dict[str, Any]) -> None:
    gold = summary["all_seeds"]["best_of_n"]
    for n in (256, 1024, 4096):
        assert min(gold, key=lambda arm: gold[arm][n]) == "single"
    assert gold["single"][4096] < gold["single"][1024]
