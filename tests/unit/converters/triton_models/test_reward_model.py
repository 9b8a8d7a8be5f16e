"""The code that runs inside the server, without a server."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import GPT2ForSequenceClassification

from conch.converters.triton_models.reward_model import (
    RejectedError,
    Row,
    Scorer,
    Scores,
    refuse_numpy_2,
    score_requests,
)
from tests.numerics import assert_scores_close
from tests.tiny import reward_checkpoint

PAD, EOS, VOCABULARY, MAX_LENGTH = 21, 22, 24, 12


def write_version(folder: Path, **settings: Any) -> Path:
    """A checkpoint with the part of the manifest that `model.py` reads."""
    manifest = {
        "form": "text",
        "template": "{text}{eos}",
        "max_length": MAX_LENGTH,
        "reward_names": ["reward"],
        "normalise": False,
        "dtype": "float32",
        "pad_token_id": PAD,
        "vocab_size": VOCABULARY,
        "trust_remote_code": False,
        **settings,
    }
    reward_checkpoint(folder, num_labels=len(manifest["reward_names"]))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_version(tmp_path_factory.mktemp("version"))


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Scorer:
    return Scorer(folder, "cpu")


@torch.inference_mode()
def alone(folder: Path, ids: list[int]) -> list[float]:
    """The Hugging Face model's scores of one unpadded row."""
    model = GPT2ForSequenceClassification.from_pretrained(folder).eval()
    return model(input_ids=torch.tensor([ids])).logits[0].tolist()


def masked(rows: list[list[int]], *, left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Padded ids and mask."""
    longest = max(len(row) for row in rows)
    ids = np.full((len(rows), longest), PAD)
    mask = np.zeros((len(rows), longest), dtype=np.int64)
    for row, values in enumerate(rows):
        where = slice(longest - len(values), None) if left else slice(0, len(values))
        ids[row, where], mask[row, where] = values, 1
    return ids, mask


def ids_of(rows: list[Row]) -> list[list[int]]:
    return [row.ids for row in rows]


def as_rows(rows: list[list[int]]) -> list[Row]:
    return [Row(ids) for ids in rows]


def rewards_of(scorer: Scorer, rows: list[list[int]]) -> np.ndarray:
    """Of rows in one batch."""
    return scorer.score(as_rows(rows)).rewards


def test_rows_from_texts_applies_the_template(scorer: Scorer) -> None:
    assert ids_of(scorer.rows_from_texts([b"abc", b""])) == [[0, 1, 2, EOS], [EOS]]


def test_rows_from_texts_closes_no_text_twice(scorer: Scorer) -> None:
    assert ids_of(scorer.rows_from_texts([b"ab", b"ab<eos>", b"<eos>ab"])) == [
        [0, 1, EOS],
        [0, 1, EOS],
        [EOS, 0, 1, EOS],
    ]


def test_rows_from_texts_cuts_the_text_and_keeps_the_closing_eos(scorer: Scorer) -> None:
    (row,) = scorer.rows_from_texts([b"abcdefghijklmnop"])
    assert row.ids == [*range(MAX_LENGTH - 1), EOS]


def test_rows_from_texts_cuts_on_the_tokenizers_side(folder: Path) -> None:
    scorer = Scorer(folder, "cpu")
    scorer.tokenizer.truncation_side = "left"
    (row,) = scorer.rows_from_texts([b"abcdefghijklmnop"])
    assert row.ids == [*range(16 - MAX_LENGTH + 1, 16), EOS]


def test_rows_from_texts_refuses_what_is_not_utf8(scorer: Scorer) -> None:
    with pytest.raises(RejectedError, match=r"row 1: text is not UTF-8 .* at byte 1"):
        scorer.rows_from_texts([b"a", b"a\xff"])


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    """A message is its role's first letter and its content; an eos closes the conversation."""
    folder = write_version(tmp_path_factory.mktemp("chat"), template="chat")
    scorer = Scorer(folder, "cpu")
    scorer.tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ message['role'][0] }}{{ message['content'] }}{% endfor %}<eos>"
    )
    return scorer


def conversation(*contents: str, role: str = "user") -> bytes:
    return json.dumps([{"role": role, "content": content} for content in contents]).encode()


def test_rows_from_texts_puts_messages_into_the_chat_template(chat: Scorer) -> None:
    u = 20
    assert ids_of(chat.rows_from_texts([conversation("ab", "c")])) == [[u, 0, 1, u, 2, EOS]]


@pytest.mark.parametrize(
    ("side", "expected"), [("right", [20, *range(MAX_LENGTH - 2), EOS]), ("left", [*range(5, 16), EOS])]
)
def test_rows_from_texts_cuts_a_conversation_and_keeps_its_closing_eos(
    chat: Scorer, side: str, expected: list[int]
) -> None:
    chat.tokenizer.truncation_side = side
    assert ids_of(chat.rows_from_texts([conversation("abcdefghijklmnop")])) == [expected]


def test_rows_from_texts_cuts_a_conversation_that_no_eos_closes(chat: Scorer, monkeypatch) -> None:
    monkeypatch.setattr(chat.tokenizer, "truncation_side", "right")
    monkeypatch.setattr(chat.tokenizer, "chat_template", "{{ messages[0]['content'] }}")
    (row,) = chat.rows_from_texts([conversation("abcdefghijklmnop")])
    assert row.ids == [*range(MAX_LENGTH)]


def test_rows_from_texts_adds_no_special_tokens_to_what_the_chat_template_writes(
    chat: Scorer, monkeypatch
) -> None:
    tokenizer = copy.deepcopy(chat.tokenizer)
    opening = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", EOS)])
    tokenizer.backend_tokenizer.post_processor = opening
    monkeypatch.setattr(chat.encoder, "tokenizer", tokenizer)
    assert tokenizer("a").input_ids == [EOS, 0]
    assert ids_of(chat.rows_from_texts([conversation("a")])) == [[20, 0, EOS]]


@pytest.mark.parametrize("text", [b"ab", b'{"role": "user"}', b'["ab"]', b"1"])
def test_rows_from_texts_refuses_what_are_no_messages(chat: Scorer, text: bytes) -> None:
    with pytest.raises(RejectedError, match="row 1: text is no JSON list of messages"):
        chat.rows_from_texts([conversation("a"), text])


def test_rows_from_texts_passes_on_what_the_chat_template_refuses(chat: Scorer) -> None:
    with pytest.raises(RejectedError, match=r"row 0: text is no JSON list of messages"):
        chat.rows_from_texts([b"[]"])
    with pytest.raises(RejectedError, match="row 0: the chat template refuses these messages: no system"):
        chat.rows_from_texts([conversation("a", role="system")])


def test_rows_from_tokens_takes_either_padding(scorer: Scorer) -> None:
    rows = [[0, 1, 2], [3]]
    assert ids_of(scorer.rows_from_tokens(*masked(rows))) == rows
    assert ids_of(scorer.rows_from_tokens(*masked(rows, left=True))) == rows


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[0], []], "row 1 has no tokens"),
        ([[0] * (MAX_LENGTH + 1)], "row 0 has 13 tokens, at most 12"),
        ([[0], [VOCABULARY]], "row 1 has token ids outside 0..23"),
        ([[-1]], "row 0 has token ids outside"),
    ],
)
def test_rows_from_tokens_refuses_bad_rows(scorer: Scorer, rows: list[list[int]], expected: str) -> None:
    with pytest.raises(RejectedError, match=expected):
        scorer.rows_from_tokens(*masked(rows))


def test_rows_from_tokens_refuses_a_mask_with_a_hole(scorer: Scorer) -> None:
    with pytest.raises(RejectedError, match="row 0: attention_mask has a hole"):
        scorer.rows_from_tokens(np.array([[0, 1, 2]]), np.array([[1, 0, 1]]))


def test_rows_from_tokens_refuses_a_mask_of_another_shape(scorer: Scorer) -> None:
    with pytest.raises(RejectedError, match=r"input_ids is \[1, 3\], attention_mask \[1, 2\]"):
        scorer.rows_from_tokens(np.array([[0, 1, 2]]), np.array([[1, 1]]))


def test_score_equals_hugging_face_for_every_length_in_any_company(folder: Path, scorer: Scorer) -> None:
    rows = [
        [(start + step) % 21 for step in range(length)]
        for start, length in enumerate(range(1, MAX_LENGTH + 1))
    ]
    expected = [alone(folder, row) for row in rows]

    assert_scores_close(rewards_of(scorer, rows), expected)
    assert_scores_close(rewards_of(scorer, rows[::-1]), expected[::-1])


def test_score_keeps_order_when_the_batch_is_cut_by_the_token_budget(
    scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [[0, 1, 2, 3], [4], [5, 6, 7], [8, 9]]
    whole = rewards_of(scorer, rows)
    monkeypatch.setattr(scorer, "tokens_per_forward", 4)
    passes = []
    forward = scorer._forward
    monkeypatch.setattr(scorer, "_forward", lambda rows: passes.append(len(rows)) or forward(rows))

    assert_scores_close(rewards_of(scorer, rows), whole)
    assert passes == [2, 1, 1]


def test_batch_invariant_scores_are_those_of_each_row_alone_to_the_last_bit(tmp_path: Path) -> None:
    folder = write_version(tmp_path, batch_invariant=True)
    rows = [list(range(length)) for length in range(1, 13)] * 2

    scores = rewards_of(Scorer(folder, "cpu"), rows)

    assert scores.tolist() == [alone(folder, row) for row in rows]


def test_a_pass_is_small_on_a_cpu(scorer: Scorer) -> None:
    assert scorer.tokens_per_forward == 512


def test_score_normalises_each_reward_by_its_own_statistics(tmp_path: Path) -> None:
    folder = write_version(
        tmp_path, reward_names=["a", "b"], normalise=True, mean=[0.5, -1.0], std=[2.0, 0.25]
    )
    raw = np.array(alone(folder, [0, 1, EOS]))

    expected = (raw - [0.5, -1.0]) / [2.0, 0.25]
    assert_scores_close(rewards_of(Scorer(folder, "cpu"), [[0, 1, EOS]])[0], expected)


def test_score_requests_splits_the_batch_as_it_was_asked(scorer: Scorer) -> None:
    first, rejected, second = score_requests(
        scorer, [as_rows([[0], [1, 2]]), RejectedError("no"), as_rows([[3, 4, 5]])]
    )

    assert isinstance(first, Scores) and isinstance(second, Scores)
    assert isinstance(rejected, RejectedError)
    assert_scores_close(first.rewards, rewards_of(scorer, [[0], [1, 2]]))
    assert_scores_close(second.rewards, rewards_of(scorer, [[3, 4, 5]]))


def test_score_requests_lets_only_the_failing_request_fail(scorer: Scorer) -> None:
    # An id beyond the embedding, which the checks of the real inputs would have refused, makes torch raise.
    good, bad = score_requests(scorer, [as_rows([[0, 1]]), as_rows([[10_000]])])

    assert isinstance(good, Scores)
    assert_scores_close(good.rewards, rewards_of(scorer, [[0, 1]]))
    assert isinstance(bad, IndexError)


def test_score_requests_turns_a_score_that_is_nan_into_that_requests_error(folder: Path) -> None:
    scorer = Scorer(folder, "cpu")
    with torch.no_grad():
        scorer.model.network.transformer.wte.weight[7] = float("nan")
    good, bad = score_requests(scorer, [as_rows([[0, 1]]), as_rows([[2], [7]])])

    assert isinstance(good, Scores)
    assert isinstance(bad, ArithmeticError) and "row 1: the model's score is [nan]" in str(bad)


def test_score_requests_of_only_rejected_requests_scores_nothing(scorer: Scorer) -> None:
    (outcome,) = score_requests(scorer, [RejectedError("no")])
    assert isinstance(outcome, RejectedError)


def test_refuse_numpy_2_says_what_to_install() -> None:
    refuse_numpy_2("1.26.4")
    with pytest.raises(RuntimeError, match=r"numpy 2\.0\.1 .*install numpy<2"):
        refuse_numpy_2("2.0.1")
