"""What an ensemble's files say of its members, and the second writing of its formula."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from conch.converters.backends.ensemble import member_labels
from conch.converters.options import EnsembleOptions
from conch.converters.parity.ensemble import ensemble_reference
from conch.converters.triton_models.ensemble_model import combine
from conch.store.manifest import EnsembleMember, GoldenSample
from conch.store.store import read_model, read_with_members
from tests.stores import store_ensemble, store_model


def member(name: str, reward: str) -> EnsembleMember:
    return EnsembleMember(name=name, reward=reward, column=0, columns=2, version=1, content_sha256="a1")


def test_two_rewards_of_one_model_are_members_of_names_of_their_own() -> None:
    members = [member("a", "true"), member("b", "reward"), member("a", "kind")]
    assert member_labels(members) == ("a:true", "b", "a:kind")


def test_an_ensemble_asks_the_models_of_its_manifest_whatever_its_members_are_called(tmp_path: Path) -> None:
    for name in ("one", "two"):
        store_model(tmp_path, name)
    store_ensemble(tmp_path, "both", ["one", "two"])
    for config in (tmp_path / "both").rglob("*.pbtxt"):
        config.write_text(config.read_text().replace('"one,two"', '"one:x,two"'))
    model = read_model(tmp_path, "both")
    assert (model.spec.members, model.submodels) == (("one:x", "two"), ("one", "two"))
    assert [each.name for each in read_with_members(tmp_path, ["both"])] == ["one", "two", "both"]


@pytest.mark.parametrize("variance", ["population", "sample"])
@pytest.mark.parametrize("objective", ["mean", "wco", "uwo"])
def test_the_reference_is_the_servers_formula_with_all_members_and_without_each(objective, variance) -> None:
    scores = np.random.default_rng(3).normal(size=(5, 3)) * 4
    samples = [GoldenSample(text=str(row), scores=(0.0,)) for row in range(5)]
    options = EnsembleOptions(name="e", objective=objective, uwo_weight=0.7, variance=variance)
    made = ensemble_reference(samples, [[(score, 1e-5) for score in row] for row in scores.tolist()], options)

    assert [case.name for case in made.cases] == ["all members", *(f"without member {n}" for n in (1, 2, 3))]
    for case in made.cases:
        rewards, _, _ = combine(np.array(case.scores, dtype=float), objective, 0.7, variance)
        assert case.expected == pytest.approx(rewards.tolist(), rel=1e-12)


@pytest.mark.parametrize("variance", ["population", "sample"])
def test_the_tolerance_of_golden_samples_covers_the_members_errors(variance) -> None:
    generator = np.random.default_rng(5)
    scores = generator.normal(size=(40, 3)) * 4
    samples = [GoldenSample(text=str(row), scores=(0.0,)) for row in range(40)]
    options = EnsembleOptions(name="e", objective="uwo", uwo_weight=2.0, variance=variance)
    error = 1e-4
    made = ensemble_reference(
        samples, [[(score, error) for score in row] for row in scores.tolist()], options
    )
    exact, _, _ = combine(scores, "uwo", 2.0, variance)
    worst = 0.0
    for signs in np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, -1).T:
        off, _, _ = combine(scores + error * signs, "uwo", 2.0, variance)
        worst = max(worst, float((np.abs(off - exact) / np.maximum(1, np.abs(exact))).max()))
    assert worst <= made.golden.tolerance * 1.001
    assert math.isclose(worst, made.golden.tolerance, rel_tol=0.6)  # and no wide guess
