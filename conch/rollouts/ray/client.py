"""Client of one actor that samples: as `conch.rollouts.remote.client.ServerClient`, through Ray."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, ClassVar

from pydantic import ValidationError
from torch import Tensor

from conch.errors import ConchError, RolloutError, RolloutUnavailableError, first_line
from conch.log import get_logger
from conch.rollouts.protocol import CompletionReply, GenerateRequest, Health, WeightUpdate
from conch.rollouts.ray.actor import NOT_BUILT, PATIENCE_S, UNKNOWN_REQUEST, Answer
from conch.rollouts.ray.handed import HandedTensors
from conch.rollouts.remote.client import StaleWeightsError
from conch.servers.client import CONNECT_S
from conch.servers.listening import STALE_WEIGHTS

_log = get_logger(__name__)

_MAX_DETAIL = 300
"""Characters of an actor's failure that are shown."""

_ANSWER_S = 30.0
"""Longest wait beyond `PATIENCE_S` for an actor whose processor has much else to do."""


class SharedWeights:
    """The latest weights in Ray's object store: written once, read by all actors."""

    def __init__(self) -> None:
        self._key: tuple[str, int, str] | None = None
        self._ref: Any = None
        self._lock = threading.Lock()
        self._is_closed = False

    def ref(self, update: WeightUpdate, tensors: Mapping[str, Tensor]) -> Any:
        """Ray's reference to these weights. Those of the version or part before are given up.

        Raises:
            RolloutError: neither the object store nor the disk that it falls back to has room for them.
            RolloutUnavailableError: `close` was called.
        """
        import ray
        from ray.exceptions import ObjectStoreFullError, OutOfDiskError

        key = (update.weights.source, update.weights.version, update.part)
        with self._lock:
            if self._is_closed:  # Ray would start anew for whoever puts something there now
                raise RolloutUnavailableError("the run ends, and hands over no more weights")
            if self._key != key:
                self._key = self._ref = None
                try:
                    self._ref = ray.put(HandedTensors.of(tensors))
                except (ObjectStoreFullError, OutOfDiskError) as error:
                    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
                    raise RolloutError(
                        f"the weights, {size / 2**20:.0f} MiB, fit neither into Ray's object store nor on "
                        "the disk behind it: raise `rollout.ray.object_store_memory` (of a cluster that is "
                        "joined, `ray start --object-store-memory`), or free space in the folder for "
                        f"temporary files ({type(error).__name__}: {first_line(error)[:_MAX_DETAIL]})"
                    ) from error
                self._key = key
            return self._ref

    def close(self) -> None:
        """Give up what is there, and take no more."""
        with self._lock:
            self._key, self._ref, self._is_closed = None, None, True


class _NotBuiltError(RolloutUnavailableError):
    """The actor was started again, and has no model yet."""


class RayClient:
    """Client of one actor, which several threads may use at once.

    actor: handle of a `SamplerActor`.
    address: name of the actor.
    deadline_s: longest wait for weights to be loaded, or for the next completion.
    weights: what all clients of a run share.
    blueprint: Ray's reference to what the actor builds its model from; None on ranks that do not have it.
    """

    takes_handed: ClassVar[bool] = True
    requests_per_server: ClassVar[int] = 1
    """One: which rows are sampled together depends on no clock, so that a run repeats."""

    def __init__(
        self,
        actor: Any,
        address: str,
        deadline_s: float,
        weights: SharedWeights,
        blueprint: Any = None,
    ) -> None:
        self.address = address
        self.actor = actor
        self._deadline_s = deadline_s
        self._weights = weights
        self._blueprint = blueprint
        self._closed: Future[None] = Future()

    def health(self) -> Health:
        """State of the actor. Has one that was started again build its model, and calls it away meanwhile.

        Raises:
            RolloutUnavailableError: it does not answer.
            RolloutError: it could not build its model.
        """
        try:
            return self._ask("health", timeout_s=CONNECT_S)
        except _NotBuiltError:
            if self._blueprint is not None:
                self.actor.build.remote(self._blueprint)
            raise

    def build(self, timeout_s: float) -> Health:
        """Have the actor build its model; returns once it has.

        Raises:
            RolloutError: it cannot.
            RolloutUnavailableError: not in time.
        """
        return self._ask("build", self._blueprint, timeout_s=timeout_s)

    def update_weights(self, update: WeightUpdate, tensors: Mapping[str, Tensor]) -> Health:
        """Have the actor load these weights; returns once it has.

        Raises:
            RolloutUnavailableError: it does not answer, or failed.
            RolloutError: it can never load them.
        """
        return self._ask(
            "update_weights", update, self._weights.ref(update, tensors), timeout_s=self._deadline_s
        )

    def completions(self, request: GenerateRequest) -> Iterator[CompletionReply]:
        """Yield completions as they end.

        Raises:
            StaleWeightsError: the actor holds other weights.
            RolloutUnavailableError: it does not answer, or broke off.
            RolloutError: it can never sample what is requested.
        """
        number = self._ask("begin", request, timeout_s=self._deadline_s)
        last_s = time.monotonic()
        try:
            while True:
                for line in self._ask("more", number, timeout_s=PATIENCE_S + _ANSWER_S):
                    if line is None:
                        number = None
                        return
                    last_s = time.monotonic()
                    yield self._reply(line)
                if time.monotonic() - last_s > self._deadline_s:
                    raise RolloutUnavailableError(
                        f"{self.address} ended no completion for {self._deadline_s:g} s"
                    )
        finally:
            if number is not None and not self._closed.done():
                self.actor.stop.remote(number)

    def _reply(self, line: str) -> CompletionReply:
        values = json.loads(line)
        if "detail" in values:
            raise RolloutUnavailableError(f"{self.address} failed: {values['detail'][:_MAX_DETAIL]}")
        try:
            return CompletionReply.model_validate(values)
        except ValidationError as error:
            mistake = error.errors(include_input=False, include_url=False)[0]["msg"]
            raise RolloutError(f"{self.address} sent what is no completion: {mistake}") from error

    def stacks(self, timeout_s: float = CONNECT_S) -> str:
        """What each thread of the actor is at.

        Raises:
            RolloutUnavailableError: it does not answer.
        """
        return self._call("stacks", timeout_s=timeout_s)

    def pid(self) -> int:
        """Process id of the actor, on the machine where it runs.

        Raises:
            RolloutUnavailableError: it does not answer.
        """
        return self._call("pid", timeout_s=CONNECT_S)

    def close(self) -> None:
        """Let those who wait for the actor go. It runs on."""
        if not self._closed.done():
            self._closed.set_result(None)

    def _ask(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        """Call a method that answers with an `Answer`, and give its value; show what the actor logged."""
        answer: Answer = self._call(method, *arguments, timeout_s=timeout_s)
        for level, text in answer.messages:
            _log.log(level, "%s: %s", self.address, text)
        if answer.status:
            raise self._refusal_of(answer)
        return answer.value

    def _refusal_of(self, answer: Answer) -> ConchError:
        detail = answer.detail[:_MAX_DETAIL]
        if answer.status == STALE_WEIGHTS:
            return StaleWeightsError(f"{self.address}: {detail}")
        if answer.status == NOT_BUILT:
            return _NotBuiltError(f"{self.address} is not ready: {detail}")
        if answer.status >= 500 or answer.status == UNKNOWN_REQUEST:
            return RolloutUnavailableError(f"{self.address} failed: {detail}")
        return RolloutError(f"{self.address} refuses: {detail}")

    def _call(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        """Call a method of the actor, and wait for its result no longer than until `close`."""
        from ray.exceptions import RayError

        if self._closed.done():
            raise RolloutUnavailableError(f"{self.address} is asked no more")
        try:
            result = getattr(self.actor, method).remote(*arguments).future()
            wait({result, self._closed}, timeout=timeout_s, return_when=FIRST_COMPLETED)
            if not result.done():
                reason = "the run ends" if self._closed.done() else f"no answer for {timeout_s:g} s"
                raise RolloutUnavailableError(f"{self.address} does not answer: {reason}")
            return result.result()
        except RayError as error:
            raise RolloutUnavailableError(f"{self.address} {_what_happened(error)}") from error


def _what_happened(error: Exception) -> str:
    """What an error of Ray's about an actor means, without its paragraphs of advice."""
    from ray.exceptions import ActorDiedError, ActorUnavailableError

    if isinstance(error, ActorUnavailableError):
        return "is away: Ray starts it again, or cannot reach it"
    if isinstance(error, ActorDiedError):
        reason = " ".join(str(error).split())
        return f"has died, and is not started again (`rollout.ray.max_restarts`): {reason[:_MAX_DETAIL]}"
    return f"failed ({type(error).__name__}: {first_line(error)[:_MAX_DETAIL]})"
