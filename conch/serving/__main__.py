"""`python -m conch.serving up|down|status|logs|swap`: run servers of reward models; see `--help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from conch.cli import written_with
from conch.errors import ConchError
from conch.serving.deployment import commands
from conch.serving.server.flags import LOOPBACK


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand. Exit code 0 after a clean end, 1 after an error, told in a sentence on stderr."""
    arguments = _parser().parse_args(written_with("-", sys.argv[1:] if argv is None else argv))
    try:
        return arguments.run(arguments)
    except ConchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m conch.serving",
        description="Serve converted reward models.",
        epilog="Underscores will do for dashes.",
    )
    subcommands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_up(
        subcommands.add_parser("up", help="serve, in the foreground until Ctrl-C or SIGTERM, or detached")
    )
    _add_down(subcommands.add_parser("down", help="stop a deployment"))
    _add_status(subcommands.add_parser("status", help="show what the servers do"))
    _add_logs(subcommands.add_parser("logs", help="show a server's log"))
    swap = subcommands.add_parser("swap", help="take up new versions from the store, without a lost request")
    swap.add_argument("name", nargs="?", help="deployment; may be left out if there is one")
    swap.add_argument("--timeout", type=float, default=600.0, help="seconds to load; default: %(default)s")
    swap.set_defaults(run=commands.swap)
    return parser


def _add_up(up: argparse.ArgumentParser) -> None:
    up.add_argument("--model-store", type=Path, default=Path("model_store"), help="default: %(default)s")
    up.add_argument("--model", action="append", required=True, help="model to serve; may be given again")
    up.add_argument("--name", help="what to call the deployment; default: the first model's name")
    up.add_argument("--detach", action="store_true", help="return once ready; go on in the background")
    up.set_defaults(run=commands.up)
    what = up.add_argument_group("what the server runs in")
    what.add_argument(
        "--runtime",
        choices=("bundled", "apptainer", "docker"),
        default="bundled",
        help="default: %(default)s",
    )
    what.add_argument("--image", help="with apptainer the image's file, with docker its name")
    what.add_argument("--url", metavar="HOST:PORT", help="a server that is up already: check it and leave")
    what.add_argument(
        "--gpu", action="append", default=[], help="GPU of a replica, in turn; default: the CPU"
    )
    what.add_argument("--replicas", type=int, default=1, help="servers; default: %(default)s")
    what.add_argument(
        "--cpu-threads", type=int, default=1, help="threads a model computes with; default: %(default)s"
    )
    what.add_argument(
        "--server-flag", action="append", default=[], metavar="--NAME=VALUE", help="passed to tritonserver"
    )
    _add_network(up.add_argument_group("network; replica n adds 10 n to each port, and 0 takes a free one"))
    _add_supervision(up.add_argument_group("supervision"))


def _add_network(network: argparse._ArgumentGroup) -> None:
    network.add_argument("--host", default=LOOPBACK, help="address to listen on; default: %(default)s")
    network.add_argument("--grpc-port", type=int, default=8001, help="default: %(default)s")
    network.add_argument("--http-port", type=int, help="default: closed")
    network.add_argument("--metrics-port", type=int, help="Prometheus; default: closed")
    network.add_argument("--tls-cert", type=Path, help="certificate (PEM): speak TLS")
    network.add_argument("--tls-key", type=Path, help="its private key (PEM, not encrypted)")
    network.add_argument("--tls-ca", type=Path, help="authority that signed the clients' certificates (PEM)")
    network.add_argument("--require-client-cert", action="store_true", help="turn clients without one away")
    network.add_argument("--secret-env", help="environment variable with the secret that clients must send")


def _add_supervision(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--ready-timeout", type=float, default=120.0, help="seconds to become ready; default: %(default)s"
    )
    group.add_argument(
        "--watch-interval",
        type=float,
        default=30.0,
        help="seconds between golden samples; default: %(default)s",
    )
    group.add_argument("--max-restarts", type=int, default=5, help="in a row; default: %(default)s")
    group.add_argument("--follow-store", action="store_true", help="take up new versions by itself")
    group.add_argument("--log-file", type=Path, help="server log; default: in the run folder")
    group.add_argument("--log-max-mb", type=float, default=10.0, help="size of a log; default: %(default)s")
    group.add_argument("--log-keep", type=int, default=3, help="old logs kept; default: %(default)s")


def _add_down(down: argparse.ArgumentParser) -> None:
    down.add_argument("name", nargs="?", help="deployment; may be left out if there is one")
    down.add_argument("--all", action="store_true", help="all deployments of this user on this machine")
    down.add_argument(
        "--timeout", type=float, default=60.0, help="seconds to finish requests; default: %(default)s"
    )
    down.set_defaults(run=commands.down)


def _add_status(status: argparse.ArgumentParser) -> None:
    status.add_argument("name", nargs="?", help="deployment; default: all")
    status.add_argument("--watch", action="store_true", help="refresh until Ctrl-C")
    status.add_argument("--json", action="store_true", help="one JSON object a look")
    status.add_argument(
        "--interval", type=float, default=1.0, help="seconds between two looks; default: %(default)s"
    )
    status.add_argument("--url", metavar="HOST:PORT", help="any Triton server instead of a deployment")
    status.add_argument("--tls-ca", type=Path, help="with --url: certificate authority (PEM)")
    status.add_argument("--tls-cert", type=Path, help="with --url: our own certificate (PEM)")
    status.add_argument("--tls-key", type=Path, help="with --url: its key (PEM)")
    status.add_argument("--secret-env", help="with --url: environment variable with the secret")
    status.set_defaults(run=commands.status)


def _add_logs(logs: argparse.ArgumentParser) -> None:
    logs.add_argument("name", nargs="?", help="deployment; may be left out if there is one")
    logs.add_argument(
        "-f", "--follow", action="store_true", help="go on until Ctrl-C or the deployment's end"
    )
    logs.add_argument("-n", "--lines", type=int, default=50, help="default: %(default)s")
    logs.add_argument("--replica", type=int, default=0, help="default: %(default)s")
    logs.add_argument("--supervisor", action="store_true", help="the supervisor's log instead of a server's")
    logs.set_defaults(run=commands.logs)


if __name__ == "__main__":
    sys.exit(main())
