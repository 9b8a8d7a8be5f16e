"""Dialogues on their way to a reward model: what is sent, to whom, and what is refused before a run."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from conch.config import RewardConfig, load
from conch.errors import ConfigError
from conch.rewards.client.cache import ModelIdentity, ScoreCache
from conch.rewards.client.client import PROBE, make_row
from conch.rewards.client.transport import ModelInfo, ScoringRow
from conch.rewards.combined import DeltaReward, SumReward
from conch.rewards.function import FunctionReward
from conch.rewards.served import HttpReward, check_readable
from conch.types import Completion, Dialogue, Prompt, RewardResult, RewardStatus, Rollout
from tests.fakes.json_rewards import endpoint
from tests.fakes.rollouts import rollout

WAIT_S = 60
ASK = {"role": "user", "content": "two and twö?"}
TOOLS = ({"type": "function", "function": {"name": "add"}},)
MARKUP = "<|im_start|>user\ntwo and twö?<|im_end|>\n<|im_start|>assistant\n"
DIALOGUES, TEXTS = ModelInfo(reads="dialogues"), ModelInfo(special_tokens=("<s>", "</s>"))


def answered(text: str, *, dialogue: Dialogue | None = None, **metadata: Any) -> Rollout:
    prompt = Prompt(MARKUP, (1, 2), metadata, dialogue or Dialogue((ASK,)))
    return Rollout(prompt, Completion(text, (3, 4), (0.0, 0.0), "eos"), policy_version=0)


def row_of(sample: Rollout, info: ModelInfo) -> ScoringRow | str:
    return make_row(sample, 0, info, None, 10_000)


def sent(sample: Rollout, info: ModelInfo = DIALOGUES) -> Any:
    row = row_of(sample, info)
    assert isinstance(row, ScoringRow)
    return json.loads(row.text)


def test_a_model_of_dialogues_is_sent_the_messages_with_the_answer() -> None:
    assert sent(answered("four")) == [ASK, {"role": "assistant", "content": "four"}]
    whole = sent(answered("four", dialogue=Dialogue((ASK,), TOOLS, {"thinks": False})))
    assert whole == {
        "messages": [ASK, {"role": "assistant", "content": "four"}],
        "tools": list(TOOLS),
        "chat_template_kwargs": {"thinks": False},
    }
    row = row_of(answered("four"), DIALOGUES)
    assert isinstance(row, ScoringRow) and "twö" in row.text and row.sample == f"{MARKUP}four"
    assert row.size == 4 + len(row.text.encode()) and row.length == len(row.text)


def test_a_model_of_texts_or_ids_is_sent_what_it_always_was() -> None:
    text, ids = row_of(answered("four"), TEXTS), row_of(answered("four"), ModelInfo(takes_tokens=True))
    assert text == ScoringRow(f"{MARKUP}four")
    assert ids == ScoringRow(f"{MARKUP}four", (1, 2, 3, 4))
    assert isinstance(row_of(PROBE, DIALOGUES), ScoringRow) and row_of(PROBE, TEXTS) == ScoringRow("a")


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        (rollout("p", "a"), "is a text, and the model reads dialogues: give prompts as lists of messages"),
        (answered("\ud800"), "cannot be encoded"),
        (answered("a", dialogue=Dialogue(({**ASK, "n": float("nan")},))), "cannot be sent as messages"),
        (answered("a", dialogue=Dialogue(({**ASK, "n": {1, 2}},))), "cannot be sent as messages"),
        (answered("a" * 10_000), "more than reward.client.max_request_mb"),
    ],
)
def test_a_sample_that_cannot_be_sent_as_a_dialogue_says_why(sample: Rollout, words: str) -> None:
    row = row_of(sample, DIALOGUES)
    assert isinstance(row, str) and words in row


def test_dialogues_of_one_rendering_are_not_taken_for_equal() -> None:
    """A template may leave out of its text what the reward model's writes."""
    named = answered("four", dialogue=Dialogue(({**ASK, "name": "Ann"},)))
    rows = [row_of(sample, DIALOGUES) for sample in (answered("four"), named)]
    assert rows[0] != rows[1]
    cache = ScoreCache(10)
    assert isinstance(rows[0], ScoringRow) and isinstance(rows[1], ScoringRow)
    cache.add(rows[0], RewardResult(RewardStatus.OK, scores={"reward": 1.0}))
    assert cache.get(rows[1]) is None and cache.get(rows[0]) is not None


def test_replicas_that_read_texts_and_dialogues_are_not_one_model() -> None:
    identity = ModelIdentity("raise")
    identity.mismatch("a", TEXTS, is_new=True)
    assert "b takes dialogues, but a takes text" in identity.mismatch("b", DIALOGUES, is_new=True)


# --------------------------------------------------------------------------------------------- before the run


def test_texts_for_a_model_of_dialogues_are_refused_before_the_run() -> None:
    prompts = [answered("a").prompt, rollout("p", "a").prompt, rollout("q", "a").prompt]
    with pytest.raises(ConfigError, match=r"`rm` reads dialogues, but 2 of 3 prompts .* \(first: prompt 1\)"):
        check_readable("`rm`", DIALOGUES, prompts)
    check_readable("`rm`", DIALOGUES, prompts[:1])


def test_markup_that_the_reward_model_reads_as_characters_is_named_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    policy = ("<|im_start|>", "<|im_end|>", "<|other|>", "<s>")
    check_readable("`rm`", TEXTS, [answered("a").prompt] * 3, policy)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "--template chat" in record.getMessage()
    assert "writes <|im_end|>, <|im_start|> into the prompts" in record.getMessage()

    caplog.clear()
    check_readable("`rm`", TEXTS, [rollout(MARKUP, "a").prompt], policy)  # the user's own text
    check_readable("`rm`", ModelInfo(), [answered("a").prompt], policy)  # a server of other tools
    check_readable("`rm`", ModelInfo(special_tokens=policy), [answered("a").prompt], policy)
    check_readable("`rm`", DIALOGUES, [answered("a").prompt], policy)
    assert not caplog.records


class ReadsNothing(FunctionReward):
    """A source that can read no prompt."""

    def check_prompts(self, prompts: Any, special_tokens: Any = ()) -> None:
        raise ConfigError("reads nothing")


def test_a_source_over_others_asks_all_of_them() -> None:
    with ReadsNothing(len) as inner:
        for outer in (SumReward({"a": FunctionReward(len), "b": inner}), DeltaReward(inner, lambda *_: [])):
            with outer, pytest.raises(ConfigError, match="reads nothing"):
                outer.check_prompts([])


def test_a_reference_answer_is_sent_as_the_assistants_message() -> None:
    seen: list[Any] = []

    def reward(samples: Any, messages: Any, **_: Any) -> list[float]:
        seen.extend(messages)
        return [float(len(each[-1]["content"])) for each in messages]

    with DeltaReward(FunctionReward(reward), lambda _, text: [1] * len(text)) as source:
        (result,) = source.submit([answered("four", original_output="2+2")]).result(WAIT_S)
    assert result.scores == {"reward": 1.0}
    assert [ASK, {"role": "assistant", "content": "2+2"}] in seen


# ----------------------------------------------------------------------------------------- functions and HTTP


def test_a_function_gets_messages_and_ids_if_it_names_them_or_takes_anything() -> None:
    seen: dict[str, Any] = {}

    def named(samples: Any, prompts: Any, outputs: Any, *, messages: Any) -> list[float]:
        seen["named"] = messages
        return [0.0] * len(samples)

    def anything(**arguments: Any) -> list[float]:
        seen["anything"] = arguments
        return [0.0] * len(arguments["samples"])

    def plain(samples: Any, prompts: Any, outputs: Any) -> list[float]:
        return [0.0] * len(samples)

    batch = [answered("four"), rollout("p", "ab")]
    for function in (named, anything, plain):
        with FunctionReward(function) as source:
            source.check()
            assert all(result.ok for result in source.submit(batch).result(WAIT_S))
    expected = [[ASK, {"role": "assistant", "content": "four"}], None]
    assert seen["named"] == seen["anything"]["messages"] == expected
    assert seen["anything"]["output_ids"] == [[3, 4], [1, 2]]


@pytest.mark.parametrize("key", ["messages", "output_ids", "samples"])
def test_a_key_of_the_prompts_is_never_shadowed(key: str) -> None:
    words = f"extra key `{key}`, which is an argument of every reward"
    source = FunctionReward(lambda **arguments: [0.0], metadata_keys=[key])
    with source, pytest.raises(ConfigError, match=words):
        source.check()


def test_the_dialect_messages_sends_dialogues_beside_the_texts() -> None:
    batch = [answered("four", dialogue=Dialogue((ASK,), TOOLS)), rollout("p", "ab")]
    with endpoint() as served:
        config = load(RewardConfig, {"dialect": "messages", "client": {"max_in_flight": 1}})
        with HttpReward(served.url, config) as source:
            source.check()
            results = source.submit(batch).result(WAIT_S)
    assert [result.scores for result in results] == [{"reward": len(MARKUP) + 4.0}, {"reward": 3.0}]
    asked = {text: whole for body in served.asked for text, whole in zip(*body.values(), strict=True)}
    assert asked["pab"] is None
    assert asked[f"{MARKUP}four"] == {
        "messages": [ASK, {"role": "assistant", "content": "four"}],
        "tools": list(TOOLS),
    }
