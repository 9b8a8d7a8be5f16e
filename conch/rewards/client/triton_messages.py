"""Tensors of requests to a served reward model, and of its replies, as `conch.triton.contract` has them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from tritonclient.grpc import InferInput, InferRequestedOutput, InferResult

from conch.errors import RewardInvalidError
from conch.rewards.client.transport import ScoringRow
from conch.triton.contract import (
    MASK_INPUT,
    MEMBER_REWARDS,
    MEMBERS_USED,
    OUTPUT,
    STEP_ENDS,
    STEP_REWARDS,
    TEXT_INPUT,
    TOKEN_INPUT,
    RewardModelSpec,
)

Steps = tuple[list[int], list[float]]
"""Ends of a row's steps or tokens, as `conch.triton.contract` counts them, and their scores."""

MemberScores = dict[str, float | None]
"""Member of an ensemble -> its score of a row, None where it gave none."""

_INTEGERS = {"INT32": np.int32, "INT64": np.int64}


def encode(
    rows: Sequence[ScoringRow], spec: RewardModelSpec, pad_to: int = 1, *, dense: bool = False
) -> tuple[list[InferInput], list[InferRequestedOutput]]:
    """Make the input tensors of one request, and the outputs that it asks for.

    Inputs are `text` [n, 1], or `input_ids` and `attention_mask` [n, longest]. Outputs are the rewards, of an
    ensemble its members' scores and how many there are, and dense scores.

    pad_to: the longest row is padded to a multiple of this, but never beyond what the model takes.
    dense: asks for the scores of steps or tokens.
    """
    of_members = [MEMBER_REWARDS, MEMBERS_USED] if spec.members else []
    names = [OUTPUT, *of_members, *([STEP_REWARDS, STEP_ENDS] if dense else [])]
    return _inputs(rows, spec, pad_to), [InferRequestedOutput(name) for name in names]


def _inputs(rows: Sequence[ScoringRow], spec: RewardModelSpec, pad_to: int) -> list[InferInput]:
    if spec.form == "text":
        texts = np.array([[row.text.encode("utf-8")] for row in rows], dtype=object)
        return [_tensor(TEXT_INPUT, texts, "BYTES")]
    longest = max(len(row.token_ids) for row in rows)
    width = max(longest, min(-(-longest // pad_to) * pad_to, spec.max_length or 2**31))
    shape = (len(rows), width)
    ids = np.zeros(shape, dtype=_INTEGERS[spec.input_dtype])
    mask = np.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row.token_ids)] = row.token_ids
        mask[index, : len(row.token_ids)] = 1
    inputs = [_tensor(TOKEN_INPUT, ids, spec.input_dtype)]
    if spec.takes_attention_mask:
        inputs.append(_tensor(MASK_INPUT, mask, spec.input_dtype))
    return inputs


def read_scores(reply: InferResult, count: int, spec: RewardModelSpec) -> dict[str, list[float]]:
    """Read the scores of a reply to `count` rows, one column per reward name; the caller checks finiteness.

    Triton checks what goes into a model and nothing of what comes out, so everything is checked here.

    Raises:
        RewardInvalidError: output missing, wrong dtype or wrong shape.
    """
    scores = _read(reply, OUTPUT, spec.output_dtype, [count, len(spec.reward_names)])
    return {name: scores[:, column].tolist() for column, name in enumerate(spec.reward_names)}


def read_members_used(reply: InferResult, count: int, spec: RewardModelSpec) -> list[int]:
    """Read how many members of an ensemble gave each row's score; empty for any other model.

    Raises:
        RewardInvalidError: output missing, wrong dtype or wrong shape.
    """
    if not spec.members:
        return []
    return _read(reply, MEMBERS_USED, "INT32", [count, 1])[:, 0].tolist()


def read_member_scores(reply: InferResult, count: int, spec: RewardModelSpec) -> list[MemberScores]:
    """Read what each member of an ensemble gave each row; empty for any other model.

    A number that is not finite is no score. Members of the same name, as servers of before may state them,
    are numbered.

    Raises:
        RewardInvalidError: output missing, wrong dtype or wrong shape.
    """
    if not spec.members:
        return []
    names = [
        name if spec.members.count(name) == 1 else f"{name}#{number}"
        for number, name in enumerate(spec.members, 1)
    ]
    scores = _read(reply, MEMBER_REWARDS, "FP32", [count, len(names)])
    rows = scores.tolist()
    if not np.isfinite(scores).all():
        rows = [[score if math.isfinite(score) else None for score in row] for row in rows]
    return [dict(zip(names, row, strict=True)) for row in rows]


def read_steps(reply: InferResult, rows: Sequence[ScoringRow], spec: RewardModelSpec) -> list[Steps]:
    """Read where each row's steps or tokens end, and their scores, without the padding of short rows.

    Raises:
        RewardInvalidError: an output is missing, of a wrong dtype or shape, or a row has no step, one that
            does not follow on the one before or ends behind the sample, or a score that is no finite number.
    """
    ends = _read(reply, STEP_ENDS, "INT32", [len(rows), -1])
    scores = _read(reply, STEP_REWARDS, "FP32", list(ends.shape))
    return [
        _steps(row, row_ends, row_scores, spec)
        for row, row_ends, row_scores in zip(rows, ends, scores, strict=True)
    ]


def _steps(row: ScoringRow, ends: np.ndarray, scores: np.ndarray, spec: RewardModelSpec) -> Steps:
    count = int((ends >= 0).sum())
    ends, scores, rest = ends[:count], scores[:count], ends[count:]
    length = len(row.token_ids) if spec.form == "token" else len(row.sample)
    if count == 0 or (rest >= 0).any() or (np.diff(ends) < 0).any() or ends[-1] > length:
        raise RewardInvalidError(f"the reply's steps end at {ends.tolist()} in a sample of length {length}")
    if not np.isfinite(scores).all():
        raise RewardInvalidError(f"the reply's scores of steps are {scores.tolist()}")
    return ends.tolist(), scores.tolist()


def _read(reply: InferResult, name: str, dtype: str, expected: list[int]) -> np.ndarray:
    """expected: shape; -1 is any number."""
    tensor = reply.get_output(name)
    if tensor is None:
        raise RewardInvalidError(f"the reply has no output `{name}`")
    datatype, shape = tensor.datatype, list(tensor.shape)  # pyright: ignore[reportAttributeAccessIssue]
    if datatype != dtype:
        raise RewardInvalidError(f"the reply's dtype is {datatype}, expected {dtype}")
    if len(shape) != len(expected) or any(
        size != right for size, right in zip(shape, expected, strict=True) if right >= 0
    ):
        raise RewardInvalidError(f"the reply's shape is {shape}, expected {expected}: one row per sample")
    try:
        values = reply.as_numpy(name)
    except ValueError as error:
        raise RewardInvalidError(f"the reply's bytes do not fit its shape {shape}: {error}") from error
    assert values is not None
    return values


def _tensor(name: str, values: np.ndarray, datatype: str) -> InferInput:
    tensor = InferInput(name, list(values.shape), datatype)
    tensor.set_data_from_numpy(values)
    return tensor
