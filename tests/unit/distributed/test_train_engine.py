from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from conch.config import TrainConfig
from conch.distributed.launch_settings import check_kind, check_operators_folder
from conch.distributed.train_engine import TrainEngine
from conch.errors import ConfigError, DistributedError
from conch.training.setup import rows_of_rank


def test_a_batch_is_cut_into_ranks_minibatches_and_micro_batches() -> None:
    assert rows_of_rank(128, "ppo.rollouts_per_step", ranks=2, minibatches=4, steps=8) == 64
    assert rows_of_rank(7, "sft.batch_size", ranks=7, minibatches=1, steps=1) == 1


@pytest.mark.parametrize(
    ("total", "ranks", "minibatches", "steps", "message"),
    [
        (10, 4, 1, 1, "`ppo.n` = 10 does not divide among 4 processes: take 8 or 12"),
        (3, 4, 1, 2, "`ppo.n` = 3 does not divide among 4 processes: take 8"),
        (
            12,
            2,
            1,
            4,
            "`ppo.n` = 12 gives each of 2 processes 6 rows, which do not divide into "
            "`train.gradient_accumulation_steps` = 4: take 8 or 16",
        ),
        (
            30,
            3,
            4,
            1,
            "`ppo.n` = 30 gives each of 3 processes 10 rows, which do not divide into `ppo.minibatches` = 4 "
            "times `train.gradient_accumulation_steps` = 1: take 24 or 36",
        ),
    ],
)
def test_a_batch_that_does_not_come_out_whole_is_refused_with_the_nearest(
    total: int, ranks: int, minibatches: int, steps: int, message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        rows_of_rank(total, "ppo.n", ranks, minibatches, steps)
    assert str(refused.value) == message


def test_fsdp_is_refused_with_what_to_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    check_kind(DistributedType.DEEPSPEED)
    with pytest.raises(DistributedError, match=r"^FSDP keeps .* configs/accelerate/zero3\.yaml"):
        check_kind(DistributedType.FSDP)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(DistributedError, match=r"^FSDP keeps"):  # what it becomes on CPUs
        check_kind(DistributedType.MULTI_CPU)


def test_operators_that_could_not_be_built_are_refused_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "new" / "folder"))
    check_operators_folder()
    # Nobody, not even root, has leave to write there.
    monkeypatch.setattr("os.access", lambda path, mode: not Path(path).is_relative_to(tmp_path))
    with pytest.raises(ConfigError, match=r"in .*new/folder, .* set TORCH_EXTENSIONS_DIR to a folder"):
        check_operators_folder()


def test_until_it_is_prepared_a_model_is_whole_under_deepspeed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward model's scores are measured before training, to normalise its head."""
    engine = TrainEngine(TrainConfig())
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.DEEPSPEED)
    head = torch.nn.Linear(1, 1)
    with engine.gathered_weights(), engine.writable_weights(head), torch.no_grad():
        head.weight.fill_(2.0)
    assert head(torch.ones(1)) - head.bias == 2.0
