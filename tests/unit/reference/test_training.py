"""Runs whose reference is on servers are the runs that keep it: the same numbers to the last bit."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from conch.errors import CheckpointError, ReferenceServerError, ReferenceUnavailableError
from conch.reference.digest import weights_digest
from conch.reference.remote import RemoteReference
from conch.types import Metrics
from tests.launches import free_port
from tests.reference_servers import served
from tests.runs import grpo_trainer, parameters, policy, ppo_trainer
from tests.tiny import tiny_decoder

STEPS = 2
RATE = {"learning_rate": 0.01}
LEARNING = {"optimizer": RATE}
IN_REWARD = {"kl": {"coef": 0.1, "placement": "reward"}}
IN_LOSS = {"kl": {"coef": 0.1, "placement": "loss"}}
GRPO = {"prompts_per_step": 2, "group_size": 4, "forward_batch_size": 3}
CASES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "ppo": (ppo_trainer, {}),
    "ppo, KL in the loss": (ppo_trainer, {"ppo": IN_LOSS}),
    "ppo, top block": (ppo_trainer, {"model": {"num_layers_unfrozen": 1}}),
    "ppo, all blocks but embeddings": (ppo_trainer, {"model": {"num_layers_unfrozen": 2}}),
    "ppo, temperature": (ppo_trainer, {"generation": {"temperature": 0.7}}),
    "grpo, one update": (grpo_trainer, {"grpo": {**GRPO, **IN_LOSS, "minibatches": 1}}),
    "grpo, two updates": (grpo_trainer, {"grpo": {**GRPO, **IN_LOSS, "minibatches": 2}}),
    "grpo, KL in the reward": (grpo_trainer, {"grpo": {**GRPO, **IN_REWARD, "minibatches": 1}}),
}
ADAPTER = {"model": {"peft_config": {"r": 4, "target_modules": ["q_proj"]}, "merge_adapter": True}}


def timeless(metrics: Metrics) -> Metrics:
    """What does not depend on the clock."""
    clocked = ("time/", "reward/wait_s", "reward/latency", "reward/hidden_fraction")
    return {name: value for name, value in metrics.items() if not name.startswith(clocked)}


def outcome(trainer: Any, steps: int = STEPS) -> tuple[list[Metrics], torch.Tensor]:
    """Metrics of some steps and an evaluation, and the weights after them."""
    metrics = [timeless(trainer.step()) for _ in range(steps)]
    metrics.append(timeless(trainer.evaluate()))
    weights = parameters(trainer.module)
    trainer.close()
    return metrics, weights


def on_servers(*servers: Any, **settings: Any) -> dict[str, Any]:
    return {"reference": {"urls": ",".join(server.address for server in servers), **settings}}


@pytest.mark.parametrize("name", CASES)
def test_run_on_servers_is_the_run_that_keeps_its_reference(name: str, tmp_path: Path) -> None:
    make, settings = CASES[name]
    settings = {**LEARNING, **settings, "eval_prompts": ["a", "bc", "d"]}
    kept = outcome(make(tmp_path / "kept", **settings))
    with served(policy()) as one, served(policy()) as other:
        remote = outcome(make(tmp_path / "served", **settings, **on_servers(one, other)))
        assert one.requests > 1 and other.requests > 1, "the servers share the micro-batches"
    assert remote[0] == kept[0]
    assert torch.equal(remote[1], kept[1])
    first, last = remote[0][0]["policy/kl"], remote[0][STEPS - 1]["policy/kl"]
    # The one update reads all rows at once, the reference three at a time, wherever it is.
    assert (abs(first) < 1e-12 if name == "grpo, one update" else first == 0.0) and last != first


def test_run_of_an_adapter_on_a_server_is_the_run_that_switches_it_off(tmp_path: Path) -> None:
    settings = {**LEARNING, **ADAPTER}

    def lm() -> PreTrainedModel:
        return tiny_decoder("llama", vocab_size=11, pad_token_id=8, eos_token_id=9)

    kept = outcome(ppo_trainer(tmp_path / "kept", lm=lm(), **settings))
    with served(lm()) as server:
        assert (
            outcome(ppo_trainer(tmp_path / "served", lm=lm(), **settings, **on_servers(server)))[0] == kept[0]
        )


def test_mixed_precision_is_that_of_the_trainer(tmp_path: Path, fresh_accelerate: None) -> None:
    settings = {**LEARNING, "train": {"mixed_precision": "bf16"}}

    def lm() -> PreTrainedModel:
        return policy(dtype=torch.float32)

    kept = outcome(ppo_trainer(tmp_path / "kept", lm=lm(), **settings))
    with served(lm()) as server:
        assert (
            outcome(ppo_trainer(tmp_path / "served", lm=lm(), **settings, **on_servers(server)))[0] == kept[0]
        )
    assert kept[0][0]["policy/kl"] == 0.0


def test_servers_that_nothing_is_asked_of_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = grpo_trainer(tmp_path, grpo={**GRPO, "kl": {"coef": 0.0}}, reference={"urls": "127.0.0.1:1"})
    assert trainer.reference is None and "`reference.urls` is not asked" in caplog.text
    trainer.close()


def test_a_served_run_keeps_no_copy(tmp_path: Path) -> None:
    with served(policy()) as server:
        trainer = ppo_trainer(tmp_path, **on_servers(server))
        assert isinstance(trainer.reference, RemoteReference)
        assert not [each for each in vars(trainer.reference).values() if isinstance(each, torch.nn.Module)]
        assert "time/reference_s" in trainer.step()
        trainer.close()


def test_policy_runs_while_servers_compute(tmp_path: Path) -> None:
    """The server answers no part before the policy has run over all of them: nobody waits in between."""
    with served(policy()) as server:
        trainer = ppo_trainer(tmp_path, **on_servers(server))
        passes, gate = [], threading.Event()
        trainer.module.register_forward_hook(lambda *_: gate.set() if len(passes) == 2 else passes.append(1))
        answer = server.server.logprobs

        def late(*arguments: Any) -> torch.Tensor:
            assert gate.wait(60), "the policy waits for the reference"
            return answer(*arguments)

        server.server.logprobs = late  # pyright: ignore[reportAttributeAccessIssue]
        rollouts = trainer.rollout(trainer.next_prompts(8))
        outputs = trainer.compute_logprobs(rollouts)
        assert outputs.logprobs is not None and outputs.ref_logprobs is not None
        assert torch.equal(outputs.logprobs, outputs.ref_logprobs)
        trainer.close()


# ---------------------------------------------------------------------------------------------- other models


def other_weights() -> PreTrainedModel:
    lm = policy()
    with torch.no_grad():
        next(lm.parameters())[3, 3] += 1e-7  # no sample would tell
    return lm


@pytest.mark.parametrize(
    ("lm", "complaint"),
    [
        (other_weights, r"holds another model than the policy that this run starts from .* `model.path`"),
        (
            lambda: policy(dtype=torch.float32),
            r"holds its weights in float32, .* start it with `dtype=float64`",
        ),
        (lambda: tiny_decoder("gpt2"), r"holds a model of 24 tokens, the policy knows 11"),
    ],
)
def test_another_model_is_refused_before_training(
    lm: Callable[[], PreTrainedModel], complaint: str, tmp_path: Path
) -> None:
    with (
        served(policy()) as right,
        served(lm()) as wrong,
        pytest.raises(ReferenceServerError, match=complaint),
    ):
        grpo_trainer(tmp_path / "run", grpo={**GRPO, **IN_LOSS}, **on_servers(right, wrong))


def test_same_weights_that_compute_otherwise_are_refused(tmp_path: Path) -> None:
    with served(policy()) as server:
        answer = server.server.logprobs
        server.server.logprobs = lambda *args: answer(*args) + 0.1  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(ReferenceServerError, match=r"log-probs differ by 0\.1 nats"):
            ppo_trainer(tmp_path / "run", **on_servers(server))


def test_server_that_comes_back_with_another_model_is_refused(tmp_path: Path) -> None:
    port = free_port()
    with served(policy(), port=port) as server:
        trainer = ppo_trainer(tmp_path, **on_servers(server))
        trainer.step()
    with (
        served(other_weights(), port=port),
        pytest.raises(
            ReferenceServerError, match=r"holds another model than the policy that this run started from"
        ),
    ):
        trainer.step()
    trainer.close()


def test_resumed_run_asks_for_the_policy_of_the_very_start(tmp_path: Path) -> None:
    train: dict[str, Any] = {"total_steps": 4, "save_every": 2, "run_dir": tmp_path / "run"}
    settings: dict[str, Any] = {**LEARNING, "train": train}
    with served(policy()) as server:
        apart = {"train": {**train, "run_dir": tmp_path / "whole"}}
        whole = ppo_trainer(tmp_path / "whole", **{**settings, **apart}, **on_servers(server))
        whole.fit()
        weights = parameters(whole.module)
        whole.close()
        shorter = {"train": {**train, "total_steps": 2}}
        first = ppo_trainer(tmp_path / "run", **{**settings, **shorter}, **on_servers(server))
        first.fit()
        first.close()
        resume: dict[str, Any] = {
            "train": {**train, "resume": str(tmp_path / "run" / "checkpoints" / "step_2")}
        }
        second = ppo_trainer(tmp_path / "run", **{**settings, **resume}, **on_servers(server))
        second.fit()
        assert torch.equal(parameters(second.module), weights)
        second.close()
    moved = other_weights()
    with served(moved) as server, pytest.raises(CheckpointError, match="started from"):
        again: dict[str, Any] = {**settings, **resume, **on_servers(server)}
        ppo_trainer(tmp_path / "run", lm=copy.deepcopy(moved), **again)


# ---------------------------------------------------------------------------------------- servers go and come


def test_one_server_takes_over_from_another(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = outcome(ppo_trainer(tmp_path / "kept", optimizer=RATE))
    with served(policy()) as stays, served(policy()) as goes:
        trainer = ppo_trainer(tmp_path / "served", optimizer=RATE, **on_servers(stays, goes))
        metrics = [timeless(trainer.step())]
        goes.stop()
        metrics += [timeless(trainer.step()) for _ in range(STEPS - 1)]
        assert metrics == kept[0][:STEPS]
        assert torch.equal(parameters(trainer.module), kept[1])
        assert caplog.text.count("reference server lost") == 1
        trainer.close()


def test_all_away_ends_with_an_error_at_the_deadline(tmp_path: Path) -> None:
    with served(policy()) as server:
        trainer = ppo_trainer(tmp_path, **on_servers(server, deadline_s=1.0))
    started = time.monotonic()
    with pytest.raises(ReferenceUnavailableError, match=r"`reference.deadline_s` = 1: .* does not answer"):
        trainer.step()
    assert time.monotonic() - started < 60
    trainer.close()


def test_server_that_hangs_is_left_for_the_next(tmp_path: Path) -> None:
    with served(policy()) as stays, served(policy()) as hangs:
        trainer = ppo_trainer(tmp_path, **on_servers(stays, hangs, request_timeout_s=1.0))
        gate, answer = threading.Event(), hangs.server.logprobs

        def hang(*arguments: Any) -> torch.Tensor:
            gate.wait(60)
            return answer(*arguments)

        hangs.server.logprobs = hang  # pyright: ignore[reportAttributeAccessIssue]
        assert trainer.step()["policy/kl"] == 0.0
        gate.set()
        trainer.close()


def test_nobody_there_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(
        ReferenceUnavailableError,
        match=r"no server of `reference.urls` answers: .*conch reference-server model=",
    ):
        ppo_trainer(tmp_path / "run", reference={"urls": f"127.0.0.1:{free_port()}"})


# ----------------------------------------------------------------------------------------------------- digest


def test_digest_is_of_values_names_and_precision() -> None:
    lm = policy()
    digest = weights_digest(lm)
    assert weights_digest(policy()) == digest
    assert len({digest, weights_digest(other_weights()), weights_digest(policy(dtype=torch.float32))}) == 3
