"""GRPO that steers texts to targets in goal space: from this folder,

    accelerate launch --num-processes 2 rl.py --config tiny
    accelerate launch --num-processes 2 rl.py --config paper reward.url=http://127.0.0.1:12121/goalspace
    python rl.py --config tiny train.total_steps=20

The processes of the launcher train, each on a device; on the device behind them a server samples. Without a
GPU each device is a process on the CPU. `key=value` words are laid over the file; docs/steerability.md has
the whole.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `examples` is not installed

from conch.cli import run_main
from conch.cli.run_config import to_yaml
from conch.config import load
from conch.config.algorithms.grpo import GRPORunConfig
from conch.errors import ConfigError
from conch.log import get_logger, is_main_process
from conch.rewards.factory import from_user
from conch.runs.plots import read_metric
from conch.runs.tracking import make_run_dir
from examples.grpo.launch import SECRET_VARIABLE
from examples.steerability.devices import Devices, devices_of, relaunch_on_cpu, use_zero
from examples.steerability.prepare import Prepared, prepared
from examples.steerability.rows import generated_rows, read_probe
from examples.steerability.settings import SteerabilityRunConfig, load_settings

_log = get_logger("conch.steerability")

ERROR, SIDE_EFFECTS = "eval/steering/error", "eval/steering/orthogonality"


def run(config: SteerabilityRunConfig) -> Path:
    """Prepare what a run needs, and train. All processes of the launcher call it; returns the run's folder.

    Raises:
        ConchError: before long work starts, for what can be known by then.
        SystemExit, KeyboardInterrupt: see `conch.training.loop.fit`.
    """
    from conch.trainers.grpo import GRPOTrainer  # loads torch, which help and mistyped keys do without

    devices = devices_of(config)
    if is_main_process():
        print("\n".join(devices.lines()), flush=True)
    use_zero(config, devices)
    # Before a policy is trained for minutes: rewards and rows that cannot be.
    with from_user(None, config.reward) as source:
        source.check()
    probe = config.steerability
    train, held_out = (
        generated_rows(probe, config.reward)
        if probe.probe is None
        else read_probe(probe, config.reward.steering.goals)
    )
    with prepared(config, devices) as ready:
        final = grpo_config(config, devices, ready)
        with _secret(ready), closing(GRPOTrainer(final, prompts=train, eval_prompts=held_out)) as trainer:
            return trainer.fit()


def grpo_config(config: SteerabilityRunConfig, devices: Devices, ready: Prepared) -> GRPORunConfig:
    """The settings of GRPO on these devices, from the policy that was prepared."""
    values: dict[str, Any] = config.model_dump(exclude={"steerability"}, exclude_unset=True)
    values.setdefault("train", {})["num_processes"] = devices.num_processes
    if ready.run_dir is not None:
        values["train"]["run_dir"] = ready.run_dir
    if ready.policy is not None:
        values["model"] = {**_without(values["model"], "architecture"), "path": ready.policy}
    if ready.sampler is not None:
        rollout = _without(values.get("rollout", {}), "engine")
        values["rollout"] = {**rollout, "urls": ready.sampler, "auth": {"secret_env": SECRET_VARIABLE}}
    return load(GRPORunConfig, values)


def _without(values: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != key}


@contextmanager
def _secret(ready: Prepared) -> Iterator[None]:
    before = os.environ.get(SECRET_VARIABLE)
    if ready.secret:
        os.environ[SECRET_VARIABLE] = ready.secret
    try:
        yield
    finally:
        if ready.secret:
            os.environ.pop(SECRET_VARIABLE)
        if before is not None:
            os.environ[SECRET_VARIABLE] = before


def report(run_dir: Path) -> str:
    """What the held-out rows say: error and side effects before and after."""
    lines = []
    for name, what in ((ERROR, "distance to the target"), (SIDE_EFFECTS, "orthogonality")):
        _, values = read_metric(run_dir, name)
        if len(values) > 1:
            share = f", {values[-1] / values[0]:.2f} of the start's" if values[0] else ""
            lines.append(f"{what:24}{values[0]:8.3f} -> {values[-1]:.3f}{share}")
    return "\n".join(["held-out rows", *lines])


def main(argv: Sequence[str]) -> None:
    """Command line: `--config FILE`, then `key=value` overrides."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", required=True, help="a YAML file, or the name of one in configs/")
    parser.add_argument("--print-config", action="store_true", help="show the settings, and leave")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over the file's")
    arguments = parser.parse_intermixed_args(list(argv))
    if words := [word for word in arguments.overrides if "=" not in word and not word.startswith("~")]:
        raise ConfigError(f"`{words[0]}` is no setting: write key=value behind --config FILE")
    config = load_settings(arguments.config, arguments.overrides)
    if arguments.print_config:
        print(to_yaml(config))
        return
    if not config.steerability.own_sampler:
        from conch.rollouts.factory import check_sampling

        check_sampling(config.rollout)
    relaunch_on_cpu(argv)
    if config.train.run_dir is None and config.train.resume is None and is_main_process():
        config = config.model_copy(
            update={"train": config.train.model_copy(update={"run_dir": make_run_dir(config.train)})}
        )
    folder = run(config)
    if is_main_process():
        if config.train.eval_every:
            print(report(folder))
        print(f"run folder: {folder}")


if __name__ == "__main__":
    run_main(main)
