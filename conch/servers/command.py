"""What the command lines of our servers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from conch.cli import describe
from conch.errors import ConfigError
from conch.servers.restart import start
from conch.servers.settings import SettingsT, load_settings

HELP = ("-h", "--help")


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
    if {*HELP} & set(argv):
        print(f"{about}\nkeys:\n{describe(settings)}")
        return
    config = load_settings(settings, argv)
    start(lambda: serve(config), module, argv, restart=config.restart)


def pairs_of(argv: Sequence[str]) -> list[str]:
    """A command line as `key=value`, which options are written as: `--label-key answer`, `--port=8300`.

    Raises:
        ConfigError: an option without a value.
    """
    words, pairs = list(argv), []
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word in HELP:
            pairs.append(word)
            continue
        key, equals, value = word.removeprefix("--").partition("=")
        if not equals:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"`{word}` has no value: write `{word} VALUE`; --help lists the keys")
            value = words.pop(0)
        pairs.append(f"{key.replace('-', '_')}={value}")
    return pairs
