"""The face of a served reward model, whatever the transport: never blocks the training thread."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import TypeVar

from conch.config import RewardConfig
from conch.rewards.dense import Decode
from conch.rewards.loop_thread import LoopThread
from conch.rewards.replica import Replica, ServerTimes
from conch.rewards.rows import Tokenizer
from conch.rewards.session import Session
from conch.rewards.traffic import Traffic
from conch.types import RewardResult, Rollout

FaceT = TypeVar("FaceT", bound="ServedReward")


class ServedReward:
    """Scores rollouts with one model that several replicas serve. Nothing is sent before `check` or `submit`.

    name: as `RewardSource.name`. who: how messages call the model with its servers.
    """

    def __init__(
        self,
        name: str,
        who: str,
        replicas: Sequence[Replica],
        config: RewardConfig,
        tokenizer: Tokenizer | None = None,
        decode: Decode | None = None,
    ) -> None:
        self.name = name
        self._session = Session(who, replicas, config, tokenizer, decode)
        self._thread = LoopThread(f"reward-{name}")

    @property
    def requests(self) -> int:
        """See `Traffic.requests`."""
        return self._session.requests

    @property
    def retries(self) -> int:
        """See `Traffic.retries`."""
        return self._session.retries

    @property
    def model_change(self) -> str:
        """See `ReportsTraffic.model_change`."""
        return self._session.model_change

    def traffic(self) -> Traffic:
        """See `ReportsTraffic.traffic`."""
        return self._session.traffic()

    def server_times(self) -> Future[ServerTimes]:
        """See `ReportsTraffic.server_times`."""
        return self._thread.submit(self._session.server_times())

    def check(self) -> None:
        """Ask every server for the model, its configuration and one score; takes `deadline_s` at most.

        A server that is away is a warning, as long as there is another.

        Raises:
            RewardUnavailableError: host unknown, nothing listening, model absent or not ready, no answer.
            RewardInvalidError: the model is of neither form, the servers' models differ, or the probe's score
                is not valid.
        """
        self._thread.submit(self._session.check()).result()

    def submit(self, rollouts: Sequence[Rollout]) -> Future[list[RewardResult]]:
        """Start scoring and return at once; see `RewardSource.submit`.

        Each micro-batch ends within `deadline_s` of its first attempt; servers that are gone end them all
        within `deadline_s` of their last sign of life.
        """
        return self._thread.submit(self._session.score(list(rollouts)))

    def close(self) -> None:
        """Cancel what is under way, close connections and join the thread. A second call does nothing."""
        self._thread.close(self._session.close)

    def __enter__(self: FaceT) -> FaceT:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
