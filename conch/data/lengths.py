"""Rows that are too short or too long to train on."""

from __future__ import annotations

from collections.abc import Sequence

from conch.config import DataConfig
from conch.errors import DataError
from conch.log import get_logger

_log = get_logger(__name__)


def fitting(lengths: Sequence[int], config: DataConfig, what: str) -> list[int]:
    """Numbers of the rows whose length `data.min_tokens` and `data.max_tokens` allow; one warning counts the
    others.

    lengths: in tokens, before anything is cut. what: how the warning names rows, in the plural.

    Raises:
        DataError: none is left.
    """
    shortest, longest = config.min_tokens, config.max_tokens
    num_short = sum(length < shortest for length in lengths)
    num_long = sum(longest is not None and length > longest for length in lengths)
    if num_short + num_long == len(lengths):
        raise DataError(
            f"none of the {len(lengths)} {what} has the length that `data.min_tokens` = {shortest} and "
            f"`data.max_tokens` = {longest} ask for: the shortest has {min(lengths)} tokens, the longest "
            f"{max(lengths)}"
        )
    if num_short + num_long:
        _log.warning(
            "%d of %d %s left out: %d of fewer than %d tokens, %d of more than %s",
            *(num_short + num_long, len(lengths), what, num_short, shortest, num_long, longest),
        )
    return [
        row
        for row, length in enumerate(lengths)
        if length >= shortest and (longest is None or length <= longest)
    ]
