"""The process of a reward server: rewards, what watches them, and the port."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
import uvloop

from conch.config import RewardConfig
from conch.errors import ConfigError
from conch.log import get_logger
from conch.reward_server.app import Reward, RewardFront
from conch.reward_server.forms.base import Reader
from conch.reward_server.gathering import GatheredReward
from conch.reward_server.goalspace import GOAL_DIMENSIONS, NORMALIZATION_PATH, add_goalspace
from conch.reward_server.metrics import Meter
from conch.reward_server.readiness import Readiness
from conch.reward_server.server_config import RewardServerConfig
from conch.reward_server.service import Admission, LateError, ScoringService
from conch.reward_server.workers import (
    is_worker,
    refuse_used_port,
    run_workers,
    shared_figures,
    shared_socket,
)
from conch.rewards.base import RewardSource
from conch.rewards.combined import CompositeReward
from conch.rewards.factory import GOALS, from_user, is_function_name
from conch.rewards.goals.source import GoalsReward
from conch.rewards.served import ServedReward
from conch.rewards.verifiers.source import VerifierReward
from conch.servers.listening import check_access, make_listener
from conch.servers.quick_http import QuickHeaderDeadline
from conch.servers.restart import leave_with_parent

_log = get_logger(__name__)

ResultT = TypeVar("ResultT")

_KEEP_ALIVE_S = 75.0
"""Idle time after which a connection is closed: longer than a step of most trainers' sampling."""

_GOALS_AT_ONCE = 8
"""Requests that are measured at the same time, by goals that wait for a served model."""

_GRACE_S = 5.0
"""A server that stops answers what is under way for its deadline and this."""


def serve(config: RewardServerConfig, command: Sequence[str]) -> None:
    """Serve until SIGTERM, or until the parent process is gone; what is under way is answered.

    command: starts this program, for each of several processes.

    Raises:
        ConchError: settings will not do, or the reward is none.
        SystemExit: 0 after SIGTERM.
    """
    check_access(config)
    leave_with_parent()
    if config.workers > 1 and not is_worker():
        refuse_used_port(config)
        raise SystemExit(run_workers(config.workers, command))
    with shared_figures() if is_worker() else nullcontext(), ExitStack() as sources:
        front = open_front(config, sources)
        names = ", ".join(f"`{name}`" for name in front.rewards)
        _log.info("serving %s on %s:%d", names, config.host, config.port)
        sockets = shared_socket(config) if is_worker() else None
        uvloop.run(listen(listener_of(front, config), front, sources.close, sockets))


def open_front(config: RewardServerConfig, stack: ExitStack) -> RewardFront:
    """The application with all rewards of a configuration, which `stack` closes.

    Raises:
        ConfigError: a reward cannot be made of its name.
    """
    sources = {name: stack.enter_context(source) for name, source in _sources(config)}
    front = RewardFront([open_reward(name, source, config) for name, source in sources.items()], Meter())
    add_goals(front, sources.values(), config)
    return front


def add_goals(front: RewardFront, sources: Iterable[RewardSource], config: RewardServerConfig) -> None:
    """Add the addresses of a goal space, where the reward is one: the first, of several."""
    spaces = [source.space for source in sources if isinstance(source, GoalsReward)]
    if not spaces:
        return
    admission, places = Admission(config.max_waiting, "texts"), asyncio.Semaphore(_GOALS_AT_ONCE)

    async def measure(texts: Sequence[str], normalize: bool) -> Mapping[str, Sequence[float]]:
        async with places:
            return await asyncio.shield(in_thread(partial(spaces[0].measure, texts, normalize=normalize)))

    def ended(number: int, measuring: asyncio.Future[Any]) -> None:
        """Counts texts until they are measured, however long their caller waits."""
        admission.end(number)
        _ = measuring.cancelled() or measuring.exception()  # which may have come too late for anybody

    async def in_time(texts: Sequence[str], normalize: bool) -> Mapping[str, Sequence[float]]:
        admission.take(len(texts))
        measuring = asyncio.ensure_future(measure(texts, normalize))
        measuring.add_done_callback(partial(ended, len(texts)))
        try:
            return await asyncio.wait_for(asyncio.shield(measuring), config.deadline_s)
        except asyncio.TimeoutError:
            raise LateError(f"no values within {config.deadline_s:g} s") from None

    add_goalspace(front.app, in_time, spaces[0].names)


def in_thread(call: Callable[[], ResultT]) -> asyncio.Future[ResultT]:
    """Start a call in a thread of its own, which does not keep the process where it never returns."""
    future: Future[ResultT] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # of a user's goal: who waits must hear of it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="goals").start()
    return asyncio.wrap_future(future)


def listener_of(front: RewardFront, config: RewardServerConfig) -> uvicorn.Server:
    """What serves the application on the configured port, behind a guard."""
    return make_listener(
        front,
        config,
        http=QuickHeaderDeadline,
        takes_password=True,
        keep_alive_s=_KEEP_ALIVE_S,
        grace_s=config.deadline_s + _GRACE_S,
        on_refused=front.meter.count_refused,
    )


async def listen(
    listener: uvicorn.Server,
    front: RewardFront,
    close: Callable[[], object],
    sockets: list[socket.socket] | None = None,
) -> None:
    """Serve until SIGTERM, or until `listener.should_exit`.

    close: closes the rewards, at the end. A look at one that does not answer would keep the process.
    sockets: to listen on; None takes the configured port.

    Raises:
        ConchError: a reward turned out to be none, such as a model that gives no rewards.
    """
    watching = [asyncio.ensure_future(reward.readiness.watch()) for reward in front.rewards.values()]
    for each in watching:
        each.add_done_callback(lambda _: setattr(listener, "should_exit", True))
    try:
        await listener.serve(sockets)
    finally:
        failures = [each.exception() for each in watching if each.done() and not each.cancelled()]
        for each in watching:
            each.cancel()
        close()
    for failure in failures:
        if failure is not None:
            raise failure


def _sources(config: RewardServerConfig) -> Iterator[tuple[str, RewardSource]]:
    """Name and source of each reward."""
    if config.rewards:
        for name, word in config.rewards.items():
            yield name, _source(word, config)
        return
    own = config.source
    word = config.reward or (None if own.named_by else _word_of_environment())
    if word is None and not own.named_by:
        raise ConfigError(
            "`reward` is missing: give `reward=host:8001/model`, `reward=verifier:gsm8k` or what else gives "
            "rewards; --help lists the ways"
        )
    yield name_of(word or _word_of(config.source)), _source(word, config)


def _word_of_environment() -> str | None:
    """What environment variables name, where no setting does."""
    goals, served = os.environ.get(GOAL_DIMENSIONS), os.environ.get("TRITON_HOST")
    if goals and served:
        raise ConfigError(
            f"the environment variables {GOAL_DIMENSIONS} and TRITON_HOST both name what gives the rewards: "
            "unset one of them, or give `reward`"
        )
    return f"{GOALS}{goals}" if goals else served or None


def _source(word: str | None, config: RewardServerConfig) -> RewardSource:
    source = config.source
    ranges = os.environ.get(NORMALIZATION_PATH)
    if ranges and source.goals.normalization is None:
        goals = source.goals.model_copy(update={"normalization": Path(ranges)})
        source = source.model_copy(update={"goals": goals})
    if word is not None and is_function_name(word):
        source = source.model_copy(update={"function": word})
    return from_user(word, source, metadata_keys=[config.label_key] if config.label_key else [])


def _word_of(config: RewardConfig) -> str:
    return config.url or config.function or config.verifier or "reward"


def name_of(word: str) -> str:
    """The short name of a reward: `host:8001/model` is `model`, `verifier:gsm8k` is `gsm8k`."""
    if word.startswith(GOALS):
        return GOALS.rstrip(":")
    name = word.rstrip("/").rpartition("/")[2] or word
    return name.rpartition(":")[2] or name


def open_reward(name: str, source: RewardSource, config: RewardServerConfig) -> Reward:
    """A source as requests ask for it."""
    asked = source
    # What compares a prompt's completions is refused by the service, and is not to hide behind a gatherer.
    if source.batched and not source.needs_groups:
        asked = GatheredReward(source, samples=config.gather_samples, wait_s=config.gather_s)
    reward = Reward(
        name,
        ScoringService(asked, max_waiting=config.max_waiting, deadline_s=config.deadline_s),
        Readiness(name, source, every_s=config.probe_s, on_reached=lambda: reward.reader),
        config.source.weights,
        lambda: reader_of(source, config),
    )
    return reward


def reader_of(source: RewardSource, config: RewardServerConfig) -> Reader:
    """How bodies become samples for a source whose `check` has passed.

    Raises:
        ConfigError: a model takes token ids.
    """
    parts = list(_parts(source))
    reads = {part.reads for part in parts if isinstance(part, ServedReward)}
    if "tokens" in reads:
        raise ConfigError(
            f"{source.name} takes token ids, and clients send texts: convert the model with --form text"
        )
    columns = [part.columns for part in parts if isinstance(part, VerifierReward)]
    only = columns[0][0] if len(columns) == 1 and len(columns[0]) == 1 else "label"
    return Reader(
        label_key=config.label_key or only,
        always_labels=config.label_key is not None,
        strip=config.strip,
        needs_completions="outputs" in reads or not all(isinstance(part, ServedReward) for part in parts),
        reads="texts" if "texts" in reads else "any",
    )


def _parts(source: RewardSource) -> Iterator[RewardSource]:
    """The sources that a source stands on; itself where it stands on none."""
    if not isinstance(source, CompositeReward):
        yield source
        return
    for each in source.sources:
        yield from _parts(each)
