"""An endless, shuffled, resumable walk over the rows of a dataset, shared out among ranks."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from conch.errors import DataError


@dataclass
class IndexStream:
    """Row numbers 0..length-1, reshuffled each epoch; every rank draws its own part of each global batch.

    All ranks must draw the same number at the same time: the position is global, so that a run's data order
    does not depend on how many ranks share it.

    length: rows in the dataset.
    position: rows drawn so far by all ranks together.
    """

    length: int
    seed: int
    rank: int = 0
    num_ranks: int = 1
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

    def state_dict(self) -> dict[str, int]:
        """What `load_state_dict` needs to go on from here."""
        return {"position": self.position, "length": self.length}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            DataError: this dataset has another number of rows.
        """
        if state["length"] != self.length:
            raise DataError(
                f"the run to go on with had {state['length']} rows of data, here are {self.length}: give it "
                "the same data"
            )
        self.position = state["position"]
