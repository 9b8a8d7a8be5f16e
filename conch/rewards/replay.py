"""Rewards on record: writing a line for every score, and a source that reads them instead of a server.

A line names its sample by its SHA-256, never by its text. Floats are written so that reading gives the same
bits back.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from conch.atomic_files import replace_text
from conch.errors import ConfigError
from conch.rewards.base import RewardSource
from conch.types import RewardResult, RewardStatus, Rollout

REWARDS_FILE = "rewards.jsonl"


def line_of(rollout: Rollout, result: RewardResult, **where: Any) -> dict[str, Any]:
    """Make the line of one score.

    where: the first keys of the line: step, phase, rank; of a source that wants groups, `groups`.
    """
    return {
        **where,
        "sample_sha256": sha256_of_sample(rollout.sample),
        "status": result.status.value,
        "scores": dict(result.scores),
        "token_scores": result.token_scores,
        "members": dict(result.members),
        "absent": list(result.absent),
        "facts": facts_in_json(result),
        "model": result.model,
        "version": result.version,
        "latency_s": result.latency_s,
        # Of a failure it may hold what a user's function said about the text.
        "detail": result.detail if result.ok else "",
    }


def facts_in_json(result: RewardResult) -> dict[str, float | None]:
    """Return a result's facts with None for what does not apply: JSON has no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in result.facts.items()}


def sha256_of_sample(sample: str) -> str:
    """Return the name of a sample in the file; halves of a surrogate pair count as their escapes."""
    return hashlib.sha256(sample.encode("utf-8", "backslashreplace")).hexdigest()


def append_lines(run_dir: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Append lines to the run's file in one write."""
    with (run_dir / REWARDS_FILE).open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def cut_lines(run_dir: Path, last_step: int, *, evaluated: bool) -> None:
    """Drop the lines that a run resumed after `last_step` writes again, and one that a kill cut short.

    evaluated: False also drops the lines of that step's evaluation.
    """
    path = run_dir / REWARDS_FILE
    if not path.exists():
        return
    lines = [
        json.dumps(line) + "\n"
        for line in _read(path)
        if line["step"] < last_step or (line["step"] == last_step and (evaluated or line["phase"] == "train"))
    ]
    replace_text(path, "".join(lines))


def _read(path: Path) -> list[dict[str, Any]]:
    """Return all whole lines."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


class ReplayReward(RewardSource):
    """Gives the scores that a run recorded.

    The n-th occurrence of a sample gets the n-th of its lines, every later one the last line.

    path: a run's folder, or its rewards file.
    rank: rank whose lines are taken; samples that only other ranks had are taken from theirs.

    Raises:
        ConfigError: there is no such file, or it holds no recorded rewards.
    """

    batched = True  # the order of occurrences is that of rollouts, not that in which they end

    def __init__(self, path: Path, rank: int = 0) -> None:
        file = path / REWARDS_FILE if path.is_dir() else path
        self.name = f"recorded rewards of {file}"
        try:
            lines = _read(file)
            self._recorded = _by_sample(lines, rank)
            self.measures_facts = any(line.get("facts") for line in lines)
            self.needs_groups = any(line.get("groups") for line in lines)
        except (OSError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"`reward.replay` = {path} cannot be read as recorded rewards: {error}"
            ) from error
        if not lines:
            raise ConfigError(f"`reward.replay` = {path} holds no recorded rewards")

    def check(self) -> None:
        """Do nothing: the constructor has read the file."""

    def submit(self, rollouts: Sequence[Rollout]) -> Future[list[RewardResult]]:
        """Return recorded results. A sample that was never recorded is INVALID."""
        future: Future[list[RewardResult]] = Future()
        future.set_result([self._next(rollout) for rollout in rollouts])
        return future

    def _next(self, rollout: Rollout) -> RewardResult:
        digest = sha256_of_sample(rollout.sample)
        results = self._recorded.get(digest)
        if not results:
            detail = (
                f"{self.name}: none of them is of sample {digest[:8]}; replay with the configuration, "
                "the seed and the number of processes of the run that recorded"
            )
            return RewardResult(RewardStatus.INVALID, model=self.name, detail=detail)
        return results.popleft() if len(results) > 1 else results[0]


def _by_sample(lines: Sequence[Mapping[str, Any]], rank: int) -> dict[str, deque[RewardResult]]:
    own: dict[str, deque[RewardResult]] = defaultdict(deque)
    others: dict[str, deque[RewardResult]] = defaultdict(deque)
    for line in lines:
        (own if line["rank"] == rank else others)[line["sample_sha256"]].append(_result(line))
    return {**others, **own}


def _result(line: Mapping[str, Any]) -> RewardResult:
    status, dense = RewardStatus(line["status"]), line["token_scores"]
    return RewardResult(
        status,
        scores=dict(line["scores"]),
        token_scores=None if dense is None else tuple(dense),
        members=dict(line["members"]),
        absent=tuple(line.get("absent", ())),
        facts={name: math.nan if value is None else value for name, value in line.get("facts", {}).items()},
        model=line["model"],
        version=line["version"],
        latency_s=line["latency_s"],
        detail=line["detail"] if status is RewardStatus.OK else f"recorded as {status.value}",
    )
