"""The benchmark of rollouts compares like with like: lengths as drawn, log-probs of what was drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.forced_lengths import EndAt
from benchmarks.policies import Case, case_of, dialogue_case
from benchmarks.rollout import OURS, PLAIN, SIDES, Rates, Sampled, check, peak_of, result, table
from conch.errors import ConchError

EOS, FIRST_MARKER = 1, 6


@pytest.fixture(scope="module")
def dialogues() -> Case:
    return case_of("dialogues", None, small=True)


def allowed(processor: EndAt, rows: list[list[int]]) -> list[list[int]]:
    """Ids that each row may go on with, of a vocabulary of 6 and 2 markers."""
    scores = processor(torch.tensor(rows), torch.zeros(len(rows), FIRST_MARKER + 2))
    return [[token for token, score in enumerate(row) if score > -torch.inf] for row in scores.tolist()]


def test_a_row_ends_at_its_length_wherever_it_stands() -> None:
    processor = EndAt(EOS, FIRST_MARKER, [1, 3])
    going_on, ending = [0, 2, 3, 4, 5], [EOS]
    assert allowed(processor, [[0, 0, 4, 6], [4, 5, 3, 7]]) == [ending, going_on]
    assert allowed(processor, [[4, 5, 3, 7, 2], [0, 0, 4, 6, 1]])[0] == going_on
    assert allowed(processor, [[4, 5, 3, 7, 2, 2]]) == [ending]


def test_without_lengths_no_row_ends() -> None:
    assert allowed(EndAt(EOS), [[4, 2]]) == [[0, 2, 3, 4, 5, 6, 7]]


@pytest.mark.parametrize("name", ["walks", "dialogues"])
@pytest.mark.parametrize("side", list(SIDES))
def test_both_sides_give_the_lengths_drawn_and_log_probs_of_the_ids(side: str, name: str) -> None:
    case = case_of(name, None, small=True)
    model = case.model()
    sampled = SIDES[side](case, model)()
    assert check(case, side, sampled) == sum(case.expected)
    assert len(set(case.expected)) > 1 or name == "walks"
    processor = case.end_at()
    for prompt, one in zip(case.prompts, sampled, strict=True):  # row by row, without padding or cache
        assert one.text == case.tokenizer.decode(one.ids, skip_special_tokens=True)
        ids = torch.tensor([[*prompt.token_ids, *one.ids]])
        with torch.no_grad():
            logits = model.double()(ids).logits[0]
        for place, (token, logprob) in enumerate(zip(one.ids, one.logprobs, strict=True)):
            given = len(prompt.token_ids) + place
            drawn_from = processor(ids[:, :given], logits[given - 1 : given]).log_softmax(-1)
            assert logprob == pytest.approx(float(drawn_from[0, token]), abs=1e-4)


def test_other_lengths_and_missing_log_probs_are_refused(dialogues: Case) -> None:
    good = [Sampled([2] * length, [-1.0] * length, "") for length in dialogues.expected]
    assert check(dialogues, OURS, good) == sum(dialogues.expected)
    with pytest.raises(ConchError, match="other lengths than drawn"):
        check(dialogues, OURS, [*good[:-1], Sampled([2] * 99, [-1.0] * 99, "")])
    bad = Sampled(good[0].ids, [float("nan")] * len(good[0].ids), "")
    with pytest.raises(ConchError, match="log-probs"):
        check(dialogues, OURS, [bad, *good[1:]])


def test_a_ratio_is_of_two_turns_of_one_round(dialogues: Case) -> None:
    rates = {OURS: Rates([20.0, 30.0, 40.0], 2 << 20), PLAIN: Rates([10.0, 30.0, 10.0], 3 << 20)}
    report = result(dialogues, rates)
    assert report["ratio"] == {"median": 2.0, "low": 1.0, "high": 4.0}
    assert report["response_tokens"] == sum(dialogues.expected)
    lines = table({"results": [report]}).splitlines()
    assert lines[2].endswith("| Conch | 30 (20-40) | 2.00 (1.00-4.00) | 2 |")
    assert lines[3].endswith("| transformers.generate | 10 (10-30) | 1 | 3 |")


def test_memory_is_that_of_sampling_alone(dialogues: Case) -> None:
    ballast = torch.ones(64 << 18)  # 64 MiB, which the peak before holds
    del ballast
    assert 0 < peak_of(dialogues, PLAIN) < 48 << 20


def test_lengths_are_those_of_the_last_answers(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    turns = [f"\n\nHuman: Hello {'there ' * n}\n\nAssistant: Well{' yes' * n}" for n in range(1, 5)]
    data.write_text("".join(json.dumps({"chosen": turn * 2, "rejected": ""}) + "\n" for turn in turns))
    case = dialogue_case(data, 4, layers=1, width=64, max_prompt_tokens=20, max_new_tokens=4)
    answers = [turn.partition("Assistant:")[2] for turn in turns]
    tokens = [len(case.tokenizer(answer).input_ids) + 1 for answer in answers]
    assert case.expected == [min(4, count) for count in tokens]
    assert len(set(case.expected)) > 1
    for row, prompt in enumerate(case.prompts):
        assert prompt.text.endswith(f"Assistant:<row {row}>")
        assert len(prompt.token_ids) <= 20
        assert list(prompt.token_ids) == case.tokenizer(prompt.text).input_ids
    with pytest.raises(ConchError, match="holds 4 distinct dialogues, 5 were asked for"):
        dialogue_case(data, 5)
