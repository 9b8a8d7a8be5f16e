"""Reward sources that are opened on the way to something that fails are closed: nobody else could."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import TypeVar

from conch.rewards.base import RewardSource

SourceT = TypeVar("SourceT", bound=RewardSource)

_undone: ContextVar[ExitStack | None] = ContextVar("undone", default=None)


@contextmanager
def sources_closed_on_failure() -> Iterator[None]:
    """Where the block (or the function it decorates) raises, sources that `from_user` made in it are closed.

    Sources that were passed in stay as they are: they are the caller's, who may try again with them.
    """
    with ExitStack() as undone:
        token = _undone.set(undone)
        try:
            yield
        finally:
            _undone.reset(token)
        undone.pop_all()


def note_opened(source: SourceT) -> SourceT:
    """Say that `source` was made here, so that what fails afterwards closes it."""
    undone = _undone.get()
    if undone is not None:
        undone.callback(source.close)
    return source
