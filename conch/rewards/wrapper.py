"""What sources that stand on other sources have in common."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, TypeVar

from conch.rewards.replica import ServerTimes
from conch.rewards.source import CountsTraffic, RewardSource, WantsChunks
from conch.rewards.traffic import ReportsTraffic, Traffic

MadeT = TypeVar("MadeT")
WrapperT = TypeVar("WrapperT", bound="Wrapper")


class Wrapper:
    """Checks, closes and counts for all of `sources`; `submit` is its heirs' own.

    name: as `RewardSource.name`.
    """

    def __init__(self, name: str, sources: Sequence[RewardSource]) -> None:
        self.name = name
        self.sources = tuple(sources)
        self.wants_chunks = any(isinstance(each, WantsChunks) and each.wants_chunks for each in sources)

    @property
    def requests(self) -> int:
        """Requests sent so far, retries among them."""
        return sum(each.requests for each in self.sources if isinstance(each, CountsTraffic))

    @property
    def retries(self) -> int:
        """Those of them that repeated an earlier one."""
        return sum(each.retries for each in self.sources if isinstance(each, CountsTraffic))

    @property
    def model_change(self) -> str:
        """The first change of a model among the sources; see `ReportsTraffic.model_change`."""
        changes = (each.model_change for each in self.sources if isinstance(each, ReportsTraffic))
        return next((change for change in changes if change), "")

    def traffic(self) -> Traffic:
        """Sums over the sources; `most_in_flight` is no more than the sum."""
        found = [each.traffic() for each in self.sources if isinstance(each, ReportsTraffic)]
        reasons = {reason for each in found for reason in each.retries_by}
        return Traffic(
            requests=self.requests,
            retries=self.retries,
            retries_by={name: sum(each.retries_by.get(name, 0) for each in found) for name in reasons},
            deduplicated=sum(each.deduplicated for each in found),
            replica_faults=sum(each.replica_faults for each in found),
            most_in_flight=sum(each.most_in_flight for each in found),
        )

    def server_times(self) -> Future[ServerTimes]:
        """Sums over the sources; see `ReportsTraffic.server_times`."""
        futures = [each.server_times() for each in self.sources if isinstance(each, ReportsTraffic)]

        def total() -> ServerTimes:
            found = [future.result() for future in futures]
            return ServerTimes(
                sum(each.requests for each in found),
                sum(each.queue_s for each in found),
                sum(each.compute_s for each in found),
            )

        return when_all_done(futures, total)

    def check(self) -> None:
        """See `RewardSource.check`: each source in turn."""
        for source in self.sources:
            source.check()

    def close(self) -> None:
        """See `RewardSource.close`."""
        for source in self.sources:
            source.close()

    def __enter__(self: WrapperT) -> WrapperT:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def when_all_done(futures: Sequence[Future[Any]], make: Callable[[], MadeT]) -> Future[MadeT]:
    """A future of `make()`, called once all of `futures` are done, by whoever finishes last. The same future
    may be given more than once."""
    distinct: Mapping[int, Future[Any]] = {id(future): future for future in futures}
    made: Future[MadeT] = Future()
    lock, left = threading.Lock(), [len(distinct)]

    def finish() -> None:
        try:
            made.set_result(make())
        except BaseException as error:  # a source that broke: whoever waits must hear of it
            made.set_exception(error)

    def count(_done: Future[Any]) -> None:
        with lock:
            left[0] -= 1
            is_last = left[0] == 0
        if is_last:
            finish()

    for future in distinct.values():
        future.add_done_callback(count)
    if not distinct:
        finish()
    return made
