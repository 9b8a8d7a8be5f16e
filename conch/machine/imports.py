"""Imports of large libraries, which a command begins with."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Import large libraries without the garbage collector, which would walk all of it again and again:
    a fifth of the time that torch and transformers take. Later walks leave out what was imported."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
    gc.freeze()


@contextmanager
def left_out(package: str) -> Iterator[None]:
    """Have a package that is not loaded yet look as if it were not installed.

    Some libraries load whatever is installed only to ask for its types, which no object can have where the
    package was never loaded.
    """
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        del sys.modules[package]
