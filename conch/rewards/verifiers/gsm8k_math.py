"""Compares by mathematical value with math-verify, which the extra `math` brings.

math-verify's time limits are off here: they are alarm signals, which work in the main thread only and whose
expiry counts as a wrong answer. The caller sets the deadline (`conch/rewards/verifiers/pool.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from conch.errors import ConfigError, install_extra

_NEEDED = ("math_verify", "latex2sympy2_extended", "antlr4")


def check_installed() -> None:
    """Tell that math-verify or a part of it is missing, without loading it.

    Raises:
        ConfigError: with the command that installs it.
    """
    missing = [module for module in _NEEDED if find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"extractor=math needs {' and '.join(missing)}; install it with {install_extra('math')}, or "
            "choose extractor=flexible"
        )


def warm_up() -> None:
    """Load math-verify and let its LaTeX parser build its tables, which takes about 2 s."""
    compare(r"The answer is $\frac{1}{2} + 17.5$ or \boxed{18}.", "18")


def compare(completion: str, gold: str) -> tuple[bool, bool]:
    """Whether math-verify finds a completion's answer equal to a number, and whether it finds an answer."""
    parse, verify = _library()
    answers = parse(completion, parsing_timeout=None)
    return verify(_parse_gold(gold), answers, timeout_seconds=None), bool(answers)


@lru_cache(maxsize=4096)
def _parse_gold(gold: str) -> list[Any]:
    parse, _ = _library()
    return parse(gold, parsing_timeout=None)


@lru_cache(maxsize=1)
def _library() -> tuple[Callable[..., list[Any]], Callable[..., bool]]:
    """math-verify's `parse` and `verify`, without their warnings that the time limits are off."""
    from math_verify import grader, parser

    parser.TIMEOUT_WARNING_SHOWN = grader.TIMEOUT_WARNING_SHOWN = True
    return parser.parse, grader.verify
