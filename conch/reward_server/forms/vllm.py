"""The forms of vLLM's and SGLang's own servers, which verl and others ask.

vLLM (`vllm/entrypoints/pooling/`): "model", and "input" (a text or several) or "messages"
    /classify   -> {"data": [{"index", "label", "probs": [number], "num_classes": 1}], ...}
    /pooling    -> {"data": [{"index", "object": "pooling", "data": [number]}], ...}
    /v1/embeddings
                -> {"data": [{"index", "object": "embedding", "embedding": [number]}], ...}
                In both, "encoding_format": "base64" makes a text of the list, its float32 in little-endian
                order; OpenAI's client sends that unless it is told otherwise.
    /score      pairs under text_1, text_2; data_1, data_2; queries, documents; queries, items
                -> {"data": [{"index", "object": "score", "score": number}], ...}
    /rerank     {"query", "documents", "top_n"}
                -> {"results": [{"index", "document", "relevance_score"}], ...}
verl (`verl/experimental/reward_loop/reward_loop.py`) POSTs {"model", "input", "use_activation": false}, one
rendered dialogue at a time ("activation" in earlier releases), and takes data[-1].probs[-1]. With SGLang as
its engine it asks /v1/embeddings and takes data[-1].embedding[-1].
SGLang's /classify has the texts under "text" and answers a list of {"embedding": [number]}.

verl asks again after 5xx and gives up after 4xx, so what may pass is 503 here, never 429.
"""

from __future__ import annotations

import base64
import struct
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from conch.reward_server.forms.base import (
    BAD_REQUEST,
    UNAVAILABLE,
    UNPROCESSABLE,
    Body,
    Form,
    Question,
    Reader,
    RefusedError,
    Scores,
    texts,
)

_PAIRS = (("text_1", "text_2"), ("data_1", "data_2"), ("queries", "documents"), ("queries", "items"))
_FLOAT = "float"
_USAGE = {"prompt_tokens": 0, "total_tokens": 0, "completion_tokens": 0}


def _openai_error(status: int, reason: str) -> dict[str, Any]:
    kind = "BadRequestError" if status < 500 else "InternalServerError"
    return {"error": {"message": reason, "type": kind, "param": None, "code": status}, "detail": reason}


_Tell = Callable[[Scores], Any]


def _listed(prefix: str, entry: Callable[[int, float], dict[str, Any]]) -> _Tell:
    """An answer with an entry per sample, made of its index and its reward."""

    def tell(scores: Scores) -> dict[str, Any]:
        return {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": scores.model,
            "data": [entry(index, total) for index, total in enumerate(scores.totals)],
            "usage": _USAGE,
        }

    return tell


def _reader_of_inputs(tells: Mapping[str, _Tell]) -> Callable[[Body, Reader], Question]:
    """Read texts or one dialogue. tells: `encoding_format` -> the answer in it."""

    def read(body: Body, reader: Reader) -> Question:
        _refuse_what_is_not_done(body, tuple(tells))
        tell = tells[body.get("encoding_format") or _FLOAT]
        if "input" not in body:
            return Question([reader.messages(body["messages"], body=body)], tell)
        if isinstance(body["input"], list) and not all(isinstance(each, str) for each in body["input"]):
            raise RefusedError(
                BAD_REQUEST, "`input` holds token ids: this server has no tokenizer, send texts or messages"
            )
        return Question([reader.text(text) for text in texts(body, "input")], tell)

    return read


def _refuse_what_is_not_done(body: Body, encodings: Sequence[str] = (_FLOAT,)) -> None:
    if body.get("activation") or body.get("use_activation"):
        raise RefusedError(
            BAD_REQUEST, "rewards are told as they are, without a sigmoid: send `use_activation`: false"
        )
    if (body.get("encoding_format") or _FLOAT) not in encodings:
        raise RefusedError(BAD_REQUEST, f"`encoding_format` is {' or '.join(encodings)} here")
    if (body.get("embed_dtype") or "float32") != "float32" or body.get("endianness") == "big":
        raise RefusedError(BAD_REQUEST, "base64 holds float32 here, little-endian: no other `embed_dtype`")


def _read_score(body: Body, reader: Reader) -> Question:
    _refuse_what_is_not_done(body)
    keys = next((pair for pair in _PAIRS if set(pair) <= body.keys()), None)
    if keys is None:
        raise RefusedError(
            BAD_REQUEST, f"pairs stand under {' or '.join(' and '.join(each) for each in _PAIRS)}"
        )
    left, right = (texts(body, key) for key in keys)
    if len(left) not in (1, len(right)):
        raise RefusedError(
            BAD_REQUEST,
            f"`{keys[0]}` has {len(left)} texts: one, or as many as the {len(right)} of `{keys[1]}`",
        )
    first = left * len(right) if len(left) == 1 else left
    rollouts = [reader.answered(prompt, answer, {}) for prompt, answer in zip(first, right, strict=True)]
    return Question(rollouts, _tell_score)


def _read_rerank(body: Body, reader: Reader) -> Question:
    _refuse_what_is_not_done(body)
    query, documents, top_n = body["query"], texts(body, "documents"), body.get("top_n") or 0
    if not isinstance(query, str) or not isinstance(top_n, int):
        raise RefusedError(BAD_REQUEST, "`query` is a text, `top_n` a number")

    def tell(scores: Scores) -> dict[str, Any]:
        order = sorted(range(len(documents)), key=lambda index: -scores.totals[index])
        results = [
            {"index": index, "document": {"text": documents[index]}, "relevance_score": scores.totals[index]}
            for index in order[: top_n or None]
        ]
        return {
            "id": f"rerank-{uuid.uuid4().hex}",
            "model": scores.model,
            "usage": _USAGE,
            "results": results,
        }

    return Question([reader.answered(query, document, {}) for document in documents], tell)


def _read_sglang(body: Body, reader: Reader) -> Question:
    rollouts = [reader.text(text) for text in texts(body, "text")]
    single = isinstance(body["text"], str)

    def tell(scores: Scores) -> Any:
        listed = [{"embedding": [total], "meta_info": {}} for total in scores.totals]
        return listed[0] if single else listed

    return Question(rollouts, tell)


_tell_score = _listed("score", lambda index, total: {"index": index, "object": "score", "score": total})
_tell_classes = _listed(
    "classify",
    lambda index, total: {"index": index, "label": "LABEL_0", "probs": [total], "num_classes": 1},
)


def _encoded(total: float) -> str:
    """A list of one reward in base64: float32, little-endian."""
    try:
        content = struct.pack("<f", total)
    except OverflowError:
        raise RefusedError(
            UNPROCESSABLE, f"the reward {total:g} is beyond float32: ask for `float`"
        ) from None
    return base64.b64encode(content).decode("ascii")


def _tells(prefix: str, kind: str, key: str) -> dict[str, _Tell]:
    """`encoding_format` -> the answer whose entries have the reward under `key`."""
    return {
        name: _listed(
            prefix, lambda index, total, encode=encode: {"index": index, "object": kind, key: encode(total)}
        )
        for name, encode in {_FLOAT: lambda total: [total], "base64": _encoded}.items()
    }


class _InputForm(Form):
    """A form with texts, or with one dialogue."""

    def fits(self, body: object) -> bool:
        """Whether it has one of them."""
        return isinstance(body, dict) and ("input" in body or "messages" in body)


_INPUT = '{"model": name, "input": text or [text, ...]}, or "messages" in place of "input"'


def _input_form(name: str, tells: Mapping[str, _Tell]) -> Form:
    return _InputForm(name, _INPUT, frozenset(), _reader_of_inputs(tells), _openai_error, UNAVAILABLE)


CLASSIFY = _input_form("classify", {_FLOAT: _tell_classes})
POOLING = _input_form("pooling", _tells("pool", "pooling", "data"))
EMBEDDINGS = _input_form("embeddings", _tells("embd", "embedding", "embedding"))
SGLANG = Form(
    "sglang", '{"text": text or [text, ...]}', frozenset({"text"}), _read_sglang, _openai_error, UNAVAILABLE
)
SCORE = Form(
    "score",
    '{"text_1": text or [text, ...], "text_2": [text, ...]}, or "queries" and "documents"',
    frozenset(),
    _read_score,
    _openai_error,
    UNAVAILABLE,
)
RERANK = Form(
    "rerank",
    '{"query": text, "documents": [text, ...], "top_n": number}',
    frozenset({"query", "documents"}),
    _read_rerank,
    _openai_error,
    UNAVAILABLE,
)
