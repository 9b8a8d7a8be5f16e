"""An endless, shuffled, resumable walk over the rows of a dataset, shared out among ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from conch.errors import DataError

RowT = TypeVar("RowT")


class RowDigest:
    """A hash of the rows that a run was given: what they say, in their order, whatever class holds it.

    Of rows as they were given, not as they are rendered or tokenised: a chat template may write today's date.
    """

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def over(self, rows: Iterable[RowT]) -> Iterator[RowT]:
        """The same rows, each taken in as it passes."""
        for row in rows:
            self._take(row)
            yield row

    def hexdigest(self) -> str:
        """Of all rows so far."""
        return self._hash.hexdigest()

    def _take(self, value: Any) -> None:
        if isinstance(value, str):
            text = value.encode("utf-8", "surrogatepass")
            self._hash.update(b"s%d:" % len(text) + text)
        elif isinstance(value, Mapping):
            self._hash.update(b"m%d:" % len(value))
            for key in sorted(value, key=str):
                self._take(str(key))
                self._take(value[key])
        elif isinstance(value, Sequence):
            self._hash.update(b"l%d:" % len(value))
            for item in value:
                self._take(item)
        else:
            # Anything else may show its address in memory: its type has to do.
            plain = value is None or isinstance(value, int | float)
            self._hash.update((repr(value) if plain else type(value).__name__).encode() + b";")


def digest_of(*columns: Iterable[Any]) -> str:
    """The hash of rows at once; of several columns one after the other."""
    digest = RowDigest()
    for column in columns:
        for _ in digest.over(column):
            pass
    return digest.hexdigest()


@dataclass
class IndexStream:
    """Row numbers 0..length-1, reshuffled each epoch; every rank draws its own part of each global batch.

    All ranks must draw the same number at the same time: the position is global, so that a run's data order
    does not depend on how many ranks share it.

    length: rows in the dataset.
    digest: hash of the rows, see `RowDigest`; empty where nobody goes on with this walk.
    position: rows drawn so far by all ranks together.
    """

    length: int
    seed: int
    rank: int = 0
    num_ranks: int = 1
    digest: str = ""
    position: int = 0
    _latest: tuple[int, np.ndarray] | None = field(default=None, init=False, repr=False, compare=False)

    def draw(self, count: int) -> list[int]:
        """The next `count` rows of this rank, out of the next `count * num_ranks` of all."""
        start = self.position
        self.position += count * self.num_ranks
        mine = range(start + self.rank, self.position, self.num_ranks)
        return [self._row(position) for position in mine]

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.position / self.length

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, self.length)
        return int(self._order(epoch)[offset])

    def _order(self, epoch: int) -> np.ndarray:
        if self._latest is None or self._latest[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
            self._latest = (epoch, order)
        return self._latest[1]

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on from here."""
        return {"position": self.position, "length": self.length, "digest": self.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            DataError: this dataset has other rows, or another number of them.
        """
        if state["length"] != self.length:
            raise DataError(
                f"the run to go on with had {state['length']} rows of data, here are {self.length}: give it "
                "the same data"
            )
        if state.get("digest", self.digest) != self.digest:  # older checkpoints have none
            raise DataError(
                f"the run to go on with had other rows of data than these {self.length}, or another order of "
                "them: give it the same data, or start a new run from its checkpoint with `model.path`"
            )
        self.position = state["position"]
