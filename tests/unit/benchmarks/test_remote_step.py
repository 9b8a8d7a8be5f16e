"""The benchmark of remote steps: no completion ends by itself, and the sides take turns."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import GPT2LMHeadModel

from benchmarks.policies import Case, dialogue_case
from benchmarks.remote_step import (
    APART,
    TOGETHER,
    Apart,
    Shape,
    Together,
    in_turns,
    never_end,
    reward_of,
    table,
    write_spec,
)
from conch.errors import ConchError, ServiceError, ServiceUnavailableError
from conch.service.protocol import TrainingSettings


@pytest.fixture(scope="module")
def case() -> Case:
    return dialogue_case(None, 8, 4, layers=1, width=64, max_prompt_tokens=24, max_new_tokens=24)


class Side:
    """Takes as long as it was told."""

    def __init__(self, name: str, tokens: int, *seconds: float) -> None:
        self.name = name
        self._tokens = tokens
        self._seconds = [*seconds]

    def take_block(self) -> tuple[float, int]:
        return self._seconds.pop(0), self._tokens


def test_policy_never_ends_by_itself(case: Case) -> None:
    model = case.model()
    assert isinstance(model, GPT2LMHeadModel)
    ids = torch.randint(0, 100, (4, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert model(ids).logits.softmax(-1)[..., case.eos_id].max() > 0
        never_end(model, case.eos_id)
        rest = model(ids).logits.softmax(-1)
    assert rest[..., case.eos_id].max() == 0
    assert rest.std() > 0


def test_settings_are_such_as_a_client_may_send(case: Case, tmp_path: Path) -> None:
    shape = Shape(2, 3, 4, block=5, rounds=6)
    spec: dict[str, Any] = json.loads(write_spec(tmp_path, case, shape, 1, 2).read_text())
    settings = TrainingSettings(**spec["settings"])
    assert (settings.prompts_per_step, settings.num_completions_per_prompt) == (2, 3)
    assert settings.max_steps == (6 + 2 + 1) * 5
    assert (spec["tokens"], len(spec["prompts"])) == (2 * 3 * 4, 2)
    assert (tmp_path / "model" / "config.json").exists()


def test_ratio_is_of_two_blocks_of_one_round_behind_the_warm_up() -> None:
    sides = [Side(APART, 24, 9.0, 1.1, 3.0), Side(TOGETHER, 24, 1.0, 1.0, 2.0)]
    found = in_turns(sides, rounds=2, warm_up=1, tokens=24)
    assert found["ratio"] == pytest.approx({"median": 1.3, "low": 1.1, "high": 1.5})
    assert found["milliseconds"]["low"] == pytest.approx(100)
    line = table({"results": [{"case": "walks", "completions": 6, **found}]}).splitlines()[2]
    assert line.startswith(
        "| walks | 6, 24 | 2.050 (1.100-3.000) | 1.500 (1.000-2.000) | 1.300 (1.100-1.500) |"
    )


def test_side_that_samples_other_tokens_ends_the_comparison() -> None:
    sides = [Side(APART, 23, 1.0), Side(TOGETHER, 24, 1.0)]
    with pytest.raises(ConchError, match="service sampled 23 tokens in a step instead of 24"):
        in_turns(sides, rounds=1, warm_up=0, tokens=24)


def test_reward_counts() -> None:
    assert reward_of(["abca", ""]) == [2.0, 0.0]


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    """A spec for fakes, which need no model: two prompts of two completions, two steps a block."""
    settings = {"model_id": "none", "training_batch_size": 2, "num_completions_per_prompt": 2}
    spec = {"scratch": str(tmp_path), "prompts": ["x", "y"], "block": 2, "threads": 1, "settings": settings}
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(spec))
    return file


@contextmanager
def ends_soon_and_leaves_no_process() -> Iterator[None]:
    before, started = {*psutil.Process().children()}, time.monotonic()
    yield
    assert time.monotonic() - started < 60
    assert {*psutil.Process().children()} - before == set()


def fake_service(what: str) -> list[str]:
    return [sys.executable, "-m", "tests.fakes.benchmark_service", what]


def test_service_takes_blocks(spec_file: Path) -> None:
    with ends_soon_and_leaves_no_process(), closing(Apart(spec_file, fake_service("learns"))) as side:
        assert [side.take_block()[1] for _ in range(2)] == [12, 12]


@pytest.mark.parametrize(
    ("what", "kind", "words"),
    [
        (
            "fails",
            ServiceError,
            "run run-1 is failed with a model of version 0 instead of 2: the loss is NaN",
        ),
        ("drops", ServiceError, "the service does not learn from a step's group: .*too old"),
        (
            "leaves",
            ServiceUnavailableError,
            "the service has ended with code -9: its log ends with\nno memory is left",
        ),
    ],
)
def test_service_that_does_not_learn_is_told(
    spec_file: Path, what: str, kind: type[ServiceError], words: str
) -> None:
    with (
        ends_soon_and_leaves_no_process(),
        closing(Apart(spec_file, fake_service(what))) as side,
        pytest.raises(kind, match=words),
    ):
        side.take_block()


def test_service_that_does_not_start_is_told(spec_file: Path) -> None:
    words = "the service has ended with code 3: its log ends with\nerror: there is no such folder"
    with ends_soon_and_leaves_no_process(), pytest.raises(ServiceUnavailableError, match=words):
        Apart(spec_file, fake_service("refuses"))


def test_trainer_that_is_killed_in_its_turn_is_told(spec_file: Path) -> None:
    dies = [sys.executable, "-c", "import os, sys; sys.stdin.readline(); os.kill(os.getpid(), 9)"]
    with (
        ends_soon_and_leaves_no_process(),
        closing(Together(spec_file, dies)) as side,
        pytest.raises(ConchError, match="the process of the trainer has ended with code -9"),
    ):
        side.take_block()
