"""The process of a training service: the port, the runs, and their end."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from conch.distributed.launcher import launched_processes
from conch.errors import ConfigError
from conch.log import get_logger
from conch.servers.listening import check_access, make_listener
from conch.servers.restart import leave_with_parent
from conch.service.app import make_app
from conch.service.protocol import KEY_HEADER
from conch.service.runs.runs import Runs
from conch.service.service_config import ServiceConfig

_log = get_logger(__name__)

_KEEP_ALIVE_S = 75.0
_GRACE_S = 10.0
"""Time for answers that are under way when the service stops: whoever waits is told at once."""

_LOOK_S = 0.1
_LOCK = ".lock"
_THREADS = 64


def serve(config: ServiceConfig) -> None:
    """Serve until SIGTERM, or until the parent process is gone; the run under way is saved.

    Raises:
        ConchError: settings will not do.
        SystemExit: 0 after SIGTERM.
    """
    check_access(config)
    if launched_processes() > 1:
        raise ConfigError("the service trains in one process: start it without torchrun or accelerate")
    leave_with_parent()
    with _alone_in(config.output_dir):
        runs = Runs(
            config.output_dir,
            models=config.models,
            idle_s=config.idle_s,
            stop_s=config.stop_s,
            rollout=config.rollout,
        )
        runs.take_up()
        try:
            asyncio.run(_listen(runs, config))
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


async def _listen(runs: Runs, config: ServiceConfig) -> None:
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
