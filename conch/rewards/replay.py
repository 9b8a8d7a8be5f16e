"""Rewards on record: a line for every score, and a source that gives recorded scores again without a server.

A line names its sample by its SHA-256, never by its text. Floats are written so that reading gives the same
bits back.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

from conch.atomic_files import replace_text
from conch.errors import ConfigError
from conch.types import RewardResult, RewardStatus, Rollout

REWARDS_FILE = "rewards.jsonl"


def line_of(rollout: Rollout, result: RewardResult, **where: Any) -> dict[str, Any]:
    """A score with where it came from. where: the first keys of the line."""
    return {
        **where,
        "sample_sha256": sha256_of_sample(rollout.sample),
        "status": result.status.value,
        "scores": dict(result.scores),
        "token_scores": result.token_scores,
        "members": dict(result.members),
        "model": result.model,
        "version": result.version,
        "latency_s": result.latency_s,
        # Of a failure it may hold what a user's function said about the text.
        "detail": result.detail if result.ok else "",
    }


def sha256_of_sample(sample: str) -> str:
    """By what lines name a sample; halves of a surrogate pair count as their escapes."""
    return hashlib.sha256(sample.encode("utf-8", "backslashreplace")).hexdigest()


def append_lines(run_dir: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write behind what is there, in one go."""
    with (run_dir / REWARDS_FILE).open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def cut_lines(run_dir: Path, last_step: int, *, evaluated: bool) -> None:
    """Drop lines that a run which goes on after `last_step` writes again: of later steps, of the evaluation
    of that step unless it is `evaluated`, and one that a kill cut short."""
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
    """All whole lines."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


class ReplayReward:
    """Gives the scores that a run recorded: to the n-th occurrence of a sample the n-th of its lines, and the
    last of them from then on.

    rank: whose lines these are; samples that only other ranks had are taken from theirs.

    Raises:
        ConfigError: there is no such file, or it holds no recorded rewards.
    """

    wants_chunks = True  # the order of occurrences is that of rollouts, not that in which they end

    def __init__(self, path: Path, rank: int = 0) -> None:
        file = path / REWARDS_FILE if path.is_dir() else path
        self.name = f"recorded rewards of {file}"
        try:
            lines = _read(file)
            self._found = _by_sample(lines, rank)
        except (OSError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"`reward.replay` = {path} cannot be read as recorded rewards: {error}"
            ) from error
        if not lines:
            raise ConfigError(f"`reward.replay` = {path} holds no recorded rewards")

    def check(self) -> None:
        """See `RewardSource.check`: the file was read before."""

    def submit(self, rollouts: Sequence[Rollout]) -> Future[list[RewardResult]]:
        """See `RewardSource.submit`. A sample that was never recorded is INVALID."""
        future: Future[list[RewardResult]] = Future()
        future.set_result([self._next(rollout) for rollout in rollouts])
        return future

    def close(self) -> None:
        """See `RewardSource.close`: nothing is open."""

    def __enter__(self) -> ReplayReward:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _next(self, rollout: Rollout) -> RewardResult:
        digest = sha256_of_sample(rollout.sample)
        recorded = self._found.get(digest)
        if not recorded:
            wrong = (
                f"{self.name}: none of them is of sample {digest[:8]}; replay with the configuration, "
                "the seed and the number of processes of the run that recorded"
            )
            return RewardResult(RewardStatus.INVALID, model=self.name, detail=wrong)
        return recorded.popleft() if len(recorded) > 1 else recorded[0]


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
        model=line["model"],
        version=line["version"],
        latency_s=line["latency_s"],
        detail=line["detail"] if status is RewardStatus.OK else f"recorded as {status.value}",
    )
