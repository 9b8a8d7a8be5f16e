#!/usr/bin/env bash
# Of the choices 1 and 1.0 Optuna runs the one and records the other, so `best_params` is not what was best.
#
# Seen with optuna 5.0.0 (Python 3.11).
# Guess: choices are told apart by their place in the list, since Optuna stores numbers of choices; equal ones are
#   either refused or folded into one before a trial runs. Whatever the objective got is what `trial.params` says.
# Seen: a sampler draws a place, and the objective gets that choice, with its type. The record is made by looking the
#   choice up again with `==`, so `1.0`, and `True`, become the `1` that stands first, and `False` becomes `0`. Of
#   20 trials at random 7 ran with 1.0 and have 1 in `study.trials`; the best value is one of 1.0, and `best_params`
#   says 1. Where types have meanings (a share or a count, off or zero), running `best_params` again gives another
#   result. So it is with TPE, too, and a grid has one of its cells twice in its record. There is no warning.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet optuna==5.0.0
"$folder/venv/bin/python" - <<'PY'
import warnings

import optuna

warnings.simplefilter("error")
optuna.logging.set_verbosity(optuna.logging.ERROR)


def run(sampler, choices, trials=20, first=None):
    """A study that is best with a share, and what its objective was called with."""
    ran = []

    def objective(trial):
        ran.append(trial.suggest_categorical("features", choices))
        return {str: 0.0, int: 1.0, bool: 1.5, float: 2.0}[type(ran[-1])]

    study = optuna.create_study(sampler=sampler, direction="maximize")
    if first is not None:
        study.enqueue_trial(first)
    study.optimize(objective, n_trials=trials)
    return study, ran


CHOICES = ["sqrt", 1, 1.0]
for sampler in (optuna.samplers.RandomSampler(seed=0), optuna.samplers.TPESampler(seed=0)):
    study, ran = run(sampler, CHOICES)
    recorded = [trial.params["features"] for trial in study.trials]
    print(f"{type(sampler).__name__}\n  ran      {ran}\n  recorded {recorded}")
    print(f"  best value {study.best_value}, best_params {study.best_params}")
    assert 2.0 == study.best_value and any(type(value) is float for value in ran)
    assert recorded == ran and not any(type(value) is float for value in recorded)
    assert type(study.best_params["features"]) is int
    again, ran = run(optuna.samplers.RandomSampler(seed=0), CHOICES, trials=1, first=study.best_params)
    print(f"  best_params again: ran {ran}, value {again.best_value}")
    assert again.best_value == 1.0

study, ran = run(optuna.samplers.RandomSampler(seed=0), [1, True, 0, False])
recorded = [trial.params["features"] for trial in study.trials]
print(f"of [1, True, 0, False]\n  ran      {ran}\n  recorded {recorded}")
assert bool in map(type, ran) and set(map(type, recorded)) == {int}
grid, ran = run(optuna.samplers.GridSampler({"features": CHOICES}), CHOICES, trials=None)
recorded = [trial.params["features"] for trial in grid.trials]
print(f"grid\n  ran      {ran}\n  recorded {recorded}")
assert sorted(map(repr, ran)) == ["'sqrt'", "1", "1.0"] and sorted(map(repr, recorded)) == ["'sqrt'", "1", "1"]
print("as stated")
PY
