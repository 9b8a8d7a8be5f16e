"""Asynchronous GRPO on real samplers: at staleness 0 the synchronous run, its bound, its ledger, its
resume."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from conch.errors import CheckpointError, ConfigError, RolloutError, StuckError
from conch.rewards.function import FunctionReward
from conch.rewards.verifiers.base import Verdict, Verifier
from conch.rollouts.remote.client import ServerClient
from conch.training.overlap.ledger import ledger_faults, read_ledger
from conch.types import Metrics
from tests.footprint import wait_until
from tests.runs import PROMPTS, TOKENIZER, async_grpo_trainer, grpo_trainer, parameters, policy, vowels
from tests.transformers_servers import served

STEPS = 6
LEARNS = {"optimizer": {"learning_rate": 0.01}, "grpo": {"minibatches": 2, "kl": {"coef": 0.05}}}


def comparable(metrics: Metrics) -> Metrics:
    """What does not tell of time, nor in how many pieces rewards were asked for."""
    timed = ("time/", "async/", "staleness/", "reward/latency", "reward/wait", "reward/hidden")
    timed += ("reward/in_flight", "reward/requests")
    return {name: value for name, value in metrics.items() if not name.startswith(timed)}


def run(trainer: Any, steps: int = STEPS) -> tuple[list[Metrics], torch.Tensor]:
    """Metrics of each step, and the weights at the end."""
    with closing(trainer):
        metrics = [comparable(trainer.step()) for _ in range(steps)]
        return metrics, parameters(trainer.module)


def slow_where_long(outputs: Sequence[str], **_: Any) -> list[float]:
    """A reward that takes longer the longer an output is."""
    time.sleep(0.01 * max(map(len, outputs)))
    return vowels(outputs)


def test_staleness_0_is_the_synchronous_run_bit_for_bit(tmp_path: Path) -> None:
    settings = {**LEARNS, "rollout": {"engine": "ray"}, "train": {"total_steps": STEPS}}
    kept = {"grpo": {**LEARNS["grpo"], "correction": {"kind": "truncate"}}}
    synchronous = run(grpo_trainer(tmp_path / "sync", **{**settings, **kept}))
    overlapped = run(async_grpo_trainer(tmp_path / "async", asynchronous={"max_staleness": 0}, **settings))
    assert overlapped[0] == synchronous[0]
    assert torch.equal(overlapped[1], synchronous[1])
    assert not torch.equal(synchronous[1], parameters(policy()))


@pytest.mark.parametrize(("staleness", "every", "partial"), [(1, 1, False), (2, 3, False), (3, 1, True)])
def test_samples_are_as_old_as_allowed_and_no_older(
    tmp_path: Path, staleness: int, every: int, partial: bool
) -> None:
    overlap = {"max_staleness": staleness, "sync_every": every, "partial_rollouts": partial}
    with served(policy(), TOKENIZER) as server:
        trainer = async_grpo_trainer(
            tmp_path / "run",
            asynchronous=overlap,
            rollout={"urls": server.address},
            train={"total_steps": 10},
            reward_fn=slow_where_long,
            **LEARNS,
        )
        with closing(trainer):
            trainer.fit()
    lines = read_ledger(tmp_path / "run")
    ages = [line["step"] - 1 - version for line in lines for version in line["versions"]]
    assert 0 < max(ages) <= staleness
    assert ledger_faults(tmp_path / "run", len(PROMPTS)) == []
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= line["staleness/mean"] <= line["staleness/max"] <= staleness for line in logged[1:])


def test_long_answers_with_slow_rewards_are_learned_from_as_often_as_sampled(tmp_path: Path) -> None:
    with served(policy(), TOKENIZER) as server:
        trainer = async_grpo_trainer(
            tmp_path / "run",
            asynchronous={"max_staleness": 4},
            rollout={"urls": server.address},
            train={"total_steps": 8},
            reward_fn=FunctionReward(slow_where_long),
        )
        with closing(trainer):
            distances = [trainer.step()["async/length_distance"] for _ in range(8)]
    assert all(0 <= distance <= 1 for distance in distances)
    assert distances[-1] == 0.0, "the run has ended: all that was sampled was learned from"


def test_resumed_run_learns_from_each_prompt_once(tmp_path: Path) -> None:
    def trainer(server: Any, **train: Any) -> Any:
        return async_grpo_trainer(
            tmp_path / "run",
            asynchronous={"max_staleness": 3},
            rollout={"urls": server.address},
            train={"total_steps": 9, "save_every": 1, **train},
            **LEARNS,
        )

    with served(policy(), TOKENIZER) as server:
        begun = trainer(server)
        with closing(begun):
            for _ in range(2):
                begun.step()
                begun.run.step += 1
            save(begun)
            kept = parameters(begun.module)
            begun.step()  # after the checkpoint: is done again
        resumed = trainer(server, resume=str(tmp_path / "run"))
        with closing(resumed):
            assert torch.equal(parameters(resumed.module), kept)
            waiting = [group.admission.number for group in resumed.overlap.buffer.groups()]
            assert waiting == [4, 5, 6, 7, 8, 9], "three steps of two groups were admitted ahead"
            resumed.fit()
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["async/length_distance"] == 0.0, "all that was sampled was learned from"
    lines = read_ledger(tmp_path / "run")
    assert [line["position"] for line in lines] == list(range(18))
    assert ledger_faults(tmp_path / "run", len(PROMPTS)) == []


def test_trainer_whose_run_has_ended_keeps_no_sampler_busy_and_goes_on_where_it_is_told_to(
    tmp_path: Path,
) -> None:
    with served(policy(), TOKENIZER) as server:
        trainer = async_grpo_trainer(
            tmp_path / "run", rollout={"urls": server.address}, train={"total_steps": 2}, **LEARNS
        )
        with closing(trainer):
            trainer.fit()
            assert not {thread.name for thread in threading.enumerate()} & {"stream", "watchdog"}
            assert trainer.generate(["ab"])
            trainer.step()  # one more than the run was to have
    assert [line["step"] for line in read_ledger(tmp_path / "run")] == [1, 1, 2, 2, 3, 3]


def test_samplers_count_from_the_first_step_on(tmp_path: Path) -> None:
    trainers: list[Any] = []

    def reward(outputs: Sequence[str], **_: Any) -> list[float]:
        """Wait until the sampler has told of itself since the step began."""
        server = trainers[0].overlap._stream._pool.servers[0]
        told = server.health
        wait_until(lambda: server.health is not told, lambda: "the sampler tells nothing")
        return vowels(outputs)

    with served(policy(), TOKENIZER) as server:
        trainer = async_grpo_trainer(tmp_path / "run", rollout={"urls": server.address}, reward_fn=reward)
        trainers.append(trainer)
        with closing(trainer):
            assert 0 <= trainer.step()["async/sampler_idle_fraction"] < 1


def save(trainer: Any) -> None:
    from conch.training.checkpointing import save_checkpoint

    save_checkpoint(trainer)


def test_checkpoint_of_the_synchronous_trainer_is_refused(tmp_path: Path) -> None:
    with closing(grpo_trainer(tmp_path / "run", train={"total_steps": 1})) as trainer:
        trainer.fit()
    with served(policy(), TOKENIZER) as server, pytest.raises(CheckpointError, match="is of a GRPORunConfig"):
        async_grpo_trainer(
            tmp_path / "run", rollout={"urls": server.address}, train={"resume": str(tmp_path / "run")}
        )


def test_dead_samplers_end_the_run_in_words(tmp_path: Path) -> None:
    with served(policy(), TOKENIZER) as server:
        trainer = async_grpo_trainer(
            tmp_path / "run", rollout={"urls": server.address, "deadline_s": 3}, train={"total_steps": 50}
        )
        with closing(trainer):
            trainer.step()
            server.stop()
            with pytest.raises(RolloutError, match=server.address):
                for _ in range(49):
                    trainer.step()


def test_prompt_too_long_for_the_servers_is_told_at_the_first_step(tmp_path: Path) -> None:
    """Though its turn comes in a later one."""
    with served(policy(), TOKENIZER, max_model_len=12) as server:
        trainer = async_grpo_trainer(
            tmp_path / "run",
            rollout={"urls": server.address},
            prompts=["a"] * 100 + ["abcdefgh"],
            train={"total_steps": 60},
        )
        with closing(trainer), pytest.raises(ConfigError, match="a prompt of 8 tokens"):
            trainer.step()


class NeverEnds(Verifier[str]):
    """A check that waits for what the test does at its end."""

    name = "never_ends"
    columns = ()

    def __init__(self, released: threading.Event) -> None:
        self._released = released

    def read_key(self, row: Mapping[str, Any]) -> str:
        return ""

    def verify(self, completion: str, key: str) -> Verdict:
        self._released.wait()
        return Verdict({"answer": 0.0})


def never_returns(released: threading.Event) -> Callable[..., list[float]]:
    def reward(outputs: Sequence[str], **_: Any) -> list[float]:
        released.wait()
        return vowels(outputs)

    return reward


@pytest.mark.parametrize(
    ("reward_of", "line"),
    [(never_returns, "in reward"), (NeverEnds, "in verify")],
    ids=["function", "verifier"],
)
def test_a_reward_that_does_not_return_ends_the_run_with_its_stack(
    tmp_path: Path, reward_of: Callable[[threading.Event], Any], line: str
) -> None:
    released = threading.Event()
    with served(policy(), TOKENIZER) as server:
        trainer = async_grpo_trainer(
            tmp_path / "run",
            rollout={"urls": server.address},
            asynchronous={"deadline_s": 5.0},
            reward_fn=reward_of(released),
        )
        with closing(trainer):
            with pytest.raises(
                StuckError, match=r"nothing has moved on rank 0 .* waits for the rewards of 8"
            ):
                trainer.step()
            released.set()
    assert line in (tmp_path / "run" / "stuck" / "rank_0.txt").read_text()


def test_nothing_has_to_move_between_steps(tmp_path: Path) -> None:
    """`conch.train` returns a trainer that nobody has closed, and that its user keeps."""
    with served(policy(), TOKENIZER) as server:
        trainer = async_grpo_trainer(
            tmp_path / "run",
            rollout={"urls": server.address},
            asynchronous={"deadline_s": 2.0},
            train={"total_steps": 2},
        )
        with closing(trainer):
            trainer.step()
            time.sleep(4)
            trainer.step()
    assert not (tmp_path / "run" / "stuck").exists()


def test_steps_beyond_the_last_are_made(tmp_path: Path) -> None:
    with served(policy(), TOKENIZER) as server:
        trainer = async_grpo_trainer(
            tmp_path / "run", rollout={"urls": server.address}, train={"total_steps": 2}
        )
        with closing(trainer):
            for _ in range(4):
                trainer.step()
    assert [line["step"] for line in read_ledger(tmp_path / "run")] == [1, 1, 2, 2, 3, 3, 4, 4]


def test_completions_outside_of_training_leave_the_present_weights_in_the_sampler(tmp_path: Path) -> None:
    """The stream would send its own, older ones back."""
    with served(policy(), TOKENIZER) as server, closing(ServerClient(server.address, 10.0)) as client:
        trainer = async_grpo_trainer(
            tmp_path / "run", rollout={"urls": server.address}, train={"total_steps": 4}
        )
        with closing(trainer):
            trainer.step()
            trainer.generate(["a", "bc"])
            time.sleep(3)
            weights = client.health().weights
    assert weights is not None and weights.version == 1


def test_evaluation_at_staleness_0_is_that_of_the_synchronous_run(tmp_path: Path) -> None:
    def rows(name: str) -> list[Metrics]:
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [comparable(json.loads(line)) for line in lines]

    kept = {"grpo": {**LEARNS["grpo"], "correction": {"kind": "truncate"}}}
    with served(policy(), TOKENIZER) as server:
        settings = {
            **LEARNS,
            "rollout": {"urls": server.address},
            "train": {"total_steps": 4, "eval_every": 2},
            "eval_prompts": ["a", "bc"],
        }
        overlap = {"max_staleness": 0}
        with closing(async_grpo_trainer(tmp_path / "async", asynchronous=overlap, **settings)) as trainer:
            trainer.fit()
        with closing(grpo_trainer(tmp_path / "sync", **{**settings, **kept})) as trainer:
            trainer.fit()
    assert "eval/reward" in rows("async")[0]
    assert rows("async") == rows("sync")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rollout": {"engine": "hf"}}, "which then do not train"),
        ({"asynchronous": {"max_staleness": -1}}, "asynchronous.max_staleness"),
        ({"asynchronous": {"max_staleness": 1, "sync_every": 3}}, "take at most 2"),
        ({"grpo": {"max_resamples": 2}}, "throws nothing away"),
    ],
)
def test_bad_settings_are_one_sentence(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        async_grpo_trainer(tmp_path / "run", **settings)
