"""The process of a training service: the port, the runs, and their end."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from conch.distributed.launcher import launched_processes
from conch.errors import ConfigError
from conch.log import get_logger
from conch.servers.listening import check_access, check_port, make_listener
from conch.servers.restart import leave_with_parent
from conch.service.app import make_app
from conch.service.protocol import KEY_HEADER
from conch.service.runs.runs import Runs
from conch.service.service_config import ServiceConfig

if TYPE_CHECKING:
    from conch.service.runs.ranks import Leader

_log = get_logger(__name__)

_KEEP_ALIVE_S = 75.0
_GRACE_S = 10.0
"""Time for answers that are under way when the service stops: whoever waits is told at once."""

_LOOK_S = 0.1
_LOCK = ".lock"
_THREADS = 64


def serve(config: ServiceConfig) -> None:
    """Serve until SIGTERM, or until the parent process is gone; the run under way is saved.

    Of several processes that a launcher has started, rank 0 serves and all train.

    Raises:
        ConchError: settings or the port will not do; other ranks are lost, and the next service goes on with
            the run.
        SystemExit: 0 after SIGTERM.
    """
    check_access(config)
    if int(os.environ.get("RANK", "0")) == 0:
        check_port(config)
    if launched_processes() <= 1:
        leave_with_parent()
        with _alone_in(config.output_dir):
            _serve(config)
        return
    # Loads torch, which a service of one process leaves to its runs.
    from conch.service.runs.ranks import Leader, follow

    if int(os.environ.get("RANK", "0")) != 0:
        follow(config.rollout)
        return
    leave_with_parent()
    with _alone_in(config.output_dir):
        lost = threading.Event()
        leader = Leader(lost.set)
        leader.wait_for_ranks()
        try:
            _serve(config, leader, lost)
        finally:
            leader.close(config.stop_s)
        if leader.lost is not None:
            raise leader.lost


def _serve(config: ServiceConfig, leader: Leader | None = None, lost: threading.Event | None = None) -> None:
    """lost: set where other ranks are gone, and the service has to end."""
    runs = Runs(
        config.output_dir,
        models=config.models,
        idle_s=config.idle_s,
        stop_s=config.stop_s,
        rollout=config.rollout,
        leader=leader,
    )
    runs.take_up()
    try:
        asyncio.run(_listen(runs, config, lost))
    finally:
        runs.close()


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other services out of a folder while this one trains in it.

    Raises:
        ConfigError: there is one, or the folder cannot be written.
    """
    with contextlib.ExitStack() as opened:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = opened.enter_context((folder / _LOCK).open("ab"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another training service runs in `output_dir` = {folder}: give this one a folder of its own"
            ) from None
        except OSError as error:
            raise ConfigError(f"`output_dir` = {folder} cannot be written ({error.strerror})") from error
        yield


async def _listen(runs: Runs, config: ServiceConfig, lost: threading.Event | None) -> None:
    app = make_app(runs, config, lambda: listener.should_exit)
    listener = make_listener(
        app,
        config,
        takes_password=True,
        key_header=KEY_HEADER,
        keep_alive_s=_KEEP_ALIVE_S,
        grace_s=_GRACE_S,
    )

    async def end_waits() -> None:
        while not listener.should_exit:
            if lost is not None and lost.is_set():
                listener.should_exit = True
            await asyncio.sleep(_LOOK_S)
        runs.end_waits()

    # What waits for a trainer or a disk does so in threads; few cores alone would allow few.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_THREADS, "service"))
    ending = asyncio.ensure_future(end_waits())
    _log.info("training service on %s:%d, runs in %s", config.host, config.port, config.output_dir)
    try:
        await listener.serve()
    finally:
        ending.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await ending
