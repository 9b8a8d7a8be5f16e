"""Known scores, and whether they are still the served model's: scores of two models are never mixed."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import replace

from conch.config import OnModelChange
from conch.log import get_logger
from conch.rewards.client.transport import ModelInfo, ScoringRow
from conch.types import RewardResult

_log = get_logger(__name__)
_MOST_NUMBERS = 4_000_000
"""In scores for tokens that are kept, of 32 bytes each."""
_SAME_MODEL = "replicas of one reward must serve the same model: load the same version on all of them"


class ScoreCache:
    """The latest `size` scores, by a hash of the row: small, whatever the texts are. Of results that have a
    score for each token, as many as fit."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._results: OrderedDict[bytes, RewardResult] = OrderedDict()
        self._numbers = 0

    def __len__(self) -> int:
        return len(self._results)

    def get(self, row: ScoringRow) -> RewardResult | None:
        """Return the result of an equal row, with a latency of 0; None if there is none."""
        key = _key(row)
        result = self._results.get(key)
        if result is None:
            return None
        self._results.move_to_end(key)
        return replace(result, latency_s=0.0)

    def add(self, row: ScoringRow, result: RewardResult) -> None:
        """Add a result; the least recently used ones go."""
        key = _key(row)
        before = self._results.pop(key, None)
        self._results[key] = result
        self._numbers += _numbers(result) - (0 if before is None else _numbers(before))
        while len(self._results) > self._size or self._numbers > _MOST_NUMBERS:
            self._numbers -= _numbers(self._results.popitem(last=False)[1])

    def clear(self) -> None:
        """Drop all results: the model is another."""
        self._results.clear()
        self._numbers = 0


def _numbers(result: RewardResult) -> int:
    return len(result.token_scores or ())


def _key(row: ScoringRow) -> bytes:
    digest = hashlib.blake2b(row.sample.encode("utf-8"), digest_size=16)
    if row.dialogue:
        digest.update(b"\0" + row.dialogue.encode("utf-8"))
    for numbers in (row.token_ids, row.bounds):
        if numbers:
            digest.update(b"\0" + ",".join(map(str, numbers)).encode())
    return digest.digest()


class ModelIdentity:
    """The model that a source began with: known by its content hash, or where there is none by its version.

    policy: `reward.failure.on_model_change`.
    change: with the policy `raise`, one sentence once the model is another; else "".
    """

    def __init__(self, policy: OnModelChange) -> None:
        self.change = ""
        self._policy = policy
        self._first: tuple[str, ModelInfo] | None = None
        self._contents: set[str] = set()
        self._versions: set[str] = set()
        self._current = ("", "")

    def mismatch(self, name: str, info: ModelInfo, *, is_new: bool) -> str:
        """Why a replica that was just reached cannot take part, naming another that it differs from; or "".

        is_new: it was not reached before. One that comes back with other content is a change of the model,
            which `record_reply` judges.
        """
        if self._first is None:
            self._first = (name, info)
            self._contents.update({info.content} - {""})
            return ""
        other, first = self._first
        if _form(info) != _form(first):
            return f"{name} takes {_form(info)}, but {other} takes {_form(first)}; {_SAME_MODEL}"
        if info.reward_names != first.reward_names:
            return f"{name} gives {_rewards(info)}, but {other} gives {_rewards(first)}; {_SAME_MODEL}"
        if is_new and _is_news(self._contents, info.content):
            return (
                f"{name} serves content {info.content[:12]}, but {other} {first.content[:12]}; {_SAME_MODEL}"
            )
        return ""

    def record_reply(self, name: str, version: str, content: str) -> bool:
        """Note the model of a reply; True if it was not seen before.

        name: the replica's, for messages.
        content: the model's hash; "" if the server does not say, and then the version decides.
        """
        seen, key = (self._contents, content) if content else (self._versions, version)
        is_news = _is_news(seen, key)
        seen.add(key)
        if is_news or self._current == ("", ""):
            self._current = _identity(version, content)
        if is_news:
            self._report(
                f"{name} now serves version {version or '?'}{f', content {content[:12]}' if content else ''}"
            )
        return is_news

    def is_current(self, version: str, content: str) -> bool:
        """Whether this is the model that began to reply last: late replies of the one before are not."""
        return _identity(version, content) == self._current

    def _report(self, news: str) -> None:
        if self._policy == "accept":
            _log.info("%s; its scores count from now on", news)
        elif self._policy == "warn":
            _log.warning("%s: the reward model has changed, and the run goes on with it", news)
        elif not self.change:
            self.change = (
                f"{news}, another model than the one that this run began with: serve that one again, start a "
                "new run, or set reward.failure.on_model_change=accept"
            )
            _log.error("%s", self.change)


def _is_news(seen: set[str], key: str) -> bool:
    return bool(key and seen) and key not in seen


def _identity(version: str, content: str) -> tuple[str, str]:
    return (content, "") if content else ("", version)


def _form(info: ModelInfo) -> str:
    return "token ids" if info.takes_tokens else {"dialogues": "dialogues"}.get(info.reads, "text")


def _rewards(info: ModelInfo) -> str:
    return f"the rewards {', '.join(info.reward_names)}"
