"""Rewards of whole groups on two ranks and with sampling ahead: none is torn, lost or handed over twice."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from conch.training.overlap.ledger import ledger_faults, read_ledger
from tests.fakes.group_rewards import GroupSource, ranked
from tests.integration.groups_run import STEPS
from tests.integration.test_async_grpo import save
from tests.launches import finish, start, torchrun
from tests.runs import PROMPTS, TOKENIZER, async_grpo_trainer, policy
from tests.transformers_servers import served

RUN = "tests.integration.groups_run"


def submitted(folder: Path) -> list[list[tuple[str, int]]]:
    """For each rank, prompt and number of outputs of each submit."""
    ranks: list[list[tuple[str, int]]] = []
    for rank in range(2):
        rows = json.loads((folder / f"rank_{rank}.json").read_text())
        assert all(len(names) == 1 for names, _ in rows), "completions of two prompts in one submit"
        ranks.append([(names[0], len(outputs)) for names, outputs in rows])
    return ranks


def counted(ranks: list[list[tuple[str, int]]], size: int) -> Counter[str]:
    """How often each prompt came in a group of this size, on all ranks."""
    return Counter(prompt for rows in ranks for prompt, number in rows if number == size)


@pytest.mark.parametrize(
    ("name", "groups"), [("grpo", 4 * STEPS), pytest.param("rft", 5 * STEPS, marks=pytest.mark.slow)]
)
def test_ranks_hand_over_whole_groups(tmp_path: Path, name: str, groups: int) -> None:
    finish(start([*torchrun(2), "-m", RUN, str(tmp_path), name]))
    ranks = submitted(tmp_path)
    assert {number for rows in ranks for _, number in rows} == {4, 3}
    assert sum(counted(ranks, 4).values()) == groups
    # Before the first step and behind the last: each of five prompts once, whole, on one of the ranks.
    assert counted(ranks, 3) == Counter({prompt: 2 for prompt in PROMPTS[:5]})
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert last["reward/mean"] == last["eval/reward"] == pytest.approx(0.5)


@pytest.mark.slow
def test_asynchronous_ranks_hand_over_whole_groups(tmp_path: Path) -> None:
    with served(policy(), TOKENIZER) as first, served(policy(), TOKENIZER) as second:
        addresses = f"{first.address},{second.address}"
        finish(start([*torchrun(2), "-m", RUN, str(tmp_path), "async", addresses]))
    ranks = submitted(tmp_path)
    assert sum(counted(ranks, 4).values()) == 4 * STEPS, "each group once, though it was sampled ahead"
    assert {number for rows in ranks for _, number in rows} == {4, 3}
    assert ledger_faults(tmp_path / "run", len(PROMPTS)) == []


def test_resumed_run_asks_once_more_for_groups_that_were_whole_and_for_the_others_when_they_are(
    tmp_path: Path,
) -> None:
    source = GroupSource()

    def trainer(server: Any, reward: Any, **train: Any) -> Any:
        return async_grpo_trainer(
            tmp_path / "run",
            asynchronous={"max_staleness": 3},
            rollout={"urls": server.address},
            train={"total_steps": 7, "save_every": 2, **train},
            reward_fn=reward,
        )

    with served(policy(), TOKENIZER) as server:
        begun = trainer(server, GroupSource())
        with closing(begun):
            for _ in range(2):
                begun.step()
                begun.run.step += 1
            save(begun)
        resumed = trainer(server, source, resume=str(tmp_path / "run"))
        with closing(resumed):
            waiting = resumed.overlap.buffer.groups()
            assert len(waiting) == 6, "three steps of two groups were admitted ahead"
            waiting[0].rollouts.pop(1, None)  # as one that had not ended when the run was saved
            resumed.fit()
    assert all(len(names) == 1 and len(outputs) == 4 for names, outputs in source.submitted)
    assert len(source.submitted) == 2 * 5
    assert [line["position"] for line in read_ledger(tmp_path / "run")] == list(range(14))


def test_samplers_of_ray_and_a_function_of_groups(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"rollout": {"engine": "ray"}, "train": {"total_steps": 2}}
    with closing(async_grpo_trainer(tmp_path / "run", reward_fn=ranked, **settings)) as trainer:
        metrics = [trainer.step() for _ in range(2)]
    assert all(each["reward/mean"] == pytest.approx(0.5) for each in metrics)
    # One for each group of both steps; a step may ask ahead for the next one's.
    assert sum(each["reward/requests"] for each in metrics) == 2 * 2
