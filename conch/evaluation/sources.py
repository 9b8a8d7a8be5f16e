"""Reward sources that watch an evaluation: asked apart, never learned from, and unable to stop a run."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from conch.log import get_logger
from conch.rewards.base import RewardSource
from conch.rewards.combined import submit_groups
from conch.rewards.scorer import total_reward
from conch.types import RewardResult, RewardStatus, Rollout

_log = get_logger(__name__)


class WatchingSource:
    """Asks one source for scores of an evaluation's completions. Whatever the source does, each completion
    gets a result: what raises, hangs or gives something else than scores is a failure with words.

    name: of the source in metrics and messages.
    longest_wait_s: longest wait for the scores of one evaluation, in seconds, beside the source's own
        deadlines: a Python function has none, and other ranks wait meanwhile.
    """

    def __init__(self, name: str, source: RewardSource, longest_wait_s: float) -> None:
        self.name = name
        self.seconds = 0.0
        """That the last `gather` waited."""
        self.requests = 0
        """That the last evaluation took; of a source that counts none, submits."""
        self.source = source
        self._longest_wait_s = longest_wait_s
        self._rollouts: Sequence[Rollout] = ()
        self._future: Future[list[RewardResult]] | None = None
        self._problem = ""
        self._requests_before = 0
        self._submits = 0
        self._fails = False

    @property
    def source_name(self) -> str:
        """What scores, as messages name it."""
        return self.source.name

    def submit(self, rollouts: Sequence[Rollout], *, group_size: int = 1) -> None:
        """Ask for scores and return at once.

        group_size: completions of a prompt, which stand together.
        """
        self._rollouts, self._problem = rollouts, ""
        if self._future is not None and not self._future.done():
            self._problem = f"{self.source_name} is still busy with an earlier evaluation"
            return
        self._future = None
        self._requests_before = self._count_requests()
        self._submits += 1
        try:
            self._future = submit_groups(self.source, rollouts, group_size)
        except Exception as error:
            self._problem = self._broke(error)

    def gather(self) -> list[RewardResult]:
        """Wait for the scores of what was submitted last: one result per rollout, in order.

        The first evaluation with failures is warned of, and the first without any behind it is told.
        """
        started = time.monotonic()
        results = self._results()
        self.seconds = time.monotonic() - started
        self.requests = max(0, self._count_requests() - self._requests_before)
        self._tell(results)
        return results

    def close(self) -> None:
        """Close the source."""
        self.source.close()

    def _results(self) -> list[RewardResult]:
        future = self._future
        if self._problem or future is None:
            return self._failures(self._problem)
        ended = threading.Event()  # `concurrent.futures.wait` sees no cancelled future of a user's
        future.add_done_callback(lambda _: ended.set())
        if not ended.wait(self._longest_wait_s):
            late = (
                f"{self.source_name} gave no scores within {self._longest_wait_s:g} s, half of "
                "`train.collective_timeout_s`, in which other processes wait for this one"
            )
            return self._failures(late, RewardStatus.TIMEOUT)
        error = None if future.cancelled() else future.exception()
        if future.cancelled() or error is not None:
            return self._failures("its request was cancelled" if error is None else self._broke(error))
        results: Any = future.result()
        if not isinstance(results, Sequence) or len(results) != len(self._rollouts):
            what = f"{len(results)} results" if isinstance(results, Sequence) else repr(results)[:80]
            return self._failures(f"{self.source_name} gave {what} for {len(self._rollouts)} samples")
        return [self._checked(result) for result in results]

    def _checked(self, result: Any) -> RewardResult:
        """The result, or a failure where it claims to be a score and is none."""
        if not isinstance(result, RewardResult):
            return self._failure(f"{self.source_name} gave {result!r:.80} instead of a RewardResult")
        try:
            total = float(total_reward(result, {}))
        except Exception as error:  # scores that are no numbers
            return self._failure(self._broke(error))
        if result.ok and not math.isfinite(total):
            return self._failure(f"{self.source_name} gave {total} for a score")
        return result

    def _failures(self, detail: str, status: RewardStatus = RewardStatus.INVALID) -> list[RewardResult]:
        return [self._failure(detail, status)] * len(self._rollouts)

    def _failure(self, detail: str, status: RewardStatus = RewardStatus.INVALID) -> RewardResult:
        return RewardResult(status, model=self.source_name, detail=detail)

    def _broke(self, error: BaseException) -> str:
        return f"{self.source_name} broke: {type(error).__name__}: {error}"

    def _count_requests(self) -> int:
        try:
            stats = self.source.stats()
        except Exception:  # a source of the user's: its counts are worth no run
            stats = None
        return self._submits if stats is None else stats.requests

    def _tell(self, results: Sequence[RewardResult]) -> None:
        failed = [result for result in results if not result.ok]
        if failed and not self._fails:
            _log.warning(
                "%s scored %d of %d completions of this process only; first: %s (%s); the run goes on, and "
                "this is told once until it scores all again",
                *(self.name, len(results) - len(failed), len(results)),
                *(failed[0].detail, failed[0].status.value),
            )
        elif self._fails and results and not failed:
            _log.info("%s scores all completions again", self.name)
        self._fails = bool(failed) or (self._fails and not results)
