"""A reward model served by Triton, called over gRPC without ever blocking the training thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from types import TracebackType

from conch.config import RewardConfig
from conch.rewards.endpoint import Endpoint
from conch.rewards.loop_thread import LoopThread
from conch.rewards.triton_session import TritonSession
from conch.types import RewardResult, Rollout


class TritonReward:
    """Scores rollouts with the model at `url`, `host:port/model` with the server's gRPC port.

    Form (text or tokens), batch limit, longest sample and dtypes are read from the server. A token-form
    model gets the sampled ids as they are, so it must share the policy's tokenizer; if it does not,
    `tokenizer` must turn a sample into the model's ids.

    Raises:
        ConfigError: `url` is not of that form. Nothing is sent before `check` or `submit`.
    """

    def __init__(
        self, url: str, config: RewardConfig, tokenizer: Callable[[str], list[int]] | None = None
    ) -> None:
        endpoint = Endpoint.parse(url)
        self.name = f"{endpoint.model} at {endpoint.address}"
        self._session = TritonSession(endpoint, config, tokenizer)
        self._thread = LoopThread(f"reward-{endpoint}")

    @property
    def requests(self) -> int:
        """Requests sent so far, retries among them."""
        return self._session.requests

    @property
    def retries(self) -> int:
        """Requests so far that repeated an earlier one."""
        return self._session.retries

    def check(self) -> None:
        """Ask the server for the model, its configuration and one score; takes `deadline_s` at most.

        Raises:
            RewardUnavailableError: host unknown, nothing listening, model absent or not ready, no answer.
            RewardInvalidError: the model is of neither form, or the probe's score is not valid.
        """
        self._thread.submit(self._session.check()).result()

    def submit(self, rollouts: Sequence[Rollout]) -> Future[list[RewardResult]]:
        """Start scoring and return at once; see `RewardSource.submit`.

        Each micro-batch ends within `deadline_s` of its first attempt; a server that is gone ends them all
        within `deadline_s` of its last sign of life.
        """
        return self._thread.submit(self._session.score(list(rollouts)))

    def close(self) -> None:
        """Cancel what is under way, close the connection and join the thread. A second call does nothing."""
        self._thread.close(self._session.close)

    def __enter__(self) -> TritonReward:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
