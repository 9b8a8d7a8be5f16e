"""`python -m conch.serving up --model-store STORE --model NAME`: serve models until Ctrl-C or SIGTERM."""

from __future__ import annotations

import argparse
import contextlib
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from conch.errors import ConchError
from conch.serving.launcher import TritonServer

_POLL_S = 0.5


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand. Exit code 0 after a clean stop, 1 after an error, told in a sentence on stderr."""
    arguments = _parser().parse_args(argv)
    stop = _StopOnSignal()
    try:
        return _up(arguments, stop)
    except ConchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 0


class _StopOnSignal:
    """Turns SIGINT and SIGTERM into KeyboardInterrupt, and remembers them.

    Python drops an exception that a signal raises inside a finaliser (gRPC's, here): raising is not enough.
    """

    def __init__(self) -> None:
        self._asked = False
        signal.signal(signal.SIGINT, self._on_signal)
        signal.signal(signal.SIGTERM, self._on_signal)

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal came."""
        if self._asked:
            raise KeyboardInterrupt

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._asked = True
        raise KeyboardInterrupt


def _up(arguments: argparse.Namespace, stop: _StopOnSignal) -> int:
    print(f"starting tritonserver with {', '.join(arguments.model)} ...", file=sys.stderr, flush=True)
    server = TritonServer(
        arguments.model_store,
        arguments.model,
        grpc_port=arguments.grpc_port or None,
        host=arguments.host,
        log_file=arguments.log_file,
        ready_timeout_s=arguments.ready_timeout,
        cpu_threads=arguments.cpu_threads,
    )
    with server:
        print(f"ready at {server.url}, log {server.log_file}; stop with Ctrl-C", file=sys.stderr)
        for model in arguments.model:
            print(f"export TRITON_HOST={server.endpoint(model)}", flush=True)
        code = _wait(server, stop)
        print(
            f"error: tritonserver ended with code {code}; last lines:\n{server.log_tail()}", file=sys.stderr
        )
    return 1


def _wait(server: TritonServer, stop: _StopOnSignal) -> int:
    while True:
        stop.check()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return server.wait(_POLL_S)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m conch.serving", description="Serve converted reward models."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    up = commands.add_parser("up", help="serve in the foreground until Ctrl-C or SIGTERM")
    up.add_argument("--model-store", type=Path, default=Path("model_store"), help="default: %(default)s")
    up.add_argument("--model", action="append", required=True, help="model to serve; may be given again")
    up.add_argument("--grpc-port", type=int, default=8001, help="0 takes a free one; default: %(default)s")
    up.add_argument("--host", default="127.0.0.1", help="address to listen on; default: %(default)s")
    up.add_argument("--log-file", type=Path, help="server log; default: a temporary file")
    up.add_argument(
        "--ready-timeout", type=float, default=120.0, help="seconds to become ready; default: %(default)s"
    )
    up.add_argument(
        "--cpu-threads", type=int, default=1, help="threads a model computes with; default: %(default)s"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
