"""Command lines of several words take dashes and underscores alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal


def written_with(sign: Literal["-", "_"], argv: Sequence[str]) -> list[str]:
    """The arguments with `sign` between the words of each option's name; values stay as they are."""
    other = "_" if sign == "-" else "-"
    return [_renamed(argument, other, sign) for argument in argv]


def _renamed(argument: str, old: str, new: str) -> str:
    name, equals, value = argument.partition("=")
    if name.startswith("--"):
        name = "--" + name[2:].replace(old, new)
    return name + equals + value
