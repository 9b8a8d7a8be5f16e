"""Rows to results: what waits at the rewards is bounded, and results come in the order of the rows."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from conch.errors import RewardInvalidError, RewardUnavailableError
from conch.rewards.base import RewardSource
from conch.rewards.results import refuse_token_scores
from conch.rewards.score import line_of, refused_row
from conch.rewards.scorer import total_reward
from conch.scoring.forms import Request, RowForm
from conch.scoring.reading import InputRow
from conch.types import RewardResult, RewardStatus

OURS = "conch_"
"""In front of the name of a column of the output where the input has one of that name."""
FROM_INPUT = ("subset", "id")
"""Columns of the output that repeat one of the input."""


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """A row with what came of it.

    row: as it was read.
    request: what was asked for it.
    results: of each source, one for each of the request's samples; of a row that could not be asked for, the
        same failure of each source.
    """

    row: InputRow
    request: Request
    results: tuple[tuple[RewardResult, ...], ...]

    @property
    def is_late(self) -> bool:
        """Whether it was asked for in vain, and may be had another time."""
        return any(each.status.is_infrastructure for results in self.results for each in results)


def scored_rows(
    rows: Iterable[InputRow],
    form: RowForm,
    sources: Sequence[RewardSource],
    *,
    rows_at_once: int,
    parts_ahead: int,
) -> Iterator[list[ScoredRow]]:
    """Yield parts of `rows_at_once` rows, in order, while the next ones are under way.

    sources: each is asked for each row.
    parts_ahead: parts that are under way at most.
    """
    waiting: deque[_Part] = deque()
    rows = iter(rows)
    while part := list(itertools.islice(rows, rows_at_once)):
        waiting.append(_submit(part, form, sources))
        if len(waiting) == parts_ahead:
            yield waiting.popleft().gather()
    while waiting:
        yield waiting.popleft().gather()


@dataclass(frozen=True, slots=True)
class _Part:
    rows: Sequence[InputRow]
    requests: Sequence[Request]
    futures: Sequence[Future[list[RewardResult]]]

    def gather(self) -> list[ScoredRow]:
        """Wait for the results, and sort them to their rows."""
        columns = [iter(future.result()) for future in self.futures]
        return [
            ScoredRow(row, request, tuple(_results_of(request, column) for column in columns))
            for row, request in zip(self.rows, self.requests, strict=True)
        ]


def _results_of(request: Request, column: Iterator[RewardResult]) -> tuple[RewardResult, ...]:
    if request.problem:
        return (refused_row(request.problem),)
    return tuple(map(refuse_token_scores, itertools.islice(column, len(request.samples))))


def _submit(part: Sequence[InputRow], form: RowForm, sources: Sequence[RewardSource]) -> _Part:
    requests = [form.request(row, sources) for row in part]
    samples = [sample for request in requests for sample in request.samples]
    return _Part(part, requests, [source.submit(samples) for source in sources])


# ----------------------------------------------------------------------------------------------- output lines


@dataclass(frozen=True, slots=True)
class Lines:
    """Makes the output line of a row.

    objective: the one that pairs and differences are about; None takes the sum of all.
    """

    objective: str | None = None

    def line(self, index: int, scored: ScoredRow) -> dict[str, Any]:
        """What is written of a row; without numbers where there is no score.

        Raises:
            RewardInvalidError: the reward has not the objective.
        """
        own, *others = scored.results
        line = self._line(index, scored.request, own)
        if not others:
            return line
        other = self._line(index, scored.request, others[0])
        line["against"] = {name: other[name] for name in other if name not in ("index", *FROM_INPUT)}
        if line["status"] == "ok" == other["status"]:
            if not any(self.objective in result.absent for result in (*own, *others[0])):
                line["difference"] = self._difference(own, others[0])
        elif line["status"] == "ok":
            line |= {"status": other["status"], "detail": f"the other reward: {other.get('detail', '')}"}
        return line

    def _difference(self, own: Sequence[RewardResult], others: Sequence[RewardResult]) -> Any:
        """Scores less the other reward's: one of a sample, one for each answer of a pair."""
        both = zip(own, others, strict=True)
        differences = [self.number(one) - self.number(other) for one, other in both]
        return differences[0] if len(differences) == 1 else differences

    def _line(self, index: int, request: Request, results: Sequence[RewardResult]) -> dict[str, Any]:
        if request.num_chosen is None and len(results) == 1:
            if results[0].ok:
                self.number(results[0])  # says whether there is such an objective
            return line_of(index, results[0])
        return self._pair(index, request, results)

    def _pair(self, index: int, request: Request, results: Sequence[RewardResult]) -> dict[str, Any]:
        failed = next((place for place, each in enumerate(results) if self._lacks(each)), None)
        named: dict[str, Any] = {"subset": request.subset} if request.subset else {}
        named |= {} if request.id is None else {"id": request.id}
        if failed is not None:
            result = results[failed]
            which = "chosen" if failed < (request.num_chosen or 0) else "rejected"
            status = RewardStatus.INVALID if result.ok else result.status
            detail = f"{which}: {result.detail or f'`{self.objective}` does not apply to it'}"
            return {"index": index, "status": status.value, **named, "detail": detail}
        numbers = [self.number(result) for result in results]
        chosen, rejected = numbers[: request.num_chosen], numbers[request.num_chosen :]
        in_lists = request.in_lists
        margin = min(chosen) - max(rejected)
        # Of answers that score alike one is drawn: of two, each is right by one half.
        return {
            "index": index,
            "status": "ok",
            "chosen_score": chosen if in_lists[0] else chosen[0],
            "rejected_score": rejected if in_lists[1] else rejected[0],
            "margin": margin,
            "correct": 1 / (1 + rejected.count(min(chosen))) if margin == 0 else float(margin > 0),
            **named,
            "model": results[0].model,
            "version": results[0].version,
        }

    def _lacks(self, result: RewardResult) -> bool:
        return not result.ok or self.objective in result.absent

    def number(self, result: RewardResult) -> float:
        """A score as one number.

        Raises:
            RewardInvalidError: the reward has not the objective.
        """
        if self.objective is None:
            return total_reward(result, {})
        if self.objective not in {**result.scores, **dict.fromkeys(result.absent)}:
            raise RewardInvalidError(
                f"--objective {self.objective}: {result.model} gives {', '.join(result.scores)}"
            )
        return result.scores.get(self.objective, math.nan)


def own_columns(row: InputRow) -> dict[str, Any]:
    """The columns of an input row: of a text the column `text`, of a list of messages `messages`."""
    if row.broken:
        return {}
    if isinstance(row.value, Mapping):
        return dict(row.value)
    return {"messages" if isinstance(row.value, list) else "text": row.value}


def output_name(name: str, own: Iterable[str]) -> str | None:
    """What a column of ours is called behind those of the input; None where it says nothing new.

    An input that is an output of this command already has `conch_` columns, which stay its own.
    """
    taken = [each for each in own if each.endswith(name) and _plain_name(each) == _plain_name(name)]
    if name in FROM_INPUT and name in taken:
        return None
    return OURS + max(taken, key=len) if taken else name


def _plain_name(name: str) -> str:
    """A name without any `conch_` in front."""
    while name.startswith(OURS):
        name = name.removeprefix(OURS)
    return name


def with_columns(line: Mapping[str, Any], row: InputRow) -> dict[str, Any]:
    """A line behind the columns of its row."""
    own = own_columns(row)
    named = ((output_name(name, own), value) for name, value in line.items())
    return {**own, **{name: value for name, value in named if name is not None}}


def ours_of(line: Mapping[str, Any]) -> dict[str, Any]:
    """What is ours of a line that has the columns of its row as well, by our names.

    Of several columns of a name, ours has the most `conch_` in front.
    """
    return {_plain_name(name): line[name] for name in sorted(line, key=len)}


def stop_if_away(part: Sequence[ScoredRow], who: str) -> None:
    """Raise RewardUnavailableError where a server was away, or all of a part was asked for in vain."""
    asked = [scored for scored in part if scored.request.samples]
    failed = [each for scored in asked for results in scored.results for each in results if not each.ok]
    away = next((each for each in failed if each.status is RewardStatus.UNAVAILABLE), None)
    if away is None and asked and all(scored.is_late for scored in asked):
        away = next(each for each in failed if each.status.is_infrastructure)
    if away is None:
        return
    raise RewardUnavailableError(
        f"{who} went away: {away.detail}; what was scored is kept, and the same command goes on from there"
    )
