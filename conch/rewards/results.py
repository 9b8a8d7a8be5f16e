"""From a reply to results: whatever is not one finite score per sample becomes a status.

Nothing is guessed: a list that is too short or too long invalidates its whole call (nobody knows which sample
a score belongs to), a bad value only its own row. Samples are named by row and hash: they may be private.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from conch.types import DEFAULT_OBJECTIVE, RewardResult, RewardStatus


class _BadValueError(ValueError):
    """A value that is no score; the message says what it is instead."""


@dataclass(frozen=True, slots=True)
class ReplyParser:
    """Makes results of the reply to one call.

    who: source of the reply, in messages: "reward function `f`", "reward model `walks` at 127.0.0.1:8001".
    samples: scored texts, one per row.
    model: goes into the results.
    version: of the model; goes into the results.
    latency_s: seconds from the call to its reply.
    positions: number of each row in messages; None counts from 0.
    score_range: lowest and highest value that is a score; None takes any finite one.
    """

    who: str
    samples: Sequence[str]
    model: str
    version: str = ""
    latency_s: float = 0.0
    positions: Sequence[int] | None = None
    score_range: tuple[float, float] | None = None

    def failures(self, status: RewardStatus, detail: str) -> list[RewardResult]:
        """Return the same failure for every sample."""
        return [self._failure(status, detail)] * len(self.samples)

    def parse(self, reply: object, token_counts: Sequence[int]) -> list[RewardResult]:
        """Read a reply of any Python type: a list of numbers, of per-token lists, or a dict of lists.

        token_counts: tokens of each completion, the length that a dense reward must have.
        """
        plain = _plain(reply)
        if isinstance(plain, Mapping):
            return self.parse_columns(plain)
        if not _is_list(plain):
            return self.failures(RewardStatus.INVALID, self._expected(f"a {type(plain).__name__}"))
        rows = [_plain(row) for row in plain]
        if not any(_is_list(row) for row in rows):
            return self.parse_columns({DEFAULT_OBJECTIVE: rows})
        if len(rows) != len(self.samples):
            return self.failures(RewardStatus.INVALID, self._expected(f"{len(rows)} lists"))
        return [self._dense(row, values, token_counts[row]) for row, values in enumerate(rows)]

    def parse_columns(self, columns: Mapping[Any, Any]) -> list[RewardResult]:
        """Read scalar rewards: objective -> list of numbers."""
        if not columns:
            return self.failures(RewardStatus.INVALID, self._expected("an empty dict"))
        plain = {str(name): _plain(values) for name, values in columns.items()}
        for name, values in plain.items():
            where = "" if name == DEFAULT_OBJECTIVE else f" for objective `{name}`"
            if not _is_list(values):
                return self.failures(
                    RewardStatus.INVALID, self._expected(f"a {type(values).__name__}{where}")
                )
            if len(values) != len(self.samples):
                return self.failures(RewardStatus.INVALID, self._expected(f"{_counted(len(values))}{where}"))
        return [self._scalar(row, plain) for row in range(len(self.samples))]

    def _scalar(self, row: int, columns: Mapping[str, Sequence[Any]]) -> RewardResult:
        """Read a sample's objectives; of several, None says that one does not apply to the sample."""
        scores: dict[str, float] = {}
        absent = tuple(name for name, values in columns.items() if values[row] is None)
        if len(absent) == len(columns):
            what = "a score" if len(columns) == 1 else f"a score for any of its {len(columns)} objectives"
            return replace(self._bad_row(row, f"None instead of {what}"), absent=absent)
        for name, values in columns.items():
            if name in absent:
                continue
            try:
                scores[name] = self._in_range(_finite(_plain(values[row])))
            except _BadValueError as error:
                score = "a score" if name == DEFAULT_OBJECTIVE else f"a score for objective `{name}`"
                return self._bad_row(row, f"{error} instead of {score}")
        return RewardResult(
            RewardStatus.OK,
            scores=scores,
            model=self.model,
            version=self.version,
            latency_s=self.latency_s,
            absent=absent,
        )

    def _dense(self, row: int, values: Any, token_count: int) -> RewardResult:
        if not _is_list(values):
            return self._bad_row(
                row, f"{type(values).__name__} where other rows have a list of per-token scores"
            )
        if len(values) != token_count:
            return self._bad_row(
                row, f"{len(values)} per-token scores for a completion of {token_count} tokens"
            )
        try:
            scores = tuple(self._in_range(_finite(_plain(value))) for value in values)
        except _BadValueError as error:
            return self._bad_row(row, f"{error} among its per-token scores")
        return RewardResult(
            RewardStatus.OK,
            token_scores=scores,
            model=self.model,
            version=self.version,
            latency_s=self.latency_s,
        )

    def _in_range(self, score: float) -> float:
        if self.score_range is None or self.score_range[0] <= score <= self.score_range[1]:
            return score
        raise _BadValueError(f"{score:g}, outside reward.score_range {self.score_range},")

    def _expected(self, reply: str) -> str:
        return f"{self.who} returned {reply}, expected one score for each of {len(self.samples)} samples"

    def _bad_row(self, row: int, problem: str) -> RewardResult:
        position = row if self.positions is None else self.positions[row]
        where = name_row(position, self.samples[row])
        return self._failure(RewardStatus.INVALID, f"{self.who} returned {problem} for {where}")

    def _failure(self, status: RewardStatus, detail: str) -> RewardResult:
        return RewardResult(
            status, model=self.model, version=self.version, latency_s=self.latency_s, detail=detail
        )


def token_scores_fault(result: RewardResult) -> str:
    """Why a result is nothing for whoever takes one reward for a sample; "" if it is.

    Of scores for tokens the sum over objectives would be 0.
    """
    if not result.ok or result.token_scores is None:
        return ""
    return f"{result.model or 'the reward'} gives a score for each token, and here one for a sample is taken"


def refuse_token_scores(result: RewardResult) -> RewardResult:
    """Return the result; INVALID where it has scores for tokens."""
    fault = token_scores_fault(result)
    if not fault:
        return result
    return replace(result, status=RewardStatus.INVALID, token_scores=None, detail=fault)


def _counted(scores: int) -> str:
    return "1 score" if scores == 1 else f"{scores} scores"


def name_row(position: int, sample: str) -> str:
    """Name a sample in a message without showing it: by its position and the start of its SHA-256."""
    digest = hashlib.sha256(sample.encode("utf-8", "backslashreplace")).hexdigest()
    return f"row {position} (sample {digest[:8]})"


def _plain(value: Any) -> Any:
    # numpy arrays, torch tensors, pandas columns and their 0-d relatives all have `tolist`.
    return value.tolist() if hasattr(value, "tolist") else value


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def _finite(value: Any) -> float:
    # float("0.5") works, but a string is a mistake somewhere, not a score.
    if isinstance(value, (str, bytes, bytearray)):
        raise _BadValueError(type(value).__name__)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise _BadValueError(type(value).__name__) from None
    if not math.isfinite(number):
        raise _BadValueError(str(number))
    return number
