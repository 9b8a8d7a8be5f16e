"""Which devices train and which samples: the launcher's processes, and one device behind theirs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from conch.distributed.launcher import launched_processes
from conch.errors import ConfigError
from conch.machine.processors import granted_processors
from examples.grpo.devices import DevicePlan
from examples.steerability.settings import SteerabilityRunConfig

_RELAUNCHED = "CONCH_STEERABILITY_RELAUNCHED"
_LAUNCHERS_CHOICE = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")


@dataclass(frozen=True)
class Devices:
    """Where a run computes.

    num_processes: that train.
    sampler: number of the sampler's device; None where completions are sampled by the training processes.
    on_gpus: False where devices are simulated by processes on the CPU.
    """

    num_processes: int
    sampler: int | None
    on_gpus: bool

    def lines(self) -> list[str]:
        """What to print before anything is loaded."""
        kind = "GPU" if self.on_gpus else "simulated device"
        numbers = ", ".join(map(str, range(self.num_processes)))
        sampling = "where the policy is trained" if self.sampler is None else f"{kind} {self.sampler}"
        plural = "s" * (self.num_processes > 1)
        rows = ["devices", f"  {'training':14}{kind}{plural} {numbers}", f"  {'sampling':14}{sampling}"]
        if not self.on_gpus:
            total = self.num_processes + (self.sampler is not None)
            rows.append(f"  no GPU here: {total} devices are simulated by processes on the CPU")
        return rows

    @property
    def plan(self) -> DevicePlan:
        """The same for `examples.grpo.launch`."""
        inference = () if self.sampler is None else (self.sampler,)
        return DevicePlan(
            tuple(range(self.num_processes)),
            inference,
            (),
            has_reference=False,
            on_gpus=self.on_gpus,
            apart=True,
        )


def devices_of(config: SteerabilityRunConfig) -> Devices:
    """The devices of this launch.

    Raises:
        ConfigError: several machines, or no GPU is left to sample on.
    """
    import torch

    processes = max(1, launched_processes())
    if processes != int(os.environ.get("LOCAL_WORLD_SIZE") or processes):
        raise ConfigError(
            "a run on several machines needs samplers that are named: start `conch rollout-server`s, set "
            "`rollout.urls` and `steerability.own_sampler=false`"
        )
    asks_for_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    gpus = 0 if asks_for_cpu else torch.cuda.device_count()
    own = config.steerability.own_sampler
    if gpus and own and gpus <= processes:
        raise ConfigError(
            f"{processes} processes train, and of {gpus} GPUs none is left to sample on: take fewer "
            "processes (--num-processes), or `steerability.own_sampler=false`"
        )
    return Devices(processes, processes if own else None, gpus > 0)


def relaunch_on_cpu(argv: Sequence[str]) -> None:
    """Put a launcher of as many processes as `accelerate launch` was asked for in the place of this one: on a
    machine without a GPU it starts one, whatever `--num-processes` says."""
    import torch

    wanted = asked_of_launcher(_command_of_parent())
    if wanted < 2 or launched_processes() or torch.cuda.is_available() or os.environ.get(_RELAUNCHED):
        return
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", _RELAUNCHED: "1"}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, granted_processors() // wanted)))
    alone = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"]
    program = [str(Path(__file__).with_name("rl.py")), *argv]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(wanted), *alone, *program]
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *launch], environment)


def _command_of_parent() -> list[str]:
    try:
        return Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def asked_of_launcher(words: Sequence[str]) -> int:
    """`--num-processes` of a command line of `accelerate launch`; 0 where it is none, or does not say."""
    if not any(Path(word).name.startswith("accelerate") or "accelerate.commands" in word for word in words):
        return 0
    for word, behind in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.replace("_", "-").partition("=")
        number = value if equals else behind
        if name == "--num-processes" and number.isdigit():
            return int(number)
    return 0


def use_zero(config: SteerabilityRunConfig, devices: Devices) -> None:
    """Have accelerate train by DeepSpeed's ZeRO, as the settings say, where its launcher was told nothing: no
    DeepSpeed and no FSDP."""
    stage = config.steerability.zero_stage
    told = any(os.environ.get(name) is not None for name in _LAUNCHERS_CHOICE)
    if not stage or not devices.on_gpus or devices.num_processes < 2 or told:
        return
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(stage)
    if config.train.mixed_precision is not None:
        os.environ["ACCELERATE_MIXED_PRECISION"] = config.train.mixed_precision
