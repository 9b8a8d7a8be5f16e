"""Copies of the policy's weights, which servers are sent while the trainer changes the weights themselves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from conch.rollouts.protocol import Part, WeightVersion
from conch.rollouts.remote.lease import LeaseEndedError, WeightLease

Parts = dict[Part, dict[str, Tensor]]


class WeightSnapshot(WeightLease):
    """A lease on copies: they never change, so that `end` waits for nobody.

    After `end` newer weights stand in their place. Who is sending these goes on; nobody begins to.

    parts: the copies.
    release: called once they are sent no more, and are never going to be.
    """

    def __init__(
        self, weights: WeightVersion, parts: Parts, *, goes_on: bool, release: Callable[[Parts], object]
    ) -> None:
        super().__init__(weights, lambda part: parts[part], goes_on=goes_on)
        self._parts = parts
        self._release = release
        self._senders = 0
        self._copied: torch.cuda.Event | None = None
        if any(tensor.is_cuda for tensors in parts.values() for tensor in tensors.values()):
            self._copied = torch.cuda.Event()
            self._copied.record()

    @contextmanager
    def reading(self) -> Iterator[None]:
        yield

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Keep the copies from being overwritten inside.

        Raises:
            LeaseEndedError: there are newer ones.
        """
        with self._lock:
            self._check()
            self._senders += 1
        try:
            yield
        finally:
            with self._lock:
                self._senders -= 1
                self._release_unused()

    def tensors(self, part: Part) -> dict[str, Tensor]:
        """Names and copies. Call it inside `sending`.

        Raises:
            LeaseEndedError: there are newer ones, or this part was not copied.
        """
        self._check()
        if part not in self._parts:
            raise LeaseEndedError(
                "the server has come back with other settings for adapters: it gets weights with the next "
                "version"
            )
        if self._copied is not None:
            self._copied.synchronize()
        return self._parts[part]

    def copies(self, tensors: dict[str, Tensor]) -> Iterator[Tensor]:
        yield from tensors.values()

    def register(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(tensors)

    def end(self) -> None:
        with self._lock:
            self._has_ended = True
            self._release_unused()

    def _check(self) -> None:
        if self._has_ended:
            raise LeaseEndedError(f"version {self.weights.version} of the weights is no more the newest")

    def _release_unused(self) -> None:
        if self._has_ended and not self._senders:
            parts, self._parts = self._parts, {}
            if parts:
                self._release(parts)


class SnapshotBuffers:
    """Makes snapshots, in memory that earlier ones have left.

    Fresh memory costs more than the copy: each of its pages is mapped at the first touch.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unused: list[Parts] = []
        self._base: dict[str, Tensor] | None = None

    def snapshot(
        self,
        weights: WeightVersion,
        parts: Mapping[Part, Callable[[], dict[str, Tensor]]],
        *,
        goes_on: bool,
        base_stays: bool,
    ) -> WeightSnapshot:
        """Copy weights.

        parts: gives the tensors of each part that is to be sent.
        base_stays: True where the tensors of the base stay where they are and need no copy.
        """
        with self._lock:
            old = self._unused.pop() if self._unused else {}
        copies: Parts = {}
        for part, tensors in parts.items():
            if part != "base":
                copies[part] = _copied(tensors(), old.get(part, {}))
                continue
            if self._base is None:
                self._base = tensors() if base_stays else _copied(tensors(), {})
            copies[part] = self._base
        return WeightSnapshot(weights, copies, goes_on=goes_on, release=self._take_back)

    def _take_back(self, parts: Parts) -> None:
        with self._lock:
            self._unused.append({part: tensors for part, tensors in parts.items() if part != "base"})


@torch.no_grad()
def _copied(tensors: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies, in those of `buffers` that fit."""
    copies: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        buffer = buffers.get(name)
        if buffer is None or not _fits(buffer, tensor):
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        copies[name] = buffer.copy_(tensor, non_blocking=True)
    return copies


def _fits(buffer: Tensor, tensor: Tensor) -> bool:
    return (buffer.shape, buffer.dtype, buffer.device) == (tensor.shape, tensor.dtype, tensor.device)
