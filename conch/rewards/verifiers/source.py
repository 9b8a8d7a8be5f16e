"""A reward source around a verifier."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from conch.errors import ConchError, DataError, first_line
from conch.rewards.base import ClientStats, RewardSource
from conch.rewards.client.event_loop import LoopThread
from conch.rewards.combined import when_all_done
from conch.rewards.replay import sha256_of_sample
from conch.rewards.verifiers.base import Verdict, Verifier
from conch.rewards.verifiers.pool import CheckDiedError, CheckPool
from conch.types import RewardResult, RewardStatus, Rollout


class VerifierReward(RewardSource):
    """Scores completions by a verifier: its scores are the objectives, its facts are measured.

    Checks run in one thread, those of a verifier with a `timeout_s` in processes of their own: one that is
    late, or whose process died, has the status TIMEOUT, and INVALID where the sample had been late before it
    was asked for again, since that does not help. Two facts are added: `length_right` and `length_wrong`, the
    tokens of completions whose fact `verifier.success` is at least 1, and of the others.
    """

    measures_facts = True

    def __init__(self, verifier: Verifier[Any]) -> None:
        self.name = f"verifier {verifier.name}"
        self._verifier = verifier
        # A daemon: a check of a verifier of the user's that never returns keeps no program from ending.
        self._thread = LoopThread(f"verify-{verifier.name}")
        self._pool: CheckPool | None = None
        self._num_checks = 0
        self._late: set[str] = set()

    @property
    def columns(self) -> tuple[str, ...]:
        """Keys of a prompt's row that the verifier reads."""
        return self._verifier.columns

    def check(self) -> None:
        """Start the processes of a verifier that has some."""
        if self._verifier.timeout_s is not None and self._pool is None:
            self._pool = CheckPool(self._verifier)

    def check_row(self, row: Mapping[str, Any]) -> None:
        self._read_key(row)

    def submit(self, rollouts: Sequence[Rollout]) -> Future[list[RewardResult]]:
        self._num_checks += len(rollouts)
        self.check()
        if self._pool is None:
            return self._thread.submit(self._verify_here(list(rollouts)))
        checks = [self._in_process(self._pool, rollout) for rollout in rollouts]
        return when_all_done(checks, lambda: [check.result() for check in checks])

    def stats(self) -> ClientStats:
        """Counts of checks."""
        return ClientStats(requests=self._num_checks)

    def close(self) -> None:
        """Cancel what is under way, and end the processes; a check that does not return is left behind."""
        self._thread.close()
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    async def _verify_here(self, rollouts: Sequence[Rollout]) -> list[RewardResult]:
        def verdict(rollout: Rollout) -> Any:
            return self._verifier.verify(rollout.completion.text, self._read_key(rollout.prompt.metadata))

        return [
            self._result(each, lambda each=each: verdict(each), time.monotonic(), late_before=False)
            for each in rollouts
        ]

    def _in_process(self, pool: CheckPool[Any], rollout: Rollout) -> Future[RewardResult]:
        started = time.monotonic()
        # Looked up now, not when the check ends: one that is the same and asked for together is no retry.
        late_before = sha256_of_sample(rollout.sample) in self._late
        result: Future[RewardResult] = Future()
        try:
            check = pool.submit(rollout.completion.text, self._read_key(rollout.prompt.metadata))
        except DataError as error:
            result.set_result(self._failure(rollout, error, started, late_before))
        else:
            check.add_done_callback(
                lambda check: result.set_result(self._result(rollout, check.result, started, late_before))
            )
        return result

    def _read_key(self, row: Mapping[str, Any]) -> Any:
        try:
            return self._verifier.read_key(row)
        except ConchError:
            raise
        except Exception as error:  # of a verifier of the user's
            raise DataError(f"cannot be read: {type(error).__name__}: {first_line(error)}") from error

    def _result(
        self, rollout: Rollout, verdict: Callable[[], Any], started: float, late_before: bool
    ) -> RewardResult:
        """Say what came of one check. Nothing is raised, whatever a verifier of the user's does or gives:
        whoever waits for the result would wait for ever, and so would the other ranks."""
        try:
            return self._success(rollout, verdict(), started)
        except BaseException as error:
            return self._failure(rollout, error, started, late_before)

    def _success(self, rollout: Rollout, verdict: Any, started: float) -> RewardResult:
        if not isinstance(verdict, Verdict):
            gave = f"{self.name} gave {verdict!r:.80} instead of a Verdict"
            return self._failed(RewardStatus.INVALID, gave, started)
        scores, facts = _as_numbers(verdict.scores), _as_numbers(verdict.facts)
        bad = next((name for name, score in scores.items() if not math.isfinite(score)), None)
        if bad is not None or not scores:
            what = f"{verdict.scores[bad]!r} for `{bad}`" if bad is not None else "no score"
            return self._failed(RewardStatus.INVALID, f"{self.name} gave {what}", started)
        return RewardResult(
            RewardStatus.OK,
            scores=scores,
            model=self._verifier.name,
            latency_s=time.monotonic() - started,
            facts={**facts, **self._lengths(rollout, facts)},
        )

    def _lengths(self, rollout: Rollout, facts: Mapping[str, float]) -> dict[str, float]:
        success = facts.get(self._verifier.success, math.nan)
        length = float(len(rollout.completion.token_ids))
        return {
            "length_right": length if success >= 1 else math.nan,
            "length_wrong": length if success < 1 else math.nan,
        }

    def _failure(
        self, rollout: Rollout, error: BaseException, started: float, late_before: bool
    ) -> RewardResult:
        if isinstance(error, DataError):
            return self._failed(RewardStatus.INVALID, f"{self.name}: the prompt's row {error}", started)
        if self._pool is None or not isinstance(error, (TimeoutError, CheckDiedError)):
            broke = f"{self.name} broke: {type(error).__name__}: {first_line(error)}"
            return self._failed(RewardStatus.INVALID, broke, started)
        sample = sha256_of_sample(rollout.sample)
        self._late.add(sample)
        status = RewardStatus.INVALID if late_before else RewardStatus.TIMEOUT
        again = ", as before" if late_before else ""
        late = first_line(error).removeprefix(f"{self._verifier.name}: ")
        return self._failed(status, f"{self.name}: {late}{again} (sample {sample[:8]})", started)

    def _failed(self, status: RewardStatus, detail: str, started: float) -> RewardResult:
        latency_s = time.monotonic() - started
        return RewardResult(status, model=self._verifier.name, latency_s=latency_s, detail=detail)


def _as_numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The values as they can be stored and sent, of NumPy's types too; NaN for one that is no number."""
    return {name: _as_number(value) for name, value in values.items()}


def _as_number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
