"""The process of a training service: the port, the runs, and their end."""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor

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
    runs = Runs(config.output_dir, models=config.models, idle_s=config.idle_s, stop_s=config.stop_s)
    runs.take_up()
    try:
        asyncio.run(_listen(runs, config))
    finally:
        runs.close()


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
