"""What the command lines of our servers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from conch.cli import describe
from conch.servers.restart import start
from conch.servers.settings import SettingsT, load_settings


def run_server(
    settings: type[SettingsT],
    serve: Callable[[SettingsT], None],
    *,
    module: str,
    about: str | None,
    argv: Sequence[str],
) -> None:
    """Serve with the settings of a command line, `key=value ...`, or tell the keys for `--help`.

    serve: runs the server. It imports what is slow to load, which `--help` and the parent process of a server
        that is started again can do without.
    module: what `python -m` starts this server as.
    about: first part of the help.
    """
    if {"-h", "--help"} & set(argv):
        print(f"{about}\nkeys:\n{describe(settings)}")
        return
    config = load_settings(settings, argv)
    start(lambda: serve(config), module, argv, restart=config.restart)
