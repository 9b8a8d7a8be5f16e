"""A parser of options that names the nearest one, and says it before what lacks for want of it."""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

_USAGE_ERROR = 2
_ALIKE = 0.7
"""Likeness of two names, from 0 to 1, from which on one may be meant by the other."""


class CommandParser(argparse.ArgumentParser):
    """argparse's, which tells an unknown option in one line, with the one that was meant.

    A setting of another program's form, `key=value`, is told as well where there is an option of that name.
    """

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]  of typeshed's three forms
        self, args: Iterable[str] | None = None, namespace: Any = None
    ) -> Any:
        """Parse as argparse does, once all options are known."""
        words = list(sys.argv[1:] if args is None else args)
        self._refuse_unknown(words)
        return super().parse_known_args(words, namespace)

    def unknown_option(self, name: str, value: str) -> str:
        """What an unknown option may have meant; a program with more than options says more.

        name: as it was written, `--modle`.
        value: what stands behind its equals sign.
        """
        close = difflib.get_close_matches(name, self._option_string_actions, n=1, cutoff=_ALIKE)
        return f"did you mean {close[0]}?" if close else "--help lists all"

    def refuse(self, sentence: str) -> NoReturn:
        """Leave with a sentence, without the usage."""
        self.exit(_USAGE_ERROR, f"error: {sentence}\n")

    def _refuse_unknown(self, words: Sequence[str]) -> None:
        num_values = 0.0
        for word in words:
            if word == "--" or (self._subparsers is not None and not word.startswith("-")):
                return  # what follows are no options, or those of another command
            name, _, value = word.partition("=")
            if name.startswith("--") and not self._is_known(name):
                self.refuse(f"unknown option {name}; {self.unknown_option(name, value)}")
            if word.startswith("-"):
                num_values = self._num_values(word)
            elif num_values:
                num_values -= 1
            else:
                self._refuse_setting(word)

    def _is_known(self, name: str) -> bool:
        """Whether it is an option, or the beginning of one."""
        return any(known.startswith(name) for known in self._option_string_actions)

    def _num_values(self, word: str) -> float:
        """How many words behind an option may be its values."""
        action = self._option_string_actions.get(word)
        if action is None:  # shortened, or with its value behind an equals sign
            return 0.0 if "=" in word else 1.0
        many = {None: 1.0, "?": 1.0, "*": math.inf, "+": math.inf}
        return float(action.nargs) if isinstance(action.nargs, int) else many.get(action.nargs, math.inf)

    def _refuse_setting(self, word: str) -> None:
        match = re.fullmatch(r"(\w+)=(.*)", word)
        if match is None or self._get_positional_actions():
            return
        option = "--" + match[1].replace("_", "-")
        if option in self._option_string_actions:
            self.refuse(f"`{word}` is no option; write {option} {match[2]}".rstrip())
