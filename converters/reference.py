"""The original model as the measure: float32, one sample at a time, without padding.

Its rules are written here a second time, for one row of Python numbers, and share nothing with `model.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from conch.converters.cases import Case
from conch.converters.checkpoint import Checkpoint
from conch.converters.full_precision import in_float32
from conch.converters.parity import GOLDEN_TOLERANCES
from conch.errors import ConversionError
from conch.log import progress
from conch.serving.manifest import Golden, GoldenSample
from conch.serving.spec import Form

Expected = dict[tuple[int, ...], tuple[float, ...]]
"""Token ids -> one score per reward."""

_GOLDEN_SAMPLES = 8


def expected_scores(checkpoint: Checkpoint, cases: Iterable[Case]) -> Expected:
    """What the original says of every sample that has tokens.

    Raises:
        ConversionError: the model itself fails on a sample, or scores it with NaN or infinity.
    """
    rows = dict.fromkeys(sample.ids for case in cases for sample in case.samples if sample.ids)
    with in_float32(checkpoint.model):
        return {
            ids: _normalised(checkpoint, _raw_scores(checkpoint, ids))
            for ids in progress(list(rows), desc="scoring with the original")
        }


def golden_of(cases: Sequence[Case], form: Form, expected: Expected, dtype: str) -> Golden:
    """Eight samples of the cases, with the original's scores."""
    samples = list(dict.fromkeys(sample for case in cases for sample in case.samples if sample.ids))
    step = max(1, len(samples) // _GOLDEN_SAMPLES)
    chosen = samples[::step][:_GOLDEN_SAMPLES]
    return Golden(
        tolerance=GOLDEN_TOLERANCES[dtype],
        samples=tuple(
            GoldenSample(text=sample.text, scores=expected[sample.ids])
            if form == "text"
            else GoldenSample(input_ids=sample.ids, scores=expected[sample.ids])
            for sample in chosen
        ),
    )


def _normalised(checkpoint: Checkpoint, raw: list[float]) -> tuple[float, ...]:
    chosen = raw if checkpoint.columns is None else [raw[column] for column in checkpoint.columns]
    if checkpoint.normalise == "none":
        return tuple(chosen)
    assert checkpoint.mean is not None and checkpoint.std is not None
    return tuple((score - m) / s for score, m, s in zip(chosen, checkpoint.mean, checkpoint.std, strict=True))


@torch.inference_mode()
def _raw_scores(checkpoint: Checkpoint, ids: tuple[int, ...]) -> list[float]:
    """All outputs of the head."""
    row = torch.tensor([ids], device=checkpoint.model.device)
    inputs = {"input_ids": row, "attention_mask": torch.ones_like(row)}
    try:
        if checkpoint.pooling == "hf":
            scores = checkpoint.model(**inputs).logits[0].double().tolist()
        else:
            states = checkpoint.trunk(**inputs).last_hidden_state[0].double()
            scores = _pooled_scores(checkpoint, ids, states)
    except Exception as error:  # torch raises many kinds; a stack of its frames helps nobody
        raise ConversionError(
            f"the checkpoint itself fails on a sample of {len(ids)} tokens: {error}; "
            "if that is longer than its window, give a lower --max_length"
        ) from error
    if not all(map(math.isfinite, scores)):
        raise ConversionError(f"the checkpoint itself scores a sample of {len(ids)} tokens with {scores}")
    return scores


def _pooled_scores(checkpoint: Checkpoint, ids: tuple[int, ...], states: Tensor) -> list[float]:
    head, eos = checkpoint.head, checkpoint.tokenizer.eos_token_id
    assert head is not None
    outputs = states @ head.weight.double().T.to(states.device)
    if head.bias is not None:
        outputs = outputs + head.bias.double().to(states.device)
    per_token = outputs.tolist()
    if checkpoint.pooling == "steps":
        return _step_scores(checkpoint, ids, per_token)
    if checkpoint.pooling == "mean":  # the head is linear: the mean of its outputs is its output of the mean
        return [sum(column) / len(ids) for column in zip(*per_token, strict=True)]
    where = {"cls": 0, "last_token": len(ids) - 1}.get(checkpoint.pooling)
    if where is None:
        where = ids.index(eos) if eos in ids else len(ids) - 1
    return per_token[where]


def _step_scores(checkpoint: Checkpoint, ids: tuple[int, ...], per_token: list[list[float]]) -> list[float]:
    scores = [row if len(row) == 1 else _softmax(row) for row in per_token]
    words = [place for place, token in enumerate(ids) if token != checkpoint.tokenizer.eos_token_id]
    last = words[-1] if words else len(ids) - 1
    ends = {place for place, token in enumerate(ids) if token == checkpoint.separator_id} | {last}
    steps = [scores[place] for place in sorted(ends)]
    if checkpoint.aggregate == "last":
        return scores[last]
    combine: dict[str, Callable[[Any], float]] = {"min": min, "prod": math.prod, "mean": _mean}
    return [combine[str(checkpoint.aggregate)](column) for column in zip(*steps, strict=True)]


def _softmax(row: list[float]) -> list[float]:
    powers = [math.exp(value - max(row)) for value in row]
    return [power / sum(powers) for power in powers]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
