"""A sweep's folder: its jobs with their states in `sweep.json`, which a sweep that was killed goes on from.

A job is known by its configuration: where the same folder is swept again, a job takes the number of the one
that had the same, and a new number where none had. So nothing is ever written over.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import yaml

from conch.atomic_files import replace_text
from conch.errors import ConfigError

RECORD_FILE = "sweep.json"
LOG_FILE = "log.txt"
_FORMAT = 1

State = Literal["waiting", "running", "stopped", "done", "pruned", "failed"]

_FREE_KEYS = (
    *("train.run_dir", "train.resume", "train.output_dir", "train.num_processes", "train.save_every"),
    "train.save_in_background",
    *("train.keep_last", "train.checkpoint_frequency", "train.keep_checkpoints", "logging."),
    *("tracking.", "reference.", "rollout.urls", "reward.url", "reward.record", "reward.auth.headers_env"),
    *("reward.client.connect_timeout_s", "reward.client.request_timeout_s", "reward.client.deadline_s"),
    *("reward.client.timeout_per_1k_tokens_s", "reward.client.max_in_flight"),
    *("reward.failure.policy", "reward.failure.wait_budget_s", "reward.failure.checkpoint_after_s"),
    *(
        "reward.failure.on_model_change",
        "rollout.auth.",
        "rollout.ray.",
        "rollout.max_num_seqs",
        "model.trial",
    ),
    *("train.collective_timeout_s", "asynchronous.deadline_s", "evaluation.keep", "evaluation.alarms."),
    *("evaluation.gold_client.", "evaluation.gold_auth."),
    *("reward.judge.url", "reward.judge.key_env", "reward.judge.headers_env", "reward.judge.tls."),
    *("reward.judge.max_in_flight", "reward.judge.requests_per_minute", "reward.judge.tokens_per_minute"),
    *("reward.judge.connect_timeout_s", "reward.judge.request_timeout_s", "reward.judge.deadline_s"),
    *("reward.judge.cache_", "reward.judge.price_"),
)
"""Settings (or beginnings of their names) that may change between two starts of a sweep: those that a resumed
run may change, less those that its results depend on (its length, its evaluations)."""


@dataclass
class Job:
    """One run of the sweep.

    number: also the name of its folder.
    overrides: of the program's configuration.
    digest: of its configuration, without what may change.
    state: `stopped` was told to leave and has saved; `running` in a record that nobody writes was killed.
    seconds: in all attempts.
    code: exit code of the last attempt.
    pruned_at: step whose value decided that the job is stopped; later ones do not count.
    metric, step, value: what the job is compared by, where it came to something.
    error: last words of a failed attempt.
    """

    number: int
    overrides: tuple[str, ...]
    digest: str
    state: State = "waiting"
    seconds: float = 0.0
    code: int | None = None
    pruned_at: int | None = None
    metric: str | None = None
    step: int | None = None
    value: float | None = None
    error: str = ""

    @property
    def is_settled(self) -> bool:
        """True once the job has a result, or failed."""
        return self.state in ("done", "pruned", "failed")


@dataclass
class Record:
    """What `sweep.json` holds.

    folder: of the sweep.
    program: name of the configuration's class; a sweep goes on with the same program alone.
    search: what a search chooses from and how; None for a product of values.
    jobs: of all commands that this folder has seen, by number.
    chosen: numbers of the jobs that the present command asks for, in its order.
    """

    folder: Path
    program: str
    search: Mapping[str, Any] | None = None
    jobs: dict[int, Job] = field(default_factory=dict)
    chosen: list[int] = field(default_factory=list)

    @property
    def current(self) -> list[Job]:
        """Jobs of the present command."""
        return [self.jobs[number] for number in self.chosen]

    def run_dir(self, job: Job) -> Path:
        """Run folder of a job."""
        return self.folder / str(job.number)

    def log(self, job: Job) -> Path:
        """File with the output of all attempts of a job."""
        return self.run_dir(job) / LOG_FILE

    def add(self, overrides: Sequence[str], digest: str) -> Job:
        """Give a new job the next number."""
        number = max(self.jobs, default=-1) + 1
        # A folder that is not ours is left alone.
        while (self.folder / str(number)).exists():
            number += 1
        job = self.jobs[number] = Job(number, tuple(overrides), digest)
        return job

    def save(self) -> None:
        """Write `sweep.json` in one go.

        Raises:
            ConfigError: the disk failed.
        """
        values = {
            "format": _FORMAT,
            "program": self.program,
            "search": self.search,
            "chosen": self.chosen,
            "jobs": [asdict(job) for _, job in sorted(self.jobs.items())],
        }
        try:
            replace_text(self.folder / RECORD_FILE, json.dumps(values, indent=1) + "\n")
        except OSError as error:
            raise ConfigError(f"cannot write {self.folder / RECORD_FILE}: {error.strerror}") from error


def make_folder(wanted: Path | None) -> Path:
    """Make the sweep's folder, `multirun/<date>/<time>/` where none is wanted; one that is there is taken.

    Raises:
        ConfigError: it cannot be made, or holds something that is no sweep.
    """
    first = wanted or Path("multirun") / datetime.now().strftime("%Y-%m-%d/%H-%M-%S")
    folder, attempt = first.expanduser(), 1
    try:
        while True:
            try:
                folder.mkdir(parents=True)
                return folder.resolve()
            except FileExistsError:
                if wanted is not None:
                    break
                attempt += 1
                folder = first.with_name(f"{first.name}-{attempt}")
        content = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise ConfigError(
            f"the sweep's folder {folder} cannot be made ({error.strerror}): choose another sweep.dir"
        ) from error
    if content and RECORD_FILE not in content:
        raise ConfigError(
            f"{folder} holds no sweep (no {RECORD_FILE}), but other files: choose a new sweep.dir"
        )
    return folder.resolve()


def read_record(folder: Path, program: str) -> Record:
    """Read what stands in a sweep's folder; an empty record where nothing does.

    Raises:
        ConfigError: it is another program's, of another version, or damaged.
    """
    path = folder / RECORD_FILE
    if not path.is_file():
        return Record(folder, program)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != _FORMAT:
            raise ConfigError(f"{path} has format {values['format']}, this version reads {_FORMAT}")
        if values["program"] != program:
            raise ConfigError(
                f"the sweep in {folder} is of {values['program']}, this program is of {program}: choose "
                "another sweep.dir"
            )
        jobs = [Job(**{**job, "overrides": tuple(job["overrides"])}) for job in values["jobs"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is damaged ({error!r}): choose another sweep.dir, or restore it"
        ) from error
    return Record(folder, program, values["search"], {job.number: job for job in jobs}, values["chosen"])


def choose(record: Record, wanted: Sequence[tuple[Sequence[str], str]]) -> None:
    """Make the jobs of a product the record's present ones: known ones by their configuration, others new.

    wanted: overrides and digest of each job.
    """
    known: dict[str, list[Job]] = defaultdict(list)
    for _, job in sorted(record.jobs.items()):
        known[job.digest].append(job)
    chosen: list[int] = []
    for overrides, digest in wanted:
        # The same configuration may be asked for twice: each has a job of its own.
        job = known[digest].pop(0) if known[digest] else record.add(overrides, digest)
        job.overrides = tuple(overrides)
        chosen.append(job.number)
    record.chosen = chosen


def reset_unfinished(record: Record) -> None:
    """Have everything that the present command asks for and that has no result wait for its turn."""
    for job in record.current:
        if job.state not in ("done", "pruned"):
            record.jobs[job.number] = replace(job, state="waiting", error="")


def digest_of(config: Mapping[str, Any]) -> str:
    """Return the digest of a resolved configuration; equal for two that learn the same."""
    kept = {key: value for key, value in flatten(config).items() if not key.startswith(_FREE_KEYS)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:16]


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested keys as `section.key`."""
    if not isinstance(values, Mapping) or not values:
        return {prefix: values}
    return {
        key: value
        for name, inner in values.items()
        for key, value in flatten(inner, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def write_hydra_files(record: Record, job: Job, config: Mapping[str, Any], name: str) -> None:
    """Write `.hydra/{config,overrides,hydra}.yaml` into a job's folder, in the form of Hydra's own sweeps."""
    folder = record.run_dir(job) / ".hydra"
    folder.mkdir(parents=True, exist_ok=True)
    hydra = {
        "mode": "MULTIRUN",
        "sweep": {"dir": str(record.folder), "subdir": str(job.number)},
        "job": {
            "name": name,
            "num": job.number,
            "id": str(job.number),
            "override_dirname": ",".join(job.overrides),
        },
        "overrides": {"task": list(job.overrides)},
        "runtime": {"cwd": str(Path.cwd()), "output_dir": str(record.run_dir(job))},
    }
    for file, content in (
        ("config", dict(config)),
        ("overrides", list(job.overrides)),
        ("hydra", {"hydra": hydra}),
    ):
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        replace_text(folder / f"{file}.yaml", text)
