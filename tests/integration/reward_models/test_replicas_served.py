"""Public reward models, from the checkpoint to the score that a trainer gets of the real server."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conch.config import RewardConfig, load
from conch.converters.to_triton import to_triton
from conch.rewards.served import TritonReward
from conch.serving.server.server import TritonServer
from conch.store.store import read_model
from conch.types import Completion, Dialogue, Prompt, Rollout
from tests.chats import chat_tokenizer
from tests.integration.reward_models.chats import CHATS
from tests.integration.reward_models.heads import HEADS
from tests.integration.reward_models.processes import PROCESSES
from tests.integration.reward_models.replica import Messages, Pipeline, Replica

REPLICAS = tuple(replica for replica in (*CHATS, *HEADS, *PROCESSES) if not replica.refused)
TOLERANCE = 1e-4
DEADLINE_S = 120.0
CONFIG = load(RewardConfig, {"client": {"deadline_s": DEADLINE_S, "request_timeout_s": DEADLINE_S}})
POLICY = chat_tokenizer("chatml")

USUAL = (
    "OASST reward-model-deberta-v3-large-v2",  # pairs of sentences
    "Athene-RM",  # a closing token that is read, and two bos
    "beaver reward, normalised",  # mean and std in buffers
    "Qwen2.5-Math-PRM",  # steps, divided by what a policy writes; two layers
    "Math-Shepherd PRM",  # logits of tokens
    "ArmoRM",  # a class of its own
)
"""One of each mechanism; all others are slow."""

OF_A_SERVER = 6
"""Each model is a process of half a gigabyte."""


def _groups() -> list[tuple[Replica, ...]]:
    """Return what one server has: first the usual ones, then the others in their order."""
    others = [replica for replica in REPLICAS if replica.name not in USUAL]
    cut = [tuple(others[first : first + OF_A_SERVER]) for first in range(0, len(others), OF_A_SERVER)]
    return [tuple(replica for replica in REPLICAS if replica.name in USUAL), *cut]


GROUPS = _groups()


@dataclass(frozen=True)
class Served:
    """A server, and what each of its models should score."""

    store: Path
    server: TritonServer
    pipelines: dict[str, Pipeline]


@pytest.fixture(scope="module")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of the group with this number."""
    root = tmp_path_factory.mktemp("replicas")
    store, pipelines = root / "store", {}
    for replica in GROUPS[request.param]:
        folder = root / model_of(replica) / "checkpoint"
        folder.mkdir(parents=True)
        pipelines[replica.name] = replica.build(folder)
        to_triton(folder, name=model_of(replica), model_store=store, **replica.options(folder))
    models = [model_of(replica) for replica in GROUPS[request.param]]
    with TritonServer(store, models, ready_timeout_s=600.0) as server:
        yield Served(store, server, pipelines)


def model_of(replica: Replica) -> str:
    """Return its name in the store."""
    return f"replica-{REPLICAS.index(replica)}"


def rollout(messages: Messages) -> Rollout:
    """As a ChatML policy samples the last message."""
    asked: list[Any] = messages[:-1]
    text = str(POLICY.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
    prompt = Prompt(
        text, tuple(POLICY(text, add_special_tokens=False).input_ids), dialogue=Dialogue(tuple(asked))
    )
    return Rollout(prompt, Completion(messages[-1]["content"], (5,), (0.0,), "eos"), 0)


@pytest.mark.parametrize(
    ("served", "replica"),
    [
        pytest.param(number, replica, id=replica.name, marks=[pytest.mark.slow] if number else [])
        for number, group in enumerate(GROUPS)
        for replica in group
    ],
    indirect=["served"],
    scope="module",  # that of the arguments, else each test had a server of its own
)
def test_a_trainer_gets_the_scores_of_a_public_reward_models_card(served: Served, replica: Replica) -> None:
    batch = [rollout(messages) for messages in replica.dialogues]
    with TritonReward(served.server.endpoint(model_of(replica)), CONFIG) as source:
        source.check()
        source.check_prompts([each.prompt for each in batch])
        results = source.submit(batch).result(DEADLINE_S)

    names = read_model(served.store, model_of(replica)).spec.reward_names
    for result, messages in zip(results, replica.dialogues, strict=True):
        assert result.ok, result.detail
        scores = [result.scores[name] for name in names]
        assert scores == pytest.approx(served.pipelines[replica.name](messages), abs=TOLERANCE)


def test_every_replica_that_can_be_served_is_of_one_server() -> None:
    assert sorted(USUAL) == sorted(replica.name for replica in GROUPS[0])
    grouped = [replica.name for group in GROUPS for replica in group]
    assert sorted(grouped) == sorted(replica.name for replica in REPLICAS)
    assert len(set(grouped)) == len(grouped)
