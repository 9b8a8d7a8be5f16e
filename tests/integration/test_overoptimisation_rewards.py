"""Reward models of several seeds by one command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conch.config import load
from conch.errors import ConfigError
from conch.store.store import list_models, read_model
from examples.overoptimisation.entries import CONFIGS
from examples.overoptimisation.train_rewards import RewardsConfig, main, run_of
from tests.integration.overoptimisation_models import reward_model

ROWS = [
    {"prompt": f"Q{number}: ", "chosen": "yes" * (number % 3 + 1), "rejected": "no" * (number % 4 + 1)}
    for number in range(24)
]


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Settings of a tiny study, whose user works in this folder."""
    monkeypatch.chdir(tmp_path)
    reward_model(tmp_path / "base", 0)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return [
        *("data.train=rows.jsonl", "model.path=base", "tokenizer.pad_token=null", "name=rm", "seeds=[3,5]"),
        *("epochs=1", "reward_model.batch_size=8", "reward_model.max_length=32", "train.eval_every=1"),
    ]


def weights(folder: str) -> bytes:
    return max(Path(folder).glob("checkpoints/step_*/model.safetensors")).read_bytes()


@pytest.mark.slow
def test_members_differ_by_their_seed_and_what_is_done_stays(words: list[str], capsys: Any) -> None:
    main([*words, "ensemble=UWO", "uwo_weight=0.5"])
    assert sorted(path.name for path in Path("models").iterdir()) == ["rm_seed3", "rm_seed5"]
    assert weights("models/rm_seed3") != weights("models/rm_seed5")
    names = list_models(Path("model_store"))
    assert sorted(name.rpartition("-")[0] for name in names) == ["ensemble-uwo", "rm_seed3", "rm_seed5"]
    (joined,) = (name for name in names if name.startswith("ensemble"))
    assert (
        len(read_model(Path("model_store"), joined).spec.members) == 2 and joined in capsys.readouterr().out
    )
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*.safetensors")}
    main([*words, "ensemble=UWO", "uwo_weight=0.5"])
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*.safetensors")} == before
    assert list_models(Path("model_store")) == names
    main([*words, "ensemble=UWO", "uwo_weight=0.5", "variance=sample"])
    (other,) = set(list_models(Path("model_store"))) - set(names)
    variances = [read_model(Path("model_store"), name).spec.variance for name in (joined, other)]
    assert variances == ["population", "sample"]
    names = list_models(Path("model_store"))
    main([*words, "seeds=[3,5,7]", "convert=false"])
    assert Path("models/rm_seed7").is_dir() and list_models(Path("model_store")) == names


def test_epochs_become_steps_over_the_rows_that_are_learned_from() -> None:
    config = load(RewardsConfig, {"model": {"path": "a"}, "epochs": 5, "seeds": [2]})
    run = run_of(config, 2, 1000, has_eval=True)
    assert run.train.total_steps == 79 and run.reward_model.rng_seed == 2  # 5,000 rows, 64 at once
    assert str(run.train.run_dir) == "models/rm_seed2" and run.train.resume == "auto"
    assert run_of(config, 2, 1000, has_eval=False).train.total_steps == 75


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"reward_model": {"rng_seed": 1}}, "come from `seeds`"),
        ({"train": {"run_dir": "x"}}, "come from `seeds`"),
        ({"seeds": [1, 1]}, "has one twice"),
        ({"seeds": [1], "ensemble": "mean"}, "at least two seeds"),
        ({"convert": False, "ensemble": "mean"}, "at least two seeds"),
    ],
)
def test_mistakes_are_told_in_a_sentence(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load(RewardsConfig, {"model": {"path": "a"}, **values})


def test_the_papers_settings_are_valid(capsys: Any) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--print-config", "data.train=rows.jsonl"])
    assert left.value.code == 0 and "rm-pythia-44m" in capsys.readouterr().out and CONFIGS.is_dir()
