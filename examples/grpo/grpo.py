"""GRPO of a language model on GSM8K or IFEval, with rewards that are checked: from this folder,

    python grpo.py
    python grpo.py --config-name grpo_ifeval
    python grpo.py train_model.num_devices=2 ref_model.num_devices=2 inference_model.num_devices=2
    python grpo.py --multirun optimizer.lr=1e-4,1e-5 policy.kl_coef=0.01,0.1

`grpo-async.py` samples while it trains. One command starts training, samplers and reference, each on devices
of its own where these are asked for, and ends them. `--print-config` shows all settings, and what they become
of Conch's; README.md explains them.
"""

from __future__ import annotations

import importlib.util
import secrets
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `examples` is not installed

from conch.cli import load_run_config, run_main
from conch.config import TrainConfig
from conch.log import get_logger
from conch.runs.tracking import make_run_dir
from examples.grpo.async_settings import AsyncExampleConfig
from examples.grpo.devices import DevicePlan, Wish, plan_devices
from examples.grpo.launch import (
    addresses,
    devices_of_training,
    run_training,
    running,
    servers_of,
    training_command,
)
from examples.grpo.settings import ExampleConfig
from examples.grpo.training import Task, train
from examples.grpo.translation import (
    Became,
    lead_lines,
    run_config,
    run_section,
    table,
    translate,
    without_effect,
)

_log = get_logger("conch.grpo")

CONFIGS = Path(__file__).resolve().parent / "config"
DEFAULT = "grpo_gsm8k"
_SHOW = "--print-config"
_OTHERWISE = {"-m", "--multirun", "-h", "--help"}
"""Words that show something else than one run's settings."""


def run(config: ExampleConfig, argv: Sequence[str] = ()) -> None:
    """Plan the devices, start what they need, and train.

    argv: the command line, for the run's files.

    Raises:
        ConchError: before anything is loaded, for what can be known by then.
        SystemExit, KeyboardInterrupt: see `conch.training.loop.fit`.
    """
    plan = planned(config)
    became = translate(config, plan, has_vllm=_has_vllm())
    made = run_config(became, None, run_section(config))  # what is wrong is told before the plan
    print("\n".join(told_before(config, plan)), flush=True)
    name = config_name(argv)
    if not plan.apart:
        print(f"run folder: {train(Task(config, made, argv, name))}")
        return
    where: dict[str, object] = {}
    run_dir = config.train.run_dir
    if run_dir is None and config.train.resume is None:
        run_dir = make_run_dir(TrainConfig(output_dir=config.train.output_dir))
        where["train.run_dir"] = str(run_dir)
    with tempfile.TemporaryDirectory(prefix="conch-grpo-") as scratch:
        _start(config, plan, became, where, Path(scratch), (run_dir or Path(scratch)) / "servers", argv)


def _start(
    config: ExampleConfig,
    plan: DevicePlan,
    became: Sequence[Became],
    where: dict[str, object],
    scratch: Path,
    logs: Path,
    argv: Sequence[str],
) -> None:
    """Servers, then the training processes; all have ended when it returns.

    where: of the run's folder, for the trainer.
    scratch: folder for the task's file.
    logs: folder for the servers' output.
    """
    task_file = scratch / "task.json"
    command = training_command(config, plan, task_file)
    section = run_section(config)
    servers = servers_of(config, run_config(became, None, section), plan, has_vllm=_has_vllm())
    secret = secrets.token_urlsafe(32)
    with running(servers, plan, logs, secret):
        final = run_config(became, {**addresses(servers), **where}, section)
        Task(config, final, argv, config_name(argv)).write(task_file)
        run_training(command, plan, devices_of_training(config, plan), secret)


def planned(config: ExampleConfig) -> DevicePlan:
    """The plan of this machine's devices.

    Raises:
        ConfigError: see `plan_devices`.
    """
    import torch

    sections = {name: getattr(config, name) for name in ("train_model", "inference_model", "ref_model")}
    wishes = {name: Wish(section.num_devices, section.devices) for name, section in sections.items()}
    return plan_devices(
        wishes,
        has_reference=config.policy.kl_coef > 0,
        num_gpus=torch.cuda.device_count(),
        overlaps=isinstance(config, AsyncExampleConfig),
    )


def told_before(config: ExampleConfig, plan: DevicePlan) -> list[str]:
    """What is printed before anything is loaded."""
    unused = without_effect(config, plan, has_vllm=_has_vllm())
    return [*plan.lines(), *lead_lines(config, plan), *unused]


def check(config: ExampleConfig) -> None:
    """See that the settings make a run on this machine.

    Raises:
        ConfigError: they do not; nothing has been loaded or started.
    """
    from conch.rollouts.factory import check_sampling  # loads torch, which help and mistyped keys do without

    became = translate(config, planned(config), has_vllm=_has_vllm())
    check_sampling(run_config(became, None, run_section(config)).rollout)


def _has_vllm() -> bool:
    return importlib.util.find_spec("vllm") is not None


def config_name(argv: Sequence[str]) -> str:
    """The file that a command line runs."""
    for before, word in zip(["", *argv], argv, strict=False):
        if before == "--config-name":
            return word
        if word.startswith("--config-name="):
            return word.partition("=")[2]
    return DEFAULT


def main(argv: Sequence[str], section: type[ExampleConfig] = ExampleConfig) -> None:
    """Command line: `key=value` overrides of `config/grpo_gsm8k.yaml`.

    section: settings of the program, of this one or of `grpo-async.py`.
    """

    def loaded(words: Sequence[str]) -> ExampleConfig:
        return load_run_config(section, words, default_name=DEFAULT, config_dir=CONFIGS, check=check)

    try:
        config = loaded(argv)
    except SystemExit as left:
        if _SHOW in argv and not left.code and _OTHERWISE.isdisjoint(argv):
            shown = loaded([word for word in argv if word != _SHOW])
            plan = planned(shown)
            became = translate(shown, plan, has_vllm=_has_vllm())
            lines = [*told_before(shown, plan), "", "became", table(became)]
            print("\n".join(f"# {line}".rstrip() for line in "\n".join(lines).splitlines()))
        raise
    run(config, argv)


if __name__ == "__main__":
    run_main(main)
