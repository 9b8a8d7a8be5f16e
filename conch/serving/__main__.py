"""`conch serve install|up|down|status|logs|swap`: run servers of reward models.

Also `python -m conch.serving`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from conch.cli import CommandParser, add_options, parse_options, written_with
from conch.errors import ConchError
from conch.serving.deployment.options import (
    DownOptions,
    InstallOptions,
    LogsOptions,
    StatusOptions,
    SwapOptions,
    UpOptions,
)

COMMANDS = {
    "install": InstallOptions,
    "up": UpOptions,
    "down": DownOptions,
    "status": StatusOptions,
    "logs": LogsOptions,
    "swap": SwapOptions,
}
"""Subcommand -> its options."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns its exit code: 0 after a clean end, 1 after an error, printed on stderr."""
    arguments = vars(_parser().parse_args(written_with("-", sys.argv[1:] if argv is None else argv)))
    command = arguments.pop("command")
    try:
        return _run(parse_options(COMMANDS[command], arguments))
    except ConchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="conch serve",
        description="Serve converted reward models.",
        epilog="Underscores will do for dashes.",
    )
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for name, section in COMMANDS.items():
        summary = " ".join((section.__doc__ or "").split())
        add_options(commands.add_parser(name, help=summary, description=summary), section)
    return parser


def _run(
    options: InstallOptions | UpOptions | DownOptions | StatusOptions | LogsOptions | SwapOptions,
) -> int:
    """Run the command that takes these options; its modules bring gRPC, so they are imported only now."""
    from conch.serving.deployment import commands, up

    match options:
        case InstallOptions():
            return commands.install(options)
        case UpOptions():
            return up.run(options)
        case DownOptions():
            return commands.down(options)
        case StatusOptions():
            return commands.status(options)
        case LogsOptions():
            return commands.logs(options)
        case SwapOptions():
            return commands.swap(options)


if __name__ == "__main__":
    sys.exit(main())
