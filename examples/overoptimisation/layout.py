"""The folders of a study, as the paper's code names them: `<output_dir>/<model>/`, and in it

    eval/eval-<k>.json     evaluations (`conch.evaluation.seed_files`), k counting them from 0
    model/                 the policy at the end
    rm_model_names.txt     the reward models, one a line

beside the run's own files: evaluations/, checkpoints/, metrics.jsonl. `<model>` is `seedN` with `--rm_seed
N`, else a single model's name, or `ensemble_mean`, `ensemble_WCO`, `ensemble_UWO-0.1`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from conch.atomic_files import replace_text
from examples.overoptimisation.settings import StudyConfig

EVAL = "eval"
MODEL = "model"
NAMES = "rm_model_names.txt"

_DIGEST_LETTERS = 6


def run_folder(config: StudyConfig) -> Path:
    """Folder of a run.

    Where other reward models have taken the name before, and for another `rng_seed` than 0, something is
    added: no run writes over another's.
    """
    name = _name(config)
    if config.rng_seed:
        name += f"_rng{config.rng_seed}"
    folder = config.output_dir / name
    if (before := _names_in(folder)) is not None and before != config.reward_models:
        digest = hashlib.sha256("\n".join(config.reward_models).encode()).hexdigest()
        return folder.with_name(f"{name}_{digest[:_DIGEST_LETTERS]}")
    return folder


def write_names(folder: Path, names: Sequence[str]) -> None:
    """Write the reward models' names."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / NAMES, "\n".join(names))


def _name(config: StudyConfig) -> str:
    rank = config.rank_config
    if config.rm_seed is not None:
        return f"seed{config.rm_seed}"
    if len(rank.model_names) > 1:
        # The mean and WCO have no weight, and UWO with another one is another study.
        weight = f"-{rank.uwo_weight:g}" if rank.objective_name == "UWO" else ""
        return f"ensemble_{rank.objective_name}{weight}"
    (name,) = config.reward_models
    return name.strip("./").replace("/", "_").replace(":", "_")


def _names_in(folder: Path) -> tuple[str, ...] | None:
    file = folder / NAMES
    return tuple(file.read_text(encoding="utf-8").split("\n")) if file.is_file() else None
