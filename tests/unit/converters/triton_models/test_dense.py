"""Scores of steps and tokens by the code that runs inside the server, against plain transformers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conch.converters.checkpoints.reader import read_checkpoint
from conch.converters.options import ConversionOptions, ReadOptions
from conch.converters.parts import plan_parts, write_part
from conch.converters.triton_models.reward_model import Row, Scorer, Scores, filled_up, score_requests
from tests.checkpoints import (
    EOS,
    LETTERS,
    base_model,
    byte_tokenizer,
    classifier,
    process_reward,
    save_value_head,
    value_head_tensors,
)
from tests.numerics import assert_scores_close

SEMICOLON = LETTERS.index(";")
STEPS = ReadOptions(step_separator=";", granularity="step")
TOKENS = ReadOptions(granularity="token")


def scorer_of(name: Path, reading: ReadOptions) -> Scorer:
    """What is served of a checkpoint."""
    checkpoint = read_checkpoint(str(name), reading)
    folder = name.parent / f"{name.stem}-version"
    folder.mkdir(exist_ok=True)
    options = ConversionOptions(**dict(reading))
    write_part(folder, *plan_parts("model", options), checkpoint, options)
    return Scorer(folder, "cpu")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("qwen") / "model"
    return folder, process_reward(folder, "qwen2")


@pytest.fixture(scope="module")
def steps(qwen: tuple[Path, Any]) -> Scorer:
    return scorer_of(qwen[0], STEPS.model_copy(update={"aggregate": "mean"}))


@torch.inference_mode()
def probabilities(model: Any, ids: list[int]) -> list[float]:
    """Of label 1 at every token."""
    logits = model(torch.tensor([ids])).logits[0].double()
    return torch.sigmoid(logits[:, 1] - logits[:, 0]).tolist()


def ends_of(scorer: Scorer, *texts: str) -> list[tuple[int, ...]]:
    return [row.ends for row in scorer.rows_from_texts([text.encode() for text in texts])]


def row_of_ids(scorer: Scorer, *ids: int) -> Row:
    (row,) = scorer.rows_from_tokens(np.array([ids]), np.ones((1, len(ids)), dtype=np.int64))
    return row


# ------------------------------------------------------------------------------------------ where they end


def test_a_step_ends_at_each_separator_and_at_the_end_of_the_text(steps: Scorer) -> None:
    assert ends_of(steps, "ab;cde;f", "ab;", ";;", "abc") == [(3, 7, 8), (3,), (1, 2), (3,)]


def test_an_eos_in_the_text_ends_no_step(steps: Scorer) -> None:
    """The text ends at the last token that is none; `<eos>` is one token of five characters."""
    assert ends_of(steps, "a;<eos>b<eos>", "<eos>", "a<eos>;") == [(2, 8), (5,), (7,)]


def test_a_text_without_tokens_of_its_own_is_one_step_that_ends_at_0(qwen: tuple[Path, Any]) -> None:
    scorer = scorer_of(qwen[0], STEPS.model_copy(update={"template": "q{text}{eos}"}))
    (row,) = scorer.rows_from_texts([b""])
    assert row == Row([LETTERS.index("q"), EOS], (0,), (0,))


def test_ends_count_the_clients_characters_not_those_of_the_template(qwen: tuple[Path, Any]) -> None:
    scorer = scorer_of(qwen[0], STEPS.model_copy(update={"template": "qqq<eos>{text}{eos}"}))
    (row,) = scorer.rows_from_texts([b"a;b"])
    assert (row.places, row.ends) == ((5, 6), (2, 3))
    assert row.ids[-1] == EOS


@pytest.mark.parametrize(
    ("side", "ends"), [("right", (*range(2, 32, 2), 31)), ("left", tuple(range(10, 42, 2)))]
)
def test_steps_that_are_cut_away_are_absent(qwen: tuple[Path, Any], side: Any, ends: tuple[int, ...]) -> None:
    """40 characters in 20 steps into a window of 32 tokens, one of which is the closing eos."""
    scorer = scorer_of(qwen[0], STEPS.model_copy(update={"template": "{text}{eos}", "truncation_side": side}))
    assert ends_of(scorer, "a;" * 20) == [ends]


def test_the_closing_eos_of_a_text_that_was_cut_is_not_scored(qwen: tuple[Path, Any]) -> None:
    scorer = scorer_of(qwen[0], TOKENS.model_copy(update={"template": "{text}{eos}"}))
    assert ends_of(scorer, "ab" * 20) == [tuple(range(1, 32))]


def test_every_token_of_the_text_has_a_place_but_none_of_the_template(qwen: tuple[Path, Any]) -> None:
    scorer = scorer_of(qwen[0], TOKENS.model_copy(update={"template": "q{text}{eos}"}))
    (row,) = scorer.rows_from_texts([b"ab<eos>"])
    assert (row.places, row.ends) == ((1, 2, 3), (1, 2, 7))


def test_what_an_encoders_tokenizer_adds_ends_no_step(tmp_path: Path) -> None:
    """Its tokenizer opens a text with `a` and closes it with `b`."""
    process_reward(tmp_path / "model", "bert")
    (row,) = scorer_of(tmp_path / "model", STEPS).rows_from_texts([b"cd;e"])
    assert row == Row([0, 2, 3, SEMICOLON, 4, 1], (3, 4), (3, 4))
    (row,) = scorer_of(tmp_path / "model", STEPS).rows_from_texts([b""])
    assert row == Row([0, 1], (1,), (0,))


def test_ends_are_characters_where_tokens_are_bytes(tmp_path: Path) -> None:
    """é has two bytes, 漢 three, 🙂 four: tokens that make up one character end with it."""
    model = process_reward(tmp_path / "model", "qwen2", vocab_size=260)
    byte_tokenizer().save_pretrained(tmp_path / "model")
    text = "é;漢🙂; x"

    assert ends_of(scorer_of(tmp_path / "model", STEPS), text) == [(2, 5, 7)]
    scorer = scorer_of(tmp_path / "model", TOKENS)
    assert ends_of(scorer, text) == [(1, 1, 2, 3, 3, 3, 4, 4, 4, 4, 5, 6, 7)]
    (row,) = rows = scorer.rows_from_texts([text.encode()])
    assert_scores_close(scorer.score(rows).steps[0], probabilities(model, row.ids))


def test_ends_of_the_token_form_count_the_tokens_that_are_no_padding(steps: Scorer) -> None:
    ids = np.array([[9, 9, 0, SEMICOLON, 1], [0, 1, 2, 3, EOS]])
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    first, second = steps.rows_from_tokens(ids, mask)

    assert (first.places, first.ends) == ((1, 2), (2, 3))
    assert (second.places, second.ends) == ((3,), (4,))


# -------------------------------------------------------------------------------------------------- scores


def test_steps_score_like_hugging_face_in_any_company(qwen: tuple[Path, Any], steps: Scorer) -> None:
    texts = ["ab;cde;f", "a", "abc;" * 7, ";", "ab;;c"]
    rows = steps.rows_from_texts([text.encode() for text in texts])
    scores = steps.score(rows)

    for row, told in zip(rows, scores.steps, strict=True):
        every = probabilities(qwen[1], row.ids)
        assert_scores_close(told, [every[place] for place in row.places])
    means = [[told.mean()] for told in scores.steps]
    assert_scores_close(scores.rewards, means)


@pytest.mark.parametrize(
    ("aggregate", "expected"),
    [("min", np.min), ("prod", np.prod), ("mean", np.mean), ("last", lambda s: s[-1])],
)
def test_the_reward_is_the_aggregate_of_the_steps(
    qwen: tuple[Path, Any], aggregate: Any, expected: Any
) -> None:
    scorer = scorer_of(qwen[0], STEPS.model_copy(update={"aggregate": aggregate}))
    scores = scorer.score(scorer.rows_from_texts([b"ab;cde;f", b"dd;a;"]))
    right = [[expected(told)] for told in scores.steps]
    assert_scores_close(scores.rewards, right)


def test_the_reward_is_that_of_the_same_model_without_dense_scores(qwen: tuple[Path, Any]) -> None:
    texts = [b"ab;cde;f", b"dd;a;", b"a"]
    both = [
        scorer.score(scorer.rows_from_texts(texts)).rewards
        for scorer in (scorer_of(qwen[0], STEPS), scorer_of(qwen[0], ReadOptions(step_separator=";")))
    ]
    assert_scores_close(*both)


def test_every_token_of_a_value_head_is_scored(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", "gpt2")
    tensors = value_head_tensors(base)
    save_value_head(tmp_path / "head", tensors, "safetensors")
    scorer = scorer_of(tmp_path / "head", TOKENS.model_copy(update={"base_model": str(tmp_path / "base")}))
    row = row_of_ids(scorer, 1, 2, EOS, 3)
    scores = scorer.score([row, row_of_ids(scorer, *range(20))])

    trunk = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    weight = trunk.pop("v_head.weight")
    base.base_model.load_state_dict(trunk)
    with torch.inference_mode():
        right = (base.base_model(torch.tensor([row.ids])).last_hidden_state[0] @ weight.T)[:, 0]
    assert_scores_close(scores.steps[0], right)
    assert scores.rewards[0, 0] == pytest.approx(float(right[2]), abs=1e-5)  # at the first eos
    assert row.ends == (1, 2, 3, 4)


def test_every_token_of_a_classifier_is_scored_in_the_unit_of_its_reward(tmp_path: Path) -> None:
    model = classifier(tmp_path / "model", "llama", num_labels=2)
    (tmp_path / "model" / "reward_model.json").write_text('{"mean": [9, 0.5], "std": [9, 4.0]}')
    row = [1, 2, 3, 4]
    with torch.inference_mode():
        states = model.model(torch.tensor([row])).last_hidden_state[0]
        right = (states @ model.score.weight[1] - 0.5) / 4.0
        sample = (model(torch.tensor([row])).logits[0, 1] - 0.5) / 4.0
    for normalise in ("fold", "parameters"):
        scorer = scorer_of(
            tmp_path / "model", TOKENS.model_copy(update={"rewards": ("1",), "normalise": normalise})
        )
        scores = scorer.score([row_of_ids(scorer, *row)])
        assert_scores_close(scores.steps[0], right)
        assert_scores_close(scores.rewards, [[sample]])


def test_steps_stay_with_their_rows_when_the_batch_is_cut(
    steps: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [b"ab;c", b"d", b"ef;g;h", b"a;"]
    requests = [steps.rows_from_texts(texts[:3]), steps.rows_from_texts(texts[3:])]
    monkeypatch.setattr(steps, "tokens_per_forward", 4)
    outcomes = score_requests(steps, [requests[0], ValueError("no"), requests[1]])

    assert isinstance(outcomes[0], Scores) and isinstance(outcomes[2], Scores)
    told = [*outcomes[0].steps, *outcomes[2].steps]
    for row, scores in zip(itertools.chain(*requests), told, strict=True):
        assert_scores_close(scores, steps.score([row]).steps[0])


def test_a_step_that_is_nan_fails_its_request_alone(qwen: tuple[Path, Any]) -> None:
    """The row's aggregate, its last step, is finite."""
    scorer = scorer_of(qwen[0], STEPS.model_copy(update={"aggregate": "last"}))
    dense = scorer.model.dense

    def broken(input_ids: Any, mask: Any, ends: Any) -> Any:
        scores, every = dense(input_ids, mask, ends)
        return scores, torch.where((input_ids == SEMICOLON) & (mask == 1), torch.nan, every)

    scorer.model.dense = broken
    good, bad = score_requests(scorer, [scorer.rows_from_texts([text]) for text in (b"ab", b"a;b")])
    assert isinstance(good, Scores)
    assert isinstance(bad, ArithmeticError) and "row 0: the model's score is [nan, " in str(bad)


def test_rows_are_filled_up_to_a_rectangle() -> None:
    filled = filled_up([(3, 7), (1,)], -1, np.int32)
    assert filled.dtype == np.int32 and filled.tolist() == [[3, 7], [1, -1]]


def test_a_version_of_before_there_were_dense_scores_still_runs(tmp_path: Path) -> None:
    process_reward(tmp_path / "model", "qwen2")
    scorer_of(tmp_path / "model", ReadOptions(step_separator=";"))
    manifest = tmp_path / "model-version" / "manifest.json"
    settings = json.loads(manifest.read_text())
    del settings["granularity"]
    manifest.write_text(json.dumps(settings))

    scorer = Scorer(tmp_path / "model-version", "cpu")
    assert scorer.score(scorer.rows_from_texts([b"a;b"])).steps == []
