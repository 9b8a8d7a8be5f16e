"""Reward models with chat templates of their own, from the checkpoint to the score that a trainer gets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from conch.config import RewardConfig, load
from conch.converters.ensemble import to_ensemble
from conch.converters.to_triton import to_triton
from conch.errors import ConfigError, ConversionError
from conch.evaluation.gold import main as gold_eval
from conch.evaluation.records import (
    EvaluatedSample,
    EvaluationRecord,
    read_record,
    record_path,
    write_record,
)
from conch.rewards.factory import from_user
from conch.rewards.score import score
from conch.rewards.served import TritonReward
from conch.scoring.run import main
from conch.serving.server.server import TritonServer
from conch.store.store import read_model
from conch.types import Completion, Dialogue, Prompt, RewardResult, RewardStatus, Rollout
from tests.chats import chat_reward_model, chat_tokenizer

DEADLINE_S = 120.0
POLICY = chat_tokenizer("chatml")
ASKED = ({"role": "user", "content": "two and two?"},)
QUICK = {"client": {"deadline_s": DEADLINE_S, "request_timeout_s": DEADLINE_S}}


@dataclass(frozen=True)
class Served:
    store: Path
    server: TritonServer
    models: dict[str, Any]

    def right(self, family: str, messages: Any) -> float:
        """What the checkpoint gives by its model card."""
        row = chat_tokenizer(family).apply_chat_template(messages, return_dict=True, return_tensors="pt")
        with torch.inference_mode():
            return self.models[family](**row).logits.item()  # pyright: ignore[reportCallIssue]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A Llama-like and a Gemma-like model that read dialogues, and the first once more for texts."""
    root = tmp_path_factory.mktemp("dialogues")
    store = root / "store"
    models = {family: chat_reward_model(root / family, family) for family in ("llama", "gemma")}
    for family in models:
        to_triton(root / family, name=family, model_store=store, template="chat", max_length=100)
    to_triton(root / "llama", name="texts", model_store=store, max_length=100, template="{text}{eos}")
    to_ensemble(["llama", "gemma"], name="both", model_store=store, objective="mean")
    with TritonServer(store, ["llama", "gemma", "texts", "both"], ready_timeout_s=300.0) as server:
        yield Served(store, server, models)


def rollout(answer: str, dialogue: Dialogue | None = None) -> Rollout:
    """As a ChatML policy samples it."""
    dialogue = dialogue or Dialogue(ASKED)
    messages: list[Any] = list(dialogue.messages)
    text = str(POLICY.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    ids = tuple(POLICY(text, add_special_tokens=False).input_ids)
    return Rollout(Prompt(text, ids, dialogue=dialogue), Completion(answer, (5,), (0.0,), "eos"), 0)


def asked(served: Served, model: str, *batch: Rollout, **settings: Any) -> list[RewardResult]:
    with TritonReward(served.server.endpoint(model), load(RewardConfig, {**QUICK, **settings})) as source:
        source.check()
        return source.submit(batch).result(DEADLINE_S)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_chatml_policys_answer_is_scored_in_the_reward_models_own_template(
    served: Served, family: str
) -> None:
    batch = [rollout("four"), rollout("fünf"), rollout("four")]
    results = asked(served, family, *batch)
    for sample, result in zip(batch, results, strict=True):
        assert sample.dialogue is not None
        right = served.right(family, list(sample.dialogue.messages))
        assert result.scores["reward"] == pytest.approx(right, abs=1e-5)


def test_a_row_that_the_template_refuses_fails_alone(served: Served) -> None:
    system = Dialogue(({"role": "system", "content": "Be brief."}, *ASKED))
    first, second, third = asked(served, "gemma", rollout("four"), rollout("four", system), rollout("five"))
    assert first.ok and third.ok and second.status is RewardStatus.INVALID
    assert "this model has no system turn" in second.detail
    (result,) = asked(served, "llama", rollout("four", system))
    right = served.right("llama", [*system.messages, {"role": "assistant", "content": "four"}])
    assert result.scores["reward"] == pytest.approx(right, abs=1e-5)


def test_prompts_are_compared_with_what_the_model_reads_before_the_run(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    text = Prompt("two and two?", (1,))
    special = [token.content for token in POLICY.added_tokens_decoder.values()]
    with TritonReward(served.server.endpoint("llama"), RewardConfig()) as source:
        source.check()
        source.check_prompts([rollout("a").prompt], special)
        with pytest.raises(ConfigError, match=r"dialogues, but 1 of 1 prompts .* --template '\{text\}'"):
            source.check_prompts([text], special)
    with TritonReward(served.server.endpoint("texts"), RewardConfig()) as source:
        source.check()
        source.check_prompts([text], special)
        assert not caplog.records
        source.check_prompts([rollout("a").prompt], special)
    assert "<|im_end|>, <|im_start|>" in caplog.text


def test_an_ensemble_of_dialogue_models_reads_dialogues(served: Served) -> None:
    (result,) = asked(served, "both", rollout("four"))
    messages = [*ASKED, {"role": "assistant", "content": "four"}]
    right = [served.right(family, messages) for family in ("llama", "gemma")]
    assert result.scores["reward"] == pytest.approx(sum(right) / 2, abs=1e-5)
    spec = read_model(served.store, "both").spec
    assert (spec.reads, spec.special_tokens) == ("dialogues", ("<pad>",))


def test_members_of_different_kinds_are_combined_by_the_client_alone(served: Served) -> None:
    with pytest.raises(ConversionError, match=r"llama reads dialogues and texts texts: .*reward.members"):
        to_ensemble(["llama", "texts"], name="mixed", model_store=served.store, objective="mean")
    members = {name: served.server.endpoint(name) for name in ("llama", "texts")}
    with from_user(members, load(RewardConfig, {**QUICK, "combine": "mean"})) as source:
        source.check()
        (result,) = source.submit([rollout("four")]).result(DEADLINE_S)
    sent, text = rollout("four"), chat_tokenizer("llama")
    own = {"llama": served.right("llama", list(sent.dialogue.messages))} if sent.dialogue else {}
    ids = text(sent.sample + str(text.eos_token), return_tensors="pt")
    with torch.inference_mode():
        own["texts"] = served.models["llama"](**ids).logits.item()
    assert result.members == pytest.approx(own, abs=1e-5)


def test_rows_are_scored_from_the_command_line(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = [*ASKED, {"role": "assistant", "content": "four"}]
    rows = [{"messages": messages}, messages, {"prompt": list(ASKED), "completion": "four"}, "four"]
    lines = [*map(json.dumps, rows), "{", json.dumps({"messages": list(ASKED)})]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n\n")
    assert main([str(tmp_path / "rows.jsonl"), "--url", served.server.endpoint("llama")]) == 2
    out, err = capsys.readouterr()
    found = [json.loads(line) for line in out.splitlines()]
    right = served.right("llama", messages)
    assert [line["index"] for line in found] == list(range(6))
    assert [line["scores"]["reward"] for line in found[:3]] == [pytest.approx(right, abs=1e-5)] * 3
    assert [line["status"] for line in found[3:]] == ["invalid"] * 3
    assert not any("scores" in line for line in found[3:])
    assert "is a text, and the model reads dialogues" in found[3]["detail"]
    assert "is no JSON" in found[4]["detail"] and "end with the assistant's message" in found[5]["detail"]
    assert "3 of 6 rows have no score; first: row 3" in err


def test_rows_are_scored_from_python_in_order_and_in_parts(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conch.rewards.score._ROWS_AT_ONCE", 2)
    url = served.server.endpoint("texts")
    texts = ["a", "ab", {"text": "abc"}, {"prompt": "a", "completion": "b"}, list(ASKED)]
    results = score(texts, url)
    assert [result.ok for result in results] == [True] * 4 + [False]
    assert results[1].scores == results[3].scores != results[0].scores
    assert "is a dialogue" in results[4].detail
    (dialogue,) = score([[*ASKED, {"role": "assistant", "content": "four"}]], url)
    assert "is a dialogue, and the model reads texts" in dialogue.detail


def test_a_model_that_nobody_names_or_that_is_away_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("TRITON_HOST", raising=False)
    (tmp_path / "rows.txt").write_text("four\n")
    assert main([str(tmp_path / "rows.txt")]) == 1
    assert "name it with --url host:port/model" in capsys.readouterr().err
    assert main([str(tmp_path / "rows.txt"), "--url", "127.0.0.1:1/m", "--deadline-s", "1"]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert main([str(tmp_path / "none.jsonl"), "--url", "127.0.0.1:1/m"]) == 1
    assert "cannot be read" in capsys.readouterr().err


def test_evaluations_of_dialogues_get_gold_scores_by_a_chat_model_alone(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = tuple(
        EvaluatedSample(0, [*map(dict, ASKED)], answer, 1, {"reward": 0.0}) for answer in ("four", "fünf", "")
    )
    write_record(record_path(tmp_path, 0), EvaluationRecord(0, samples))
    limits = ["--deadline-s", str(DEADLINE_S)]
    assert gold_eval([str(tmp_path), served.server.endpoint("texts"), *limits]) == 1
    assert "3 of 3 inputs" in capsys.readouterr().err
    assert gold_eval([str(tmp_path), served.server.endpoint("llama"), *limits]) == 0
    record = read_record(record_path(tmp_path, 0))
    for sample, gold in zip(record.samples, record.column("gold"), strict=True):
        right = served.right("llama", [*ASKED, {"role": "assistant", "content": sample.output}])
        assert gold == pytest.approx(right, abs=1e-5)
    assert record.sources["gold"] == f"llama at {served.server.url}"

    text = EvaluatedSample(0, "two and two? ", "four", 1, {"reward": 0.0})
    write_record(record_path(tmp_path, 1), EvaluationRecord(1, (text,)))
    assert gold_eval([str(tmp_path), served.server.endpoint("llama"), *limits]) == 1
    assert "reads dialogues, but 1 of 1 prompts are texts" in capsys.readouterr().err
