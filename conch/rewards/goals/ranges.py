"""The range of each goal: what becomes 0 and what becomes 1, by which goals can be compared.

A file of ranges is YAML or JSON:

    reading_difficulty: {min: 2.8, max: 12.9}
    text_length: {min: 78, max: 1509}
    politeness: null          # is between 0 and 1 by itself: taken as it is
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from conch.errors import ConfigError, missing_path, yaml_problem

Range: TypeAlias = tuple[float, float] | None
"""Lowest and highest value; None: values are taken as they are."""

DEFAULT_RANGES: Mapping[str, Range] = {
    "reading_difficulty": (2.8, 12.9),
    "formality": (40.37, 69.121634),
    "textual_diversity": (44.84394871794872, 128.54409583333333),
    "text_length": (78.0, 1509.0),
}
"""The middle 95 % of the texts that the steerability benchmark starts from (arXiv:2505.23816)."""


def normalized(value: float, limits: Range) -> float:
    """Return where a value stands in its range, from 0 at its lower end and below to 1 at its upper end."""
    if limits is None:
        return value
    low, high = limits
    return min(max((value - low) / (high - low), 0.0), 1.0)


def read_ranges(path: Path) -> dict[str, Range]:
    """Read a file of ranges.

    Raises:
        ConfigError: no such file, or a range is none.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        near = missing_path(path) if isinstance(error, FileNotFoundError) else ""
        raise ConfigError(f"the ranges {path} cannot be read ({error.strerror}){near}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"the ranges {path} are neither YAML nor JSON: {yaml_problem(error)}") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"the ranges {path}: write one `goal: {{min: ..., max: ...}}` a line")
    return as_ranges(content, str(path))


def as_ranges(content: Mapping[Any, Any], where: str) -> dict[str, Range]:
    """Read ranges: goal -> {"min": ..., "max": ...}, a pair, or None.

    where: names their origin in messages.

    Raises:
        ConfigError: a range is none.
    """
    return {str(name): _as_range(str(name), value, where) for name, value in content.items()}


def _as_range(name: str, value: Any, where: str) -> Range:
    if value is None:
        return None
    ends = [value.get("min"), value.get("max")] if isinstance(value, Mapping) else value
    extra = sorted(map(str, set(value) - {"min", "max"})) if isinstance(value, Mapping) else []
    if extra:
        raise ConfigError(f"{where}: the range of `{name}` has the key `{extra[0]}`: it has min and max")
    if not isinstance(ends, Sequence) or len(ends) != 2 or not all(map(_is_number, ends)):
        raise ConfigError(f"{where}: the range of `{name}` needs two numbers, min and max")
    low, high = map(float, ends)
    if not low < high:
        raise ConfigError(
            f"{where}: the range of `{name}` is upside down or empty, min {low:g} is not below max {high:g}: "
            "exchange them"
        )
    return low, high


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def ranges_for(names: Sequence[str], ranges: Mapping[str, Range], where: str) -> dict[str, Range]:
    """Choose the ranges of these goals.

    Raises:
        ConfigError: a goal has none.
    """
    for name in names:
        if name not in ranges:
            near = difflib.get_close_matches(name, ranges, n=1)
            hint = f"; did you mean the `{near[0]}` there?" if near else ""
            raise ConfigError(
                f"goal `{name}` has no range in {where}: give it min and max in a file of ranges "
                f"(`goals.normalization`, of a goal-space server NORMALIZATION_PATH), or `{name}: null` to "
                f"take its values as they are{hint}"
            )
    return {name: ranges[name] for name in names}
