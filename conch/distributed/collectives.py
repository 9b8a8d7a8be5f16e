"""Collective operations over the processes (ranks) of a run, through accelerate.

The methods from `all_reduce` on are collectives where more than one process runs: all ranks call them, in
the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from conch.errors import ConchError, DistributedError, first_line

ObjectT = TypeVar("ObjectT")

_PEER_IS_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
)


class Collectives:
    """Sums, gathers and agrees over all ranks; also says which rank this process is."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        return self._accelerator.process_index

    @property
    def num_ranks(self) -> int:
        """Number of processes."""
        return self._accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """True on rank 0, the one that prints and writes."""
        return self._accelerator.is_main_process

    def shard(self, rows: Sequence[ObjectT]) -> Sequence[ObjectT]:
        """Return this rank's rows: every `num_ranks`-th, from `rank` on."""
        return rows[self.rank :: self.num_ranks]

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum `values` elementwise over all ranks."""
        if self.num_ranks == 1:
            return values
        with peer_loss_explained():
            return cast(
                Tensor, self._accelerator.reduce(values.to(self._accelerator.device), reduction="sum")
            )

    def all_reduce_max(self, values: Tensor) -> Tensor:
        """Take the greatest of `values` elementwise over all ranks."""
        if self.num_ranks == 1:
            return values
        with peer_loss_explained():
            rows = self._accelerator.gather(values.to(self._accelerator.device).unsqueeze(0))
        return cast(Tensor, rows).amax(dim=0)

    def all_reduce_int(self, value: int) -> int:
        """Sum a whole number over all ranks: how ranks agree on what each of them saw."""
        return int(self.all_reduce(torch.tensor(value, device=self._accelerator.device)))

    def all_gather(self, rows: list[ObjectT]) -> list[ObjectT]:
        """Concatenate the lists of all ranks, in the order of ranks, on every rank."""
        with peer_loss_explained():
            return rows if self.num_ranks == 1 else gather_object(rows)

    def broadcast(self, value: ObjectT) -> ObjectT:
        """Return rank 0's value on every rank."""
        box: list[Any] = [value]
        with peer_loss_explained():
            if self.num_ranks > 1:
                broadcast_object_list(box)
        return box[0]

    def run_on_all_ranks(self, work: Callable[[], object]) -> None:
        """Run `work` on each rank; where it fails on any, every rank raises, so that none waits for the dead.

        Raises:
            ConchError: this rank's own failure, or a DistributedError that another rank failed.
        """
        failure: ConchError | None = None
        try:
            work()
        except ConchError as error:
            failure = error
        num_failed = self.all_reduce_int(int(failure is not None))
        if failure is not None:
            raise failure
        if num_failed:
            raise DistributedError(
                f"{num_failed} of {self.num_ranks} processes failed; the reason is in their output"
            )

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        with peer_loss_explained():
            self._accelerator.wait_for_everyone()


@contextmanager
def peer_loss_explained() -> Iterator[None]:
    """Turn what a collective throws when a rank is gone into words: the traceback of the others says nothing.

    Raises:
        DistributedError: another process is gone.
    """
    try:
        yield
    except RuntimeError as error:  # torch has no type of its own for it: gloo's and NCCL's words tell
        reason = str(error)
        if not any(words in reason for words in _PEER_IS_GONE):
            raise
        raise DistributedError(
            "another process of this run is gone, so this one leaves: its own output and the launcher's "
            f"report say why ({first_line(reason)[:200]})"
        ) from error
