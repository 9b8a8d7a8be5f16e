"""Configurations of runs side by side, with the defaults of their algorithms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from conch.runs.listing import PLACES

REQUIRED = "(required)"
ABSENT = "(no such key)"


def compare(settings: Sequence[Mapping[str, Any]], defaults: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the page shows of configurations: a row for each key that any of them has.

    settings: of each run, full name -> value.
    defaults: of each run's algorithm, the same.

    Returns:
        rows of `key`, `values` and `defaults` (one text a run), `changed` (a run has another value than its
        default), `differs` (between runs), `place` (the key only says where a run lies).
    """
    keys = dict.fromkeys(key for each in (*settings, *defaults) for key in each)
    rows = []
    for key in sorted(keys, key=_by_section(keys)):
        values = [_text(each, key, ABSENT) for each in settings]
        usual = [_text(each, key, REQUIRED if each else ABSENT) for each in defaults]
        pairs = [pair for pair in zip(values, usual, strict=True) if ABSENT not in pair]
        rows.append(
            {
                "key": key,
                "values": values,
                "defaults": usual,
                "changed": any(value != default for value, default in pairs),
                "differs": len(set(values)) > 1,
                "place": key in PLACES,
            }
        )
    return {"rows": rows, "has_defaults": any(defaults)}


def _by_section(keys: Mapping[str, Any]) -> Any:
    """Sections in the order in which they come first, keys within one too."""
    sections = list(dict.fromkeys(key.partition(".")[0] for key in keys))
    places = {key: place for place, key in enumerate(keys)}
    return lambda key: (sections.index(key.partition(".")[0]), places[key])


def _text(values: Mapping[str, Any], key: str, otherwise: str) -> str:
    if key not in values:
        return otherwise
    value = values[key]
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else "null" if value is None else str(value)
