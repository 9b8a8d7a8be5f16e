"""A served score is the Hugging Face score, whatever else is in the batch; a bad request fails alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import tritonclient.grpc as triton
from transformers import GPT2ForSequenceClassification
from tritonclient.utils import InferenceServerException

from conch.serving.server.server import TritonServer
from conch.triton.channel import Access, open_client
from conch.triton.config_pbtxt import spec_from_model_config
from tests.integration.conftest import TEXT_MODEL, TOKEN_MODEL, RewardModel

LETTERS = "abcdefghijklmnopqrstu"
PAD, EOS, MAX_LENGTH = 21, 22, 12
DEADLINE_S = 120.0


@pytest.fixture
def client(reward_server: TritonServer) -> Iterator[triton.InferenceServerClient]:
    with open_client(reward_server.url, Access()) as client:
        yield client


@pytest.fixture(scope="module")
def alone(reward_model: RewardModel) -> Callable[[list[int]], float]:
    """The Hugging Face score of one unpadded row."""
    model = GPT2ForSequenceClassification.from_pretrained(reward_model.checkpoint).eval()

    @torch.inference_mode()
    def score(ids: list[int]) -> float:
        return model(input_ids=torch.tensor([ids])).logits.item()

    return score


def ids_of(text: str) -> list[int]:
    return [LETTERS.index(letter) for letter in text] + [EOS]


def score_texts(client: triton.InferenceServerClient, texts: list[bytes]) -> np.ndarray:
    tensor = triton.InferInput("text", [len(texts), 1], "BYTES")
    tensor.set_data_from_numpy(np.array(texts, dtype=np.object_).reshape(-1, 1))
    return _scores(client, TEXT_MODEL, [tensor])


def score_tokens(client: triton.InferenceServerClient, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    tensors = []
    for name, values in (("input_ids", ids), ("attention_mask", mask)):
        tensors.append(triton.InferInput(name, list(values.shape), "INT64"))
        tensors[-1].set_data_from_numpy(values.astype(np.int64))
    return _scores(client, TOKEN_MODEL, tensors)


def _scores(client: triton.InferenceServerClient, model: str, tensors: list[triton.InferInput]) -> np.ndarray:
    scores = client.infer(model, tensors, client_timeout=DEADLINE_S).as_numpy("rewards")
    assert scores is not None and scores.dtype == np.float32 and scores.shape[1] == 1
    return scores[:, 0]


def padded(rows: list[list[int]], *, left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    longest = max(len(row) for row in rows)
    ids, mask = np.full((len(rows), longest), PAD), np.zeros((len(rows), longest), dtype=np.int64)
    for row, values in enumerate(rows):
        where = slice(longest - len(values), None) if left else slice(0, len(values))
        ids[row, where], mask[row, where] = values, 1
    return ids, mask


def test_text_score_equals_hugging_face_at_every_length(client, alone) -> None:
    texts = [LETTERS[start : start + length] for start, length in enumerate(range(MAX_LENGTH))]
    expected = [alone(ids_of(text)) for text in texts]

    for text, score in zip(texts, expected, strict=True):
        assert score_texts(client, [text.encode()])[0] == pytest.approx(score, abs=1e-5)


@pytest.mark.parametrize("size", [1, 2, 7, 32, 64])
def test_text_score_equals_hugging_face_in_every_batch(client, alone, size: int) -> None:
    texts = [LETTERS[index % 9 : index % 9 + index % MAX_LENGTH] for index in range(size)]

    scores = score_texts(client, [text.encode() for text in texts])
    np.testing.assert_allclose(scores, [alone(ids_of(text)) for text in texts], atol=1e-5)


def test_text_that_is_too_long_is_cut_before_its_eos(client, alone) -> None:
    (score,) = score_texts(client, [b"abcdefghijklmnopqrstu" * 50])
    assert score == pytest.approx(alone([*range(MAX_LENGTH - 1), EOS]), abs=1e-5)


def test_unicode_reaches_the_tokenizer_unharmed(client, alone) -> None:
    unknown = 23
    (score,) = score_texts(client, ["a漢b🙂".encode()])
    assert score == pytest.approx(alone([0, unknown, 1, unknown, EOS]), abs=1e-5)


def test_many_requests_at_once_are_batched_and_score_right(
    client, alone, reward_server: TritonServer
) -> None:
    texts = [LETTERS[index % 9 : index % 9 + index % MAX_LENGTH] for index in range(96)]
    before = _executions(client)
    with ThreadPoolExecutor(32) as pool:
        scores = list(pool.map(lambda text: score_texts(client, [text.encode()])[0], texts))

    np.testing.assert_allclose(scores, [alone(ids_of(text)) for text in texts], atol=1e-5)
    assert _executions(client) - before < len(texts)


def _executions(client: triton.InferenceServerClient) -> int:
    statistics = client.get_inference_statistics(TEXT_MODEL, client_timeout=DEADLINE_S)
    return int(statistics.model_stats[0].execution_count)


@pytest.mark.parametrize("left", [False, True])
def test_token_score_equals_hugging_face_whatever_the_padding(client, alone, left: bool) -> None:
    rows = [
        [(start + step) % 21 for step in range(length)] for start, length in enumerate([1, 5, 12, 3, 12, 2])
    ]

    scores = score_tokens(client, *padded(rows, left=left))
    np.testing.assert_allclose(scores, [alone(row) for row in rows], atol=1e-5)


def test_token_requests_of_other_lengths_share_a_batch(client, alone) -> None:
    rows = [[(start + step) % 21 for step in range(1 + start % MAX_LENGTH)] for start in range(64)]
    with ThreadPoolExecutor(32) as pool:
        scores = list(pool.map(lambda row: score_tokens(client, *padded([row]))[0], rows))

    np.testing.assert_allclose(scores, [alone(row) for row in rows], atol=1e-5)


@pytest.mark.parametrize(
    ("ids", "mask", "expected"),
    [
        ([[0] * (MAX_LENGTH + 1)], [[1] * (MAX_LENGTH + 1)], "has 13 tokens, at most 12"),
        ([[0, 24]], [[1, 1]], r"outside 0\.\.23"),
        ([[0, -1]], [[1, 1]], r"outside 0\.\.23"),
        ([[0, 1]], [[0, 0]], "has no tokens"),
    ],
)
def test_a_bad_token_request_is_refused_as_the_callers_fault(client, ids, mask, expected: str) -> None:
    with pytest.raises(InferenceServerException, match=expected) as caught:
        score_tokens(client, np.array(ids), np.array(mask))
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_bad_requests_fail_alone_among_good_ones(client, alone) -> None:
    texts = [b"\xff\xfe" if index % 8 == 3 else LETTERS[: index % MAX_LENGTH].encode() for index in range(64)]

    def score_or_error(text: bytes) -> float | InferenceServerException:
        try:
            return float(score_texts(client, [text])[0])
        except InferenceServerException as error:
            return error

    with ThreadPoolExecutor(32) as pool:
        outcomes = list(pool.map(score_or_error, texts))
    for text, outcome in zip(texts, outcomes, strict=True):
        if text == b"\xff\xfe":
            assert isinstance(outcome, InferenceServerException) and "not UTF-8" in str(outcome)
        else:
            assert outcome == pytest.approx(alone(ids_of(text.decode())), abs=1e-5)


@pytest.mark.parametrize("form", ["text", "token"])
def test_the_server_states_the_spec_that_the_converter_returned(
    client, reward_model: RewardModel, form: str
) -> None:
    conversion = getattr(reward_model, form)
    reply = client.get_model_config(conversion.spec.name, client_timeout=DEADLINE_S)

    assert spec_from_model_config(reply.config) == conversion.spec
