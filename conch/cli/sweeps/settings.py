"""Settings of a sweep: the keys `sweep.*` that `--multirun` takes beside those of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from conch.config import Section


class SweepConfig(Section):
    """One run of the program for each combination of values: `--multirun key=a,b other=range(1,4)`."""

    dir: Path | None = None
    """Folder of the sweep, with a folder `0`, `1`, ... for each job; None makes `multirun/<date>/<time>/`.
    A folder that holds a sweep goes on with it: finished jobs of the same configuration are skipped, begun
    ones resume. `hydra.sweep.dir` is another name of this key."""

    jobs: int = Field(default=1, ge=1)
    """Jobs that run at once."""

    launcher: str | None = None
    """Words that start a job in place of `python`, for example `accelerate launch --num_processes 2`."""

    devices: tuple[int | str, ...] | None = None
    """GPUs to hand out among the jobs, by index or UUID; None takes those that this process sees."""

    devices_per_job: int | None = Field(default=None, ge=0)
    """GPUs of each job, in its CUDA_VISIBLE_DEVICES; no two jobs share one. None divides the GPUs among
    `jobs`; 0 hands out none, so that every job sees them all."""

    threads: int | None = Field(default=None, ge=1)
    """OMP_NUM_THREADS of each job; None keeps the variable, and divides the processors among `jobs` where it
    is not set."""

    metric: str | None = None
    """Metric of `metrics.jsonl` that jobs are compared by; None takes the one by which a run chooses its
    best checkpoint, where that was never logged `reward/mean`, else `train/loss`."""

    metric_at: Literal["best", "last"] | None = None
    """Value of `metric` that counts: the best or the last one after step 0. None takes the best of metrics
    that begin with `eval/`, the last of others."""

    direction: Literal["maximize", "minimize"] | None = None
    """What is better; None takes minimize for names that end in `loss`, else maximize."""

    trials: int | None = Field(default=None, ge=1)
    """Search: so many jobs, whose values are chosen by `sampler` from the results of earlier ones, instead
    of every combination. Needed for `interval()`."""

    sampler: Literal["tpe", "random"] = "tpe"
    """How a search chooses: Optuna's tree-structured Parzen estimator, or at random."""

    seed: int = Field(default=0, ge=0)
    """Seeds the search and the order of `shuffle()`; the seed of the runs is `train.seed`."""

    prune: Literal["median"] | None = None
    """Stop a job whose best value of `metric` so far is worse than the median of the finished jobs' at the
    same step."""

    n_startup_trials: int = Field(default=5, ge=1)
    """Jobs that must have finished before any is pruned."""

    n_warmup_steps: int = Field(default=0, ge=0)
    """Steps before which no job is pruned."""

    stop_on_failure: bool = False
    """Start no more jobs once one has failed; those that run go on to their end."""

    retries: int = Field(default=3, ge=0)
    """Times that a job which was killed from outside (a signal, out of memory) is resumed without having got
    any further in between, before it counts as failed."""

    grace_s: float = Field(default=120.0, gt=0)
    """Seconds that a job has to finish its step and to save, when it is told to leave."""
