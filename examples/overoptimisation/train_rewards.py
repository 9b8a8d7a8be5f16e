"""Reward models that differ in their seeds alone, for an ensemble: from this folder,

    python train_rewards.py data.train=preferences.jsonl seeds=[1,2,3,4,5]
    python train_rewards.py data.train=preferences.jsonl ensemble=UWO uwo_weight=0.5 num_processes=4

trains `models/rm-pythia-44m_seed1`, `..._seed2`, ..., and converts them into the model store, where
`trainer_rl.py` finds them. What is trained already is left alone, and an interrupted one goes on.
`configs/config_rm.yaml` has the settings, which are those of `conch train reward_model` and a few beside.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `examples` is not installed

from pydantic import Field, model_validator

from conch.cli import load_run_config, run_main, save_resolved
from conch.config import EnsembleVariance, load
from conch.config.algorithms.reward_model import RewardModelRunConfig
from conch.data.files import evaluation_rows, training_rows
from conch.log import get_logger
from conch.runs.reading import steps_of
from examples.hosting import last_gpu
from examples.overoptimisation.entries import CONFIGS
from examples.overoptimisation.served import Serving, in_store, joined
from examples.overoptimisation.settings import Objective, Precision, RankSettings

_log = get_logger("conch.overoptimisation")


class RewardsConfig(RewardModelRunConfig):
    """Runs of `conch train reward_model` that differ in `reward_model.rng_seed` alone."""

    seeds: tuple[int, ...] = Field(default=(1, 2, 3, 4, 5), min_length=1)
    """A reward model for each: it seeds the head and the order of the data. Rows that are held out are the
    same."""

    name: str = "rm"
    """Beginning of a model's name; `_seed1` comes behind."""

    output_dir: Path = Path("models")
    """Folder of the models."""

    epochs: float | None = Field(default=None, gt=0)
    """Passes over the rows, in place of `train.total_steps`."""

    num_processes: int = Field(default=1, ge=1)
    """Processes that train a model; several are started by `accelerate launch`."""

    accelerate_config: Path = CONFIGS / "accelerate_config.yaml"
    """File of `accelerate launch`, for several."""

    convert: bool = True
    """Convert the models for Triton."""

    model_store: Path = Path("model_store")
    """Folder of converted models."""

    dtype: Precision | None = None
    """Precision of converted models; None takes float16 on a GPU, float32 on a CPU."""

    ensemble: Objective | None = None
    """Join them in the store as well, into one model with this objective."""

    uwo_weight: float = Field(default=0.1, ge=0)
    """With `ensemble=UWO`: cost of a variance of 1."""

    variance: EnsembleVariance = "population"
    """What this variance of k members divides by: `population` k, `sample` k - 1."""

    @model_validator(mode="after")
    def _seeds_name_the_runs(self) -> RewardsConfig:
        if self.reward_model.rng_seed is not None or self.train.run_dir is not None:
            raise ValueError(
                "`reward_model.rng_seed` and `train.run_dir` come from `seeds`, `output_dir` and `name`: "
                "leave them out"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(
                f"`seeds` = {list(self.seeds)} has one twice: it would train one model two times"
            )
        if self.ensemble is not None and (len(self.seeds) < 2 or not self.convert):
            raise ValueError(
                "`ensemble` joins converted models of at least two seeds: set `seeds` and `convert`"
            )
        return self


OWN = frozenset(RewardsConfig.model_fields) - frozenset(RewardModelRunConfig.model_fields)


def train(config: RewardsConfig) -> list[Path]:
    """Train what is not trained yet, and convert. Returns the models' folders.

    Raises:
        ConchError: as the trainer and the converter do.
    """
    # They load torch, which help and mistyped keys do without.
    from conch.data.preferences import judgement
    from conch.trainers.reward_model import RewardModelTrainer

    rows = training_rows(config.data, "rows", form=judgement)
    held = evaluation_rows(config.data, form=judgement)
    runs = [run_of(config, seed, len(rows), has_eval=held is not None) for seed in config.seeds]
    folders = [Path(str(run.train.run_dir)) for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        if max(steps_of(folder), default=0) >= run.train.total_steps:
            _log.info("%s is trained already", folder)
        elif config.num_processes > 1:
            _launch(config, run, folder)
        else:
            with closing(RewardModelTrainer(run, samples=rows, eval_samples=held)) as trainer:
                trainer.fit()
    if config.convert:
        _convert(config, folders)
    return folders


def run_of(config: RewardsConfig, seed: int, num_rows: int, *, has_eval: bool) -> RewardModelRunConfig:
    """The run of one seed.

    num_rows: rows there are; without evaluation rows, some of them are held out.
    """
    values: dict[str, Any] = {
        name: value for name, value in config.model_dump(exclude_unset=True).items() if name not in OWN
    }
    folder = config.output_dir / f"{config.name}_seed{seed}"
    values["reward_model"] = {**values.get("reward_model", {}), "rng_seed": seed}
    values["train"] = {**values.get("train", {}), "run_dir": str(folder), "resume": "auto"}
    if config.epochs is not None:
        kept = 1.0 if has_eval else 1 - config.reward_model.eval_fraction
        steps = math.ceil(config.epochs * num_rows * kept / config.reward_model.batch_size)
        values["train"]["total_steps"] = max(1, steps)
    return load(RewardModelRunConfig, values)


def _launch(config: RewardsConfig, run: RewardModelRunConfig, folder: Path) -> None:
    """Train in several processes.

    Raises:
        SystemExit: with the launcher's code, where that is not 0.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_resolved(run, folder / "launched.yaml")
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(config.accelerate_config),
    ]
    launch += ["--num_processes", str(config.num_processes), "--main_process_port", "0"]
    program = ["-m", "conch.trainers.reward_model", "--config-dir", str(folder), "--config-name", "launched"]
    code = subprocess.run([*launch, *program], check=False).returncode
    if code:
        raise SystemExit(code)


def _convert(config: RewardsConfig, folders: Sequence[Path]) -> None:
    serving = Serving(config.model_store, None, config.dtype)
    models = [in_store(str(folder), serving, last_gpu()) for folder in folders]
    for folder, model in zip(folders, models, strict=True):
        print(f"{folder}: {model} in {config.model_store}")
    if config.ensemble is not None:
        rank = {
            "model_names": models,
            "objective_name": config.ensemble,
            "uwo_weight": config.uwo_weight,
            "variance": config.variance,
        }
        print(
            f"ensemble: {joined(models, load(RankSettings, rank), config.model_store)} in "
            f"{config.model_store}"
        )


def main(argv: Sequence[str]) -> None:
    """Command line: `key=value` overrides of `configs/config_rm.yaml`."""
    train(load_run_config(RewardsConfig, argv, default_name="config_rm", config_dir=CONFIGS))


if __name__ == "__main__":
    run_main(main)
