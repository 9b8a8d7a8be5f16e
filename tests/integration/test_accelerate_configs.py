"""The files in `configs/accelerate`, each launched as it says itself, on CPU ranks.

ddp.yaml and fsdp2.yaml ask for GPUs; what they start, DDP's two ranks, is what the tests with torchrun run.
"""

from __future__ import annotations

import functools
import json
import math
from typing import Any

import pytest
import torch

from tests.launches import accelerate, finish, start

CLOCK = ("time/", "reward/latency", "reward/wait", "reward/hidden")
SOON = ("ilql", "ppo")
REST = ("sft", "reward_model", "rft", "grpo")

Found = dict[str, Any]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`launched(config, kinds)` -> what a run with that file found, by kind; each is run once."""

    @functools.cache
    def run(config: str, kinds: tuple[str, ...], num_processes: int = 2) -> dict[str, Found]:
        folder = tmp_path_factory.mktemp(config)
        program = ["-m", "tests.integration.launched_run", str(folder), str(num_processes), ",".join(kinds)]
        finish(start([*accelerate(config, num_processes), *program]))
        return json.loads((folder / "found.json").read_text())

    return run


def before_any_update(found: Found) -> list[dict[str, float]]:
    """Metrics of the first evaluation and the first step, without what depends on the clock. Later ones
    follow rounding errors, which make other samples."""
    return [
        {name: value for name, value in row.items() if not name.startswith(CLOCK)}
        for row in found["metrics"][:2]
    ]


def assert_whole(found: Found) -> None:
    assert found["num_processes"] == 2
    assert found["different"] == [] and found["equal"] > 20
    assert all(row.get("train/skipped_updates", 0.0) == 0.0 for row in found["metrics"])


@pytest.mark.slow  # DeepSpeed compiles an operator in each new environment
@pytest.mark.parametrize("kinds", [SOON, REST], ids=["soon", "rest"])
def test_zero3_finds_what_zero2_finds_and_saves_it(launched: Any, kinds: tuple[str, ...]) -> None:
    """Sharded weights change no sample, no evaluation of unequal shares, no update and no target network."""
    sharded, replicated = launched("zero3", kinds), launched("zero2-bf16", kinds)
    for kind in kinds:
        assert_whole(sharded[kind])
        assert_whole(replicated[kind])
        for row, expected in zip(
            before_any_update(sharded[kind]), before_any_update(replicated[kind]), strict=True
        ):
            assert row == pytest.approx(expected, rel=1e-2, abs=1e-4, nan_ok=True), kind
    if "ilql" in kinds:
        norms = sharded["ilql"]["norms"]
        assert norms["target_q_heads.0.out.weight"] > 0.01  # began at 0
        assert norms == pytest.approx(replicated["ilql"]["norms"], rel=0.05)


@pytest.mark.slow  # DeepSpeed compiles its CPU Adam for it
def test_offloaded_shards_find_what_zero2_finds(launched: Any) -> None:
    offloaded, replicated = launched("zero3-offload", SOON), launched("zero2-bf16", SOON)
    assert_whole(offloaded["ilql"])
    assert offloaded["ilql"]["norms"] == pytest.approx(replicated["ilql"]["norms"], rel=0.05)


@pytest.mark.slow
@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    reason="DeepSpeed refuses fp16 on a CPU without it",
)
def test_fp16_finds_what_bf16_finds(launched: Any) -> None:
    half, brain = launched("zero2-fp16", ("sft",)), launched("zero2-bf16", REST)
    assert_whole(half["sft"])
    for row, expected in zip(before_any_update(half["sft"]), before_any_update(brain["sft"]), strict=True):
        assert row == pytest.approx(expected, rel=1e-2)


def test_cpu_config_runs_one_process(launched: Any) -> None:
    found = launched("cpu", ("sft",), 1)["sft"]
    assert found["num_processes"] == 1 and found["different"] == []
    assert all(math.isfinite(row["eval/loss"]) for row in found["metrics"] if "eval/loss" in row)
