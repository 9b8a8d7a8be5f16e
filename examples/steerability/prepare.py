"""What a run needs before its processes train: the policy to begin with, and a server that samples.

The first process of the launcher makes both, and tells the others where they are in a file that only this
user can read.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `examples` is not installed

from conch.cli import compose, run_main
from conch.config import load
from conch.config.algorithms.sft import SFTRunConfig
from conch.errors import ConfigError, ServerStartError
from conch.log import get_logger
from conch.runs.reading import CHECKPOINTS, steps_of
from examples.byte_pairs import tokenizer_for
from examples.grpo.launch import SECRET_VARIABLE, Server, free_ports, running
from examples.hosting import launchers_note
from examples.steerability.devices import Devices
from examples.steerability.settings import CONFIGS, SteerabilityRunConfig
from examples.steerability.texts import corpus

_log = get_logger("conch.steerability")

_LONGEST_WAIT_S = 3600.0
_POLL_S = 0.2
_OF_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")
_OF_LAUNCHER += ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "ACCELERATE_USE_DEEPSPEED")


@dataclass(frozen=True)
class Prepared:
    """What is there.

    run_dir: of the run; None leaves it to the trainer.
    policy: folder of the policy to begin with; None takes what the settings name.
    sampler: `host:port` of the server that samples; None samples where the policy is trained.
    secret: that it asks for.
    """

    run_dir: str | None = None
    policy: str | None = None
    sampler: str | None = None
    secret: str = ""


@contextmanager
def prepared(config: SteerabilityRunConfig, devices: Devices) -> Iterator[Prepared]:
    """All that a run needs, for as long as the context lasts; on all processes.

    Raises:
        ConchError: it cannot be made. The launcher then ends the processes that wait.
    """
    if int(os.environ.get("LOCAL_RANK") or 0) == 0:
        with _made(config, devices) as ready:
            note = _note() if devices.num_processes > 1 else None
            if note is not None:
                _tell(note, ready)
            try:
                yield ready
            finally:
                if note is not None:
                    note.unlink(missing_ok=True)
    else:
        yield _wait_for(_note())


@contextmanager
def _made(config: SteerabilityRunConfig, devices: Devices) -> Iterator[Prepared]:
    run_dir = config.train.run_dir
    policy = None
    if config.steerability.sft is not None:
        policy = _trained_policy(config, run_dir or _resumed_folder(config.train.resume))
    ready = Prepared(None if run_dir is None else str(run_dir), policy)
    if devices.sampler is None:
        yield ready
        return
    secret = secrets.token_urlsafe(32)
    server = _server(config, devices.sampler, policy)
    logs = (run_dir or Path("outputs")) / "servers"
    with running([server], devices.plan, logs, secret):
        yield Prepared(ready.run_dir, policy, server.url, secret)


def _resumed_folder(resume: str | None) -> Path:
    """The run's folder, of it or of one of its checkpoints.

    Raises:
        ConfigError: `auto` without a folder.
    """
    if resume in (None, "auto"):
        raise ConfigError(
            "`steerability.sft` with `train.resume` = auto: name the run's folder, `train.run_dir`"
        )
    folder = Path(str(resume))
    return folder.parents[1] if folder.parent.name == CHECKPOINTS else folder


def _server(config: SteerabilityRunConfig, device: int, policy: str | None) -> Server:
    rollout, model = config.rollout, config.model
    settings: dict[str, object] = {
        "engine": "vllm" if rollout.engine == "vllm" else "transformers",
        "model": policy or model.path,
        "revision": model.revision,
        "trust_remote_code": model.trust_remote_code or None,
        "dtype": model.dtype if rollout.dtype == "auto" and model.dtype != "float64" else rollout.dtype,
        "max_model_len": rollout.max_model_len,
        "max_num_seqs": rollout.max_num_seqs,
        "secret_env": SECRET_VARIABLE,
    }
    if rollout.engine == "vllm":
        rank = (model.peft_config or {}).get("r")
        settings |= {
            "gpu_memory_utilization": 0.9,
            "enforce_eager": rollout.enforce_eager,
            "max_lora_rank": rank,
        }
    return Server("sampler", "rollout-server", settings, free_ports(1)[0], (device,))


def _trained_policy(config: SteerabilityRunConfig, run_dir: Path) -> str:
    """The last checkpoint of SFT in a folder beside the run, which is trained first where it is not whole."""
    folder, own = run_dir.with_name(f"{run_dir.name}-sft"), config.steerability
    assert own.sft is not None
    steps = sft_config(own.sft, own.sft_steps, config.train.seed, folder).train.total_steps
    if max(steps_of(folder), default=0) < steps:
        _log.info("training the policy to begin with, into %s", folder)
        alone = {name: value for name, value in os.environ.items() if name not in _OF_LAUNCHER}
        alone.pop("OMP_NUM_THREADS", None)  # the other processes only wait meanwhile
        task = {
            "name": own.sft,
            "steps": own.sft_steps,
            "rows": own.sft_rows,
            "seed": config.train.seed,
            "folder": str(folder),
        }
        done = subprocess.run([sys.executable, str(Path(__file__)), json.dumps(task)], env=alone, check=False)
        if done.returncode:
            raise ServerStartError("the policy to begin with was not trained: the output above says why")
    there = steps_of(folder)
    return str(there[max(there)])


def sft_config(name: str, steps: int | None, seed: int, folder: Path) -> SFTRunConfig:
    """Settings of the policy to begin with; one that was interrupted goes on.

    name: of the file with them.
    steps: instead of the file's.

    Raises:
        ConfigError: there is no such file, or it is wrong.
    """
    values = compose(name, [], CONFIGS)
    own = {"seed": seed, "run_dir": str(folder), "resume": "auto"}
    values["train"] = {**values.get("train", {}), **own}
    if steps is not None:
        values["train"]["total_steps"] = steps
    return load(SFTRunConfig, values)


def train_policy(config: SFTRunConfig, rows: int) -> None:
    """SFT on a generated corpus of so many rows.

    Raises:
        ConchError: see `SFTTrainer`.
    """
    from conch.trainers.sft import SFTTrainer  # loads torch, which help of `rl.py` does without

    samples = corpus(rows, seed=0)
    tokenizer = tokenizer_for(
        config.model, config.tokenizer, [row["prompt"] + row["completion"] for row in samples]
    )
    with closing(SFTTrainer(config, samples=samples, tokenizer=tokenizer)) as trainer:
        trainer.fit()


# --------------------------------------------------------------------------------------- one note a launcher


def _note() -> Path:
    return launchers_note().with_suffix(".steerability")


def _tell(note: Path, ready: Prepared) -> None:
    """Write a file that is whole as soon as it is there, and that nobody else can read: it has a secret."""
    partial = note.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        json.dump(asdict(ready), file)
    os.replace(partial, note)


def _wait_for(note: Path) -> Prepared:
    """What the first process has told.

    Raises:
        ServerStartError: nothing, for an hour.
    """
    deadline = time.monotonic() + _LONGEST_WAIT_S
    while not note.is_file():
        if time.monotonic() > deadline:
            raise ServerStartError(f"the first process prepared nothing in {_LONGEST_WAIT_S:.0f} s")
        time.sleep(_POLL_S)
    return Prepared(**json.loads(note.read_text(encoding="utf-8")))


def main(argv: Sequence[str]) -> None:
    """Command line: the JSON of what to train."""
    task = json.loads(argv[0])
    rows, folder = task.pop("rows"), Path(task.pop("folder"))
    train_policy(sft_config(**task, folder=folder), rows)


if __name__ == "__main__":
    run_main(main)
