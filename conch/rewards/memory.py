"""Scores that are known already."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import replace

from conch.rewards.replica import Row
from conch.types import RewardResult


class Memory:
    """The latest `size` scores, by a hash of what was scored: small, whatever the texts are."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._results: OrderedDict[bytes, RewardResult] = OrderedDict()

    def __len__(self) -> int:
        return len(self._results)

    def find(self, row: Row) -> RewardResult | None:
        """The result of an equal row, which took no time now."""
        key = _key(row)
        found = self._results.get(key)
        if found is None:
            return None
        self._results.move_to_end(key)
        return replace(found, latency_s=0.0)

    def keep(self, row: Row, result: RewardResult) -> None:
        """Remember it; the one that was not asked for longest goes."""
        self._results[_key(row)] = result
        if len(self._results) > self._size:
            self._results.popitem(last=False)

    def clear(self) -> None:
        """Forget all: the model is another."""
        self._results.clear()


def _key(row: Row) -> bytes:
    digest = hashlib.blake2b(row.sample.encode("utf-8"), digest_size=16)
    for numbers in (row.token_ids, row.bounds):
        if numbers:
            digest.update(b"\0" + ",".join(map(str, numbers)).encode())
    return digest.digest()
