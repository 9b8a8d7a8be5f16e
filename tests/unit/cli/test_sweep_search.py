from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence

import pytest

from conch.cli.sweeps.grammar import read_axes
from conch.cli.sweeps.search import Trial, check_installed, draw, number_of_trials
from conch.cli.sweeps.settings import SweepConfig
from conch.errors import ConfigError, install_extra

WORDS = [
    "lr=tag(log,interval(1e-5,1e-1))",
    "fixed=7",
    "layers=int(interval(1,4))",
    "width=range(0,1,0.1)",
    "form=flat,'a,b'",
]
AXES = read_axes(WORDS, [], seed=0)


def height(words: Sequence[str]) -> float:
    """Best at lr 1e-3, two layers and the form `flat`."""
    values = {word.partition("=")[0]: word.partition("=")[2] for word in words}
    distance = abs(math.log10(float(values["lr"])) + 3) + abs(int(values["layers"]) - 2)
    return -distance - (values["form"] != "flat")


def search(count: int, **settings: object) -> list[Trial]:
    config = SweepConfig.model_validate({"trials": count, **settings})
    trials: list[Trial] = []
    for number in range(count):
        words = draw(AXES, config, "maximize", number, trials, [trial.overrides for trial in trials])
        trials.append(Trial(words, height(words), "done", {1: height(words)}))
    return trials


def test_values_lie_where_the_words_say_and_differ() -> None:
    trials = search(12)
    for place in (0, 2, 3, 4):
        assert len({trial.overrides[place] for trial in trials}) > 1
    for trial in trials:
        values = dict(word.split("=", 1) for word in trial.overrides)
        assert list(values) == ["lr", "fixed", "layers", "width", "form"]
        assert 1e-5 <= float(values["lr"]) <= 1e-1 and values["layers"] in "1234" and values["fixed"] == "7"
        assert f"width={values['width']}" in AXES[3].words and values["form"] in ("flat", "'a,b'")


def test_a_trial_depends_on_seed_number_and_history_alone() -> None:
    calm = search(14)
    assert search(14) == calm
    config = SweepConfig(trials=14)
    for number in (3, 12):
        known = [trial.overrides for trial in calm[:number]]
        again = draw(AXES, config, "maximize", number, calm[:number], known)
        assert again == calm[number].overrides
    assert search(3, seed=1) != calm[:3]
    assert len({draw(AXES, config, "maximize", number, calm[:2], []) for number in (2, 3, 4)}) == 3


def test_states_of_earlier_trials_are_told_to_the_sampler() -> None:
    calm = search(12)
    others = [trial.overrides for trial in calm]
    config = SweepConfig(trials=20)
    drawn = set()
    for state in ("done", "pruned", "failed", "running"):
        value = calm[0].value if state == "done" else None
        history = [Trial(trial.overrides, value, state, trial.curve) for trial in calm]
        drawn.add(draw(AXES, config, "maximize", 12, history, others))
    assert len(drawn) > 1


def test_a_search_finds_more_than_chance() -> None:
    found = [max(trial.value or -9.0 for trial in search(40, seed=seed)[20:]) for seed in range(3)]
    chance = [max(t.value or -9.0 for t in search(40, seed=seed, sampler="random")[20:]) for seed in range(3)]
    assert sum(found) > sum(chance)


def test_choices_are_not_tried_twice_and_end() -> None:
    axes = read_axes(["a=1,2", "b=range(0,3)"], [], seed=0)
    config = SweepConfig(trials=100)
    assert number_of_trials(axes, config) == 6
    assert number_of_trials(AXES, config) == 100
    words: list[tuple[str, ...]] = []
    for number in range(6):
        history = [Trial(one, 1.0, "done") for one in words]
        words.append(draw(axes, config, "maximize", number, history, words))
    assert len(set(words)) == 6


def test_search_without_optuna_says_how_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed()
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=re.escape(install_extra("search"))):
        check_installed()
