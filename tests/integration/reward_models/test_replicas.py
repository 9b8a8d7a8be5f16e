"""Public reward models are converted by the command that the docs name, and score as their cards say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conch.converters.to_triton import to_triton
from conch.converters.triton_models.reward_model import Scorer
from conch.errors import ConversionError
from tests.integration.reward_models.chats import CHATS
from tests.integration.reward_models.heads import HEADS
from tests.integration.reward_models.processes import PROCESSES
from tests.integration.reward_models.replica import Replica

REPLICAS = (*CHATS, *HEADS, *PROCESSES)
TOLERANCE = 1e-4

USUAL = (
    "Skywork-Reward Llama-3.1",  # a classifier of its own template
    "InternLM2-reward",  # a class of the checkpoint's own
    "OpenRLHF value_head",
    "TRL value head",
    "a pickled head beside a trunk",
    "UltraRM-13b",  # text of its own form
    "Eurus-RM-7b",
    "Starling-RM-7B-alpha",
    "AlpacaFarm reward-model-human",
    "beaver cost",
    "cross-encoder (BERT)",
    "QRM-Llama3",  # several objectives of quantiles
    "Nemotron-70B-Reward-HF",  # the logit of a token
    "Skywork-o1-Open-PRM",  # steps
)
"""One of each mechanism beside those of test_replicas_served.py; all others are slow."""


def _cases() -> list[Any]:
    names = [replica.name for replica in REPLICAS if not replica.refused]
    assert set(USUAL) <= set(names), set(USUAL) - set(names)
    return [
        pytest.param(replica, marks=[] if replica.name in USUAL else [pytest.mark.slow])
        for replica in REPLICAS
        if not replica.refused
    ]


@pytest.mark.parametrize("replica", _cases(), ids=lambda each: each.name)
def test_a_public_reward_model_scores_as_its_card_says(tmp_path: Path, replica: Replica) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    pipeline = replica.build(folder)

    conversion = to_triton(folder, name="judge", model_store=tmp_path / "store", **replica.options(folder))

    assert conversion.path is not None
    texts = [json.dumps({"messages": messages}) for messages in replica.dialogues]
    # The conversion ran the version in its own process; test_replicas_served.py asks the real server.
    scorer = Scorer(conversion.path, "cpu")
    scores = scorer.score(scorer.rows_from_texts([text.encode() for text in texts])).rewards
    for served, messages in zip(scores.tolist(), replica.dialogues, strict=True):
        assert served == pytest.approx(pipeline(messages), abs=TOLERANCE)


@pytest.mark.parametrize("replica", [each for each in REPLICAS if each.refused], ids=lambda each: each.name)
def test_a_model_that_cannot_score_an_answer_is_refused_for_its_reason(
    tmp_path: Path, replica: Replica
) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    replica.build(folder)
    with pytest.raises(ConversionError, match=replica.refused):
        to_triton(folder, name="judge", model_store=tmp_path / "store", **replica.options(folder))
