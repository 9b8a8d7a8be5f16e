"""Rows that a chat template or a tokenizer refuses are left out, counted and named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from conch.data.files import place_of
from conch.errors import DataError
from conch.log import get_logger

MadeT = TypeVar("MadeT")

_log = get_logger(__name__)
_NUM_NAMED = 3


def usable(
    rows: Sequence[Any], what: str, make: Callable[[Any, str], MadeT]
) -> tuple[list[MadeT], list[int]]:
    """What `make` gives for each row that it does not refuse, and the indices of these rows.

    One warning counts the others and names the first of them.

    what: one row, as messages call it ("prompt").
    make: from a row and its name ("prompt 3"); raises a DataError, one sentence with that name, to refuse it.

    Raises:
        DataError: all rows are refused.
    """
    made: list[MadeT] = []
    indices: list[int] = []
    reasons: list[str] = []
    for index, row in enumerate(rows):
        try:
            made.append(make(row, place_of(rows, index, what)))
            indices.append(index)
        except DataError as error:
            reasons.append(str(error))
    if reasons:
        named = "; ".join(reasons[:_NUM_NAMED])
        more = f"; and {len(reasons) - _NUM_NAMED} more" if len(reasons) > _NUM_NAMED else ""
        if not made:
            raise DataError(f"none of the {len(rows)} {what}s can be used: {named}{more}")
        _log.warning("%d of %d %ss left out: %s%s", len(reasons), len(rows), what, named, more)
    return made, indices
