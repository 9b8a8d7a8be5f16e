"""Collective operations over the processes (ranks) of a run, through accelerate.

The methods from `all_reduce` on are collectives where more than one process runs: all ranks call them, in
the same order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from conch.distributed.collective_watch import CollectiveWatch
from conch.errors import ConchError, DistributedError, first_line

ObjectT = TypeVar("ObjectT")

_PEER_IS_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
)
_TIMED_OUT = (
    "Timed out waiting",  # gloo, of the operation that waited
    "Application timeout caused pair closure",  # gloo, of every later one: the group is lost
    "Watchdog caught collective operation timeout",  # NCCL with TORCH_NCCL_BLOCKING_WAIT=1
)


class Collectives:
    """Sums, gathers and agrees over all ranks; also says which rank this process is.

    timeout_s: longest wait for the other ranks; the process group has the same.
    """

    def __init__(self, accelerator: Accelerator, timeout_s: float) -> None:
        self._accelerator = accelerator
        self._watch = CollectiveWatch(self.rank, timeout_s)

    def watch(self, run: Path) -> None:
        """Write the stacks of all ranks to this run's folder where one waits too long for the others."""
        if self.num_ranks > 1:
            self._watch.start(run)

    def close(self) -> None:
        """End the watch."""
        self._watch.stop()

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
        with self.waiting("all_reduce"):
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
        with self.waiting("all_reduce"):  # on a GPU it is int() that waits
            return int(self.all_reduce(torch.tensor(value, device=self._accelerator.device)))

    def all_gather(self, rows: list[ObjectT]) -> list[ObjectT]:
        """Concatenate the lists of all ranks, in the order of ranks, on every rank."""
        with self.waiting("all_gather"):
            return rows if self.num_ranks == 1 else gather_object(rows)

    def broadcast(self, value: ObjectT) -> ObjectT:
        """Return rank 0's value on every rank."""
        box: list[Any] = [value]
        with self.waiting("broadcast"):
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
        with self.waiting("barrier"):
            self._accelerator.wait_for_everyone()

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Inside, this rank waits for the others in `what`, and its errors are those of `explained`."""
        with self.explained(what), self._watch.waiting(what):
            yield

    @contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Turn what a collective throws when a rank is gone or stuck into words: its traceback says nothing.

        Raises:
            DistributedError: another process is gone, or did not come to `what` within the deadline.
        """
        try:
            yield
        except RuntimeError as error:  # torch has no type of its own for it: gloo's and NCCL's words tell
            reason = re.sub(r"^\[\S+\] ", "", first_line(error))[:200]  # without the place in gloo's source
            if any(words in str(error) for words in _TIMED_OUT):
                raise DistributedError(self._watch.timed_out(what, reason)) from error
            if any(words in str(error) for words in _PEER_IS_GONE):
                raise DistributedError(
                    "another process of this run is gone, so this one leaves: its own output and the "
                    f"launcher's report say why ({reason})"
                ) from error
            raise
