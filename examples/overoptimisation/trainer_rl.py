"""PPO of a policy against one reward model or an ensemble, then gold scores of its evaluations: from this
folder,

    accelerate launch --config_file configs/accelerate_config.yaml trainer_rl.py \\
        --configs defaults defaults_rlhf pythia_rlhf_individual --rm_seed 1
    python trainer_rl.py --configs defaults defaults_rlhf pythia_rlhf_ensemble output_dir=runs/uwo \\
        rank_config.objective_name=UWO rank_config.uwo_weight=0.5

Entries stand in `configs/config_rl.yaml`, PPO's settings in `configs/config_ppo.yaml`; README.md explains
them. The same command goes on with a run that was interrupted, and scores what has no gold score yet.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `examples` is not installed

from conch.cli import run_main
from conch.config.algorithms.ppo import PPORunConfig
from conch.distributed.launcher import launched_processes
from conch.evaluation.gold import summary
from conch.log import get_logger, is_main_process
from conch.runs.reading import steps_of
from examples.overoptimisation.entries import read_settings
from examples.overoptimisation.gold import gold_scores, write_eval_files
from examples.overoptimisation.layout import EVAL, MODEL, run_folder, write_names
from examples.overoptimisation.prompts import names_of, read_prompts
from examples.overoptimisation.served import served_rewards
from examples.overoptimisation.settings import StudyConfig
from examples.overoptimisation.translation import run_config

_log = get_logger("conch.overoptimisation")


def run(config: StudyConfig) -> Path:
    """Train, unless that is done, and score the evaluations. Returns the run's folder.

    Raises:
        ConchError: as the trainer does; before anything is loaded, for what can be known by then.
        SystemExit, KeyboardInterrupt: see `conch.training.loop.fit`; no gold is asked for then.
    """
    folder = run_folder(config)
    names = names_of(config.reward_models)
    # What is wrong with the settings is told before a model is converted.
    planned = _run_config(config, folder, {"url": "127.0.0.1:1/any"})
    if _is_trained(folder, planned):
        _log.info("%s is trained already", folder)
    else:
        with served_rewards(names, config.rank_config, config.model_store) as reward:
            _train(config, _run_config(config, folder, reward), folder)
    if not is_main_process():
        return folder
    write_eval_files(folder, folder / EVAL)
    if config.gold_config is not None:
        rows = gold_scores(folder / EVAL, config.gold_config, config.model_store)
        print(summary(rows))
    return folder


def _run_config(config: StudyConfig, folder: Path, reward: dict[str, object]) -> PPORunConfig:
    import torch  # not for help and mistyped settings, which do without

    on_gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() != "true"
    return run_config(config, folder, reward, num_processes=max(1, launched_processes()), on_gpu=on_gpu)


def _is_trained(folder: Path, planned: PPORunConfig) -> bool:
    return (folder / MODEL).is_dir() and max(steps_of(folder), default=0) >= planned.train.total_steps


def _train(config: StudyConfig, made: PPORunConfig, folder: Path) -> None:
    from conch.models.loading import load_tokenizer
    from examples.overoptimisation.study_trainer import StudyTrainer

    tokenizer = load_tokenizer(made.tokenizer, made.model.path)
    prompts, held = read_prompts(config, str(tokenizer.eos_token or ""))
    if is_main_process():
        write_names(folder, config.reward_models)
    with closing(StudyTrainer(made, prompts=prompts, eval_prompts=held)) as trainer:
        trainer.fit()
        trainer.save_pretrained(folder / MODEL)


def main(argv: Sequence[str]) -> None:
    """Command line: `--configs ENTRY ...`, then settings."""
    config, notes = read_settings(argv)
    if is_main_process():
        for line in notes:
            print(line)
    folder = run(config)
    if is_main_process():
        print(f"run folder: {folder}")


if __name__ == "__main__":
    run_main(main)
