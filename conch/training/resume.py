"""How a run begins or goes on: its folder, the checkpoint to take up, the settings that may change."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import nn

from conch.config import RunConfig, Section, TrainConfig
from conch.distributed.train_engine import TrainEngine
from conch.errors import CheckpointError, missing_path
from conch.log import get_logger
from conch.runs.checkpoint import (
    CHECKPOINTS,
    FORMAT,
    STATE_FILE,
    STATE_FOLDER,
    Checkpoint,
    check_space,
    checkpoint_bytes,
    delete_leftovers,
    newest_checkpoint,
    read_checkpoint,
    steps_of,
)
from conch.runs.tracking import METRICS_FILE, check_unused, make_run_dir
from conch.training.checkpointing import Run

_log = get_logger(__name__)

_FREE_KEYS = (
    *("train.resume", "train.run_dir", "train.output_dir", "train.total_steps", "train.num_processes"),
    *(
        "train.eval_every",
        "train.eval_repeats",
        "train.save_every",
        "train.save_in_background",
        "train.keep_last",
    ),
    *("train.best_metric", "train.early_stopping", "train.collective_timeout_s", "tracking."),
    *("asynchronous.deadline_s", "rollout.ray.", "rollout.max_num_seqs"),
    *("reward.url", "reward.members.", "reward.record", "reward.replay", "reward.auth.headers_env"),
    *("reward.client.connect_timeout_s", "reward.client.request_timeout_s", "reward.client.deadline_s"),
    *("reward.client.timeout_per_1k_tokens_s", "reward.client.max_in_flight"),
    *("reward.failure.policy", "reward.failure.wait_budget_s", "reward.failure.checkpoint_after_s"),
    *("reward.judge.url", "reward.judge.key_env", "reward.judge.headers_env", "reward.judge.tls."),
    *("reward.judge.max_in_flight", "reward.judge.requests_per_minute", "reward.judge.tokens_per_minute"),
    *("reward.judge.connect_timeout_s", "reward.judge.request_timeout_s", "reward.judge.deadline_s"),
    *("reward.judge.cache_", "reward.judge.price_", "reward.judge.budget"),
    *("reward.failure.on_model_change", "rollout.urls", "rollout.auth.", "reference.", "model.trial"),
    *("evaluation.", "train.stop_when"),
)
"""Settings (or beginnings of their names) that a resumed run may change: none touches what is learned, but
for the length of the run, which moves the end of the learning-rate schedule."""


_BEFORE = {"tokenizer.add_special_tokens": False}
"""What a setting was for runs whose checkpoints do not know it yet, where that is not its default."""


@runtime_checkable
class Resumable(Protocol):
    """What a checkpoint restores."""

    engine: TrainEngine

    @property
    def config(self) -> RunConfig:
        """Of the run."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `Trainer.state_dict` gave."""
        ...


def check_folders(config: RunConfig) -> None:
    """Refuse, before a model is loaded or a sampler started, what can be told without reading a checkpoint's
    weights; `start_run` looks at all of it.

    Raises:
        ConfigError: the folder of a new run holds another.
        CheckpointError: `train.resume` names no folder, or a run of another algorithm or configuration.
    """
    train = config.train
    if train.resume is None:
        if train.run_dir is not None:
            check_unused(train.run_dir)
        return
    folder = train.run_dir if train.resume == "auto" else _named_folder(train.resume)
    if folder is None:
        return
    newest = next(iter(steps_of(folder).values()), folder)
    with contextlib.suppress(OSError, ValueError):  # `start_run` tells what is not whole
        state = json.loads((newest / STATE_FILE).read_text(encoding="utf-8"))
        if state.get("format") == FORMAT:
            _check_same(Checkpoint(newest, state), config)


def is_resumed(train: TrainConfig) -> bool:
    """Whether `train.resume` names something to go on with; `auto` may find nothing."""
    if train.resume != "auto":
        return train.resume is not None
    runs = [train.run_dir] if train.run_dir is not None else _saved_runs(train.output_dir)
    return any(steps_of(run) for run in runs)


def start_run(trainer: Resumable, module: nn.Module) -> Run:
    """Make the run's folder, or take up the run that `train.resume` names: the last thing a constructor does.

    module: what is trained, for an estimate of a checkpoint's size.

    Raises:
        ConfigError: the folder cannot be made or holds another run.
        CheckpointError: nothing to go on with, another model or configuration, or too little disk space.
    """
    ranks, config = trainer.engine.collectives, trainer.config
    located: list[tuple[Path, Checkpoint | None]] = []
    ranks.run_on_all_ranks(lambda: located.append(_find(config)) if ranks.is_main else None)
    # Rank 0 has read and checked every byte: once is enough.
    folder, resumed = ranks.broadcast(located[0] if located else (Path(), None))
    ranks.run_on_all_ranks(lambda: check_space(folder, checkpoint_bytes(module)))
    run = Run(folder)
    if resumed is not None:
        ranks.run_on_all_ranks(lambda: _restore(trainer, run, resumed))
    return run


def _find(config: RunConfig) -> tuple[Path, Checkpoint | None]:
    """The run's folder and the checkpoint to go on with, None for a new run. Rank 0 alone."""
    checkpoint = _checkpoint_to_resume(config.train)
    if checkpoint is None:
        train = config.train
        if train.resume == "auto":
            where = train.run_dir or f"the runs below {train.output_dir}"
            _log.info("train.resume=auto: no checkpoint in %s to go on with, starting at step 0", where)
        if train.resume == "auto" and train.run_dir is not None:
            # Interrupted before its first checkpoint: nothing there is worth more than a new start.
            (train.run_dir / METRICS_FILE).unlink(missing_ok=True)
        return make_run_dir(train), None
    for key, (old, new) in _check_same(checkpoint, config).items():
        if key == "train.total_steps":
            _log.warning("train.total_steps was %s, is %s", old, new)
    delete_leftovers(checkpoint.run_dir)
    return checkpoint.run_dir.resolve(), Checkpoint(checkpoint.folder.resolve(), checkpoint.state)


def _checkpoint_to_resume(train: TrainConfig) -> Checkpoint | None:
    if train.resume is None:
        return None
    if train.resume == "auto":
        runs = [train.run_dir] if train.run_dir is not None else _saved_runs(train.output_dir)
        return next((found for run in runs if (found := newest_checkpoint(run)) is not None), None)
    folder = _named_folder(train.resume)
    if steps_of(folder):
        checkpoint = newest_checkpoint(folder)
        if checkpoint is None:
            raise CheckpointError(f"`train.resume` = {folder}: none of its checkpoints is whole")
        return checkpoint
    return read_checkpoint(folder.resolve())  # through `best`, which is a link


def _named_folder(resume: str) -> Path:
    folder = Path(resume).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"`train.resume` = {folder}: there is no such folder{missing_path(folder)}")
    return folder


def _saved_runs(output_dir: Path) -> list[Path]:
    """Folders of runs that saved something, newest first."""
    runs = {path.parent.parent for path in output_dir.glob(f"*/*/{CHECKPOINTS}/step_*")}
    return sorted(runs, reverse=True)


def _check_same(checkpoint: Checkpoint, config: Section) -> dict[str, tuple[Any, Any]]:
    """Refuse a checkpoint of another algorithm or configuration; returns by its key what may differ and does:
    what it was, and what it is.

    Raises:
        CheckpointError: names what differs.
    """
    state = checkpoint.state
    if state["algorithm"] != type(config).__name__:
        raise CheckpointError(
            f"the checkpoint {checkpoint.folder} is of a {state['algorithm']}, this run is a "
            f"{type(config).__name__}: go on with the trainer that made it, or start a new run from its "
            "weights with `model.path`"
        )
    new = _flat(config.model_dump(mode="json"))
    defaults = _flat(type(config).model_construct().model_dump(mode="json"))
    saved = _flat(state["config"])
    old = {**{key: _BEFORE.get(key, defaults.get(key)) for key in new if key not in saved}, **saved}
    changed = [key for key in sorted(old | new) if old.get(key) != new.get(key)]
    refused = [key for key in changed if not key.startswith(_FREE_KEYS)]
    if refused:
        named = "; ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in refused[:5])
        raise CheckpointError(
            f"the checkpoint {checkpoint.folder} was made with another configuration: {named}. "
            "Go on with the old one, or start a new run from the checkpoint with `model.path`"
        )
    return {key: (old.get(key), new.get(key)) for key in changed}


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested keys as `section.key`."""
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    return {
        key: value
        for name, inner in values.items()
        for key, value in _flat(inner, f"{prefix}.{name}" if prefix else name).items()
    }


def _restore(trainer: Resumable, run: Run, checkpoint: Checkpoint) -> None:
    state, engine, ranks = checkpoint.state, trainer.engine, trainer.engine.collectives
    if state["num_processes"] != ranks.num_ranks:
        raise CheckpointError(
            f"the checkpoint {checkpoint.folder} was saved by {state['num_processes']} processes, here run "
            f"{ranks.num_ranks}: start as many, or start a new run from it with `model.path`"
        )
    trainer.load_state_dict(state["trainer"])
    engine.load_state_dict(state["engine"])
    engine.load_state(checkpoint.folder / STATE_FOLDER)
    run.load_state_dict(state["run"])
    run.continued, run.saved = True, run.step
    if run.step >= trainer.config.train.total_steps and run.measured is None:
        _log.warning(
            "nothing to do: %s has done %d steps, and train.total_steps=%d: raise that to train on",
            *(run.folder, run.step, trainer.config.train.total_steps),
        )
    else:
        _log.info("going on with %s after step %d", run.folder, run.step)
