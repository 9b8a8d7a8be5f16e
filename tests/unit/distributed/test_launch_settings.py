"""A trainer's own settings hold against what the environment, a file or another trainer says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from conch.config import ModelConfig, OptimizerConfig, SchedulerConfig, TrainConfig
from conch.distributed.launch_settings import check_environment, take_over_deepspeed
from conch.distributed.train_engine import TrainEngine
from conch.errors import ConfigError, DistributedError
from tests.runs import parameters, policy, ppo_trainer, reward_trainer, sft_trainer

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
SAMPLES = ["ab", "abcdefgh", "c", "hgfedcba", "de", "bcdefghab", "fg", "ccccccc"]


def four_updates(run_dir: Path, steps: int) -> tuple[Any, list[dict[str, float]]]:
    """An SFT trainer and the metrics of four of its updates."""
    settings = {"optimizer": {"learning_rate": 1e-2}, "train": {"gradient_accumulation_steps": steps}}
    trainer = sft_trainer(run_dir, SAMPLES, lm=policy(), **settings)
    return trainer, [trainer.step() for _ in range(4)]


@pytest.mark.parametrize(("setting", "environment"), [(4, "1"), (1, "4"), (4, "3")])
def test_an_update_is_one_optimizer_step_whatever_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: int, environment: str
) -> None:
    monkeypatch.delenv(ACCUMULATION, raising=False)
    expected, metrics = four_updates(tmp_path / "alone", setting)
    monkeypatch.setenv(ACCUMULATION, environment)
    trainer, found = four_updates(tmp_path / "told", setting)
    assert trainer.engine.state_dict()["scheduler"]["last_epoch"] == 4
    assert found == metrics
    assert torch.equal(parameters(trainer.lm), parameters(expected.lm))


def test_trainers_of_one_process_count_apart(tmp_path: Path) -> None:
    expected, metrics = four_updates(tmp_path / "alone", 4)
    settings = {"optimizer": {"learning_rate": 1e-2}, "train": {"gradient_accumulation_steps": 4}}
    trainer = sft_trainer(tmp_path / "first", SAMPLES, lm=policy(), **settings)
    other = sft_trainer(tmp_path / "other", SAMPLES, train={"gradient_accumulation_steps": 2})
    found = []
    for _ in range(4):
        found.append(trainer.step())
        other.step()
    assert found == metrics
    assert torch.equal(parameters(trainer.lm), parameters(expected.lm))
    assert other.engine.state_dict()["scheduler"]["last_epoch"] == 4


def test_a_later_trainer_does_not_inherit_the_precision_of_the_first() -> None:
    TrainEngine(TrainConfig(mixed_precision="bf16"))
    with pytest.raises(ConfigError, match=r"`train.mixed_precision` = no, but an earlier trainer .* bf16"):
        TrainEngine(TrainConfig())
    with pytest.raises(ConfigError, match=r"start this trainer in a process of its own"):
        TrainEngine(TrainConfig(mixed_precision="no"))
    assert TrainEngine(TrainConfig(mixed_precision="bf16")).precision == "bf16"


def test_without_a_wish_the_launcher_decides_on_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert TrainEngine(TrainConfig()).precision == "bf16"


def test_a_wish_wins_over_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert TrainEngine(TrainConfig(mixed_precision="no")).precision == "no"


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 computes on a GPU")
def test_fp16_that_would_compute_in_float32_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"computes nothing in fp16 on a CPU: take bf16 or no"):
        TrainEngine(TrainConfig(mixed_precision="fp16"))


@pytest.mark.parametrize(
    ("variable", "value", "error", "message"),
    [
        ("ACCELERATE_USE_MEGATRON_LM", "true", DistributedError, "asks for Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", DistributedError, "tensor, context or sequence"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", ConfigError, "mixed precision fp8"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", ConfigError, "torch.compile .*leave `dynamo_config` out"),
    ],
)
def test_what_no_trainer_can_do_is_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, error: type[Exception], message: str
) -> None:
    check_environment()
    monkeypatch.setenv(variable, value)
    with pytest.raises(error, match=message):
        TrainEngine(TrainConfig())


def test_what_accelerate_itself_refuses_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ACCUMULATION, "four")
    with pytest.raises(ConfigError, match=r"^accelerate refuses its configuration: invalid .*'four'$"):
        TrainEngine(TrainConfig())


def test_a_deepspeed_file_counts_and_clips_as_the_run_says() -> None:
    plugin = SimpleNamespace(
        deepspeed_config={"gradient_accumulation_steps": 8, "train_batch_size": 64, "gradient_clipping": 0.1}
    )
    take_over_deepspeed(plugin, TrainConfig(gradient_accumulation_steps=2, max_grad_norm=3.0), 4)
    assert plugin.deepspeed_config == {
        "gradient_accumulation_steps": 2,
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": 8,
        "gradient_clipping": 3.0,
    }


@pytest.mark.parametrize("key", ["optimizer", "scheduler", "amp"])
def test_a_deepspeed_file_with_an_optimizer_of_its_own_is_refused(key: str) -> None:
    plugin = SimpleNamespace(deepspeed_config={key: {"type": "WarmupLR"}})
    with pytest.raises(ConfigError, match=f"DeepSpeed configuration has a section `{key}`: remove it"):
        take_over_deepspeed(plugin, TrainConfig(), 1)


# -------------------------------------------------------------------------------------- precision of weights


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_in_half_precision_are_not_trained(tmp_path: Path, dtype: str) -> None:
    """Adam's steps of 1e-6 round to nothing: a run would go on, and learn next to nothing."""
    message = rf"weights in {dtype} .* set `model.dtype=float32 train.mixed_precision=bf16`"
    lm = policy(dtype=getattr(torch, dtype))
    with pytest.raises(ConfigError, match=message):
        sft_trainer(tmp_path / "sft", SAMPLES, lm=lm)
    with pytest.raises(ConfigError, match=message):
        ppo_trainer(tmp_path / "ppo", lm=lm)
    settings = {"model": {"architecture": {"model_type": "gpt2"}, "dtype": dtype}}
    with pytest.raises(ConfigError, match=message):  # before a model of that size is made
        reward_trainer(tmp_path / "rm", [{"text": "a", "score": 1.0}], **settings)


def test_frozen_weights_may_be_in_half_precision() -> None:
    engine = TrainEngine(TrainConfig())
    engine.check_weights(
        ModelConfig(path="any", dtype="bfloat16", peft_config={"r": 2}),
    )
    module = torch.nn.ModuleDict({"base": torch.nn.Linear(2, 2).bfloat16(), "head": torch.nn.Linear(2, 1)})
    module["base"].requires_grad_(False)
    engine.prepare(module, OptimizerConfig(), SchedulerConfig(), total_updates=1)


# ----------------------------------------------------------------------------------------------- loss scaling


def test_an_overflow_in_fp16_is_reported_and_moves_nothing() -> None:
    """A fused optimizer skips such a step inside its kernel, where accelerate does not see it."""
    engine = TrainEngine(TrainConfig())
    # What accelerate sets up on a GPU.
    accelerator = engine.accelerator
    accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
    scaler = accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    head = torch.nn.Linear(1, 1)
    schedule = SchedulerConfig(name="linear")
    engine.prepare(head, OptimizerConfig(learning_rate=0.1), schedule, total_updates=10)
    before = parameters(engine.module)
    report = engine.update([torch.tensor([[1e6]])], lambda rows: engine.module(rows).float().sum())
    assert report.skipped and torch.equal(parameters(engine.module), before)
    assert scaler.get_scale() == 4.0
    assert engine.state_dict()["scheduler"]["last_epoch"] == 0
    report = engine.update([torch.ones(1, 1)], lambda rows: engine.module(rows).float().sum())
    assert not report.skipped and not torch.equal(parameters(engine.module), before)
    assert report.grad_norm == pytest.approx(2**0.5, rel=1e-3)  # of the loss, not of the scaled one
    assert engine.state_dict()["scheduler"]["last_epoch"] == 1


def test_deepspeed_is_left_to_watch_for_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TrainEngine(TrainConfig())
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.DEEPSPEED)
    engine.check_weights(ModelConfig(path="any", dtype="bfloat16"))
