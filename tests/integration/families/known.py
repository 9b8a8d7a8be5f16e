"""Tests that fail for a fault that is known and not mended yet, each with the fault.

They are expected to fail. Whoever mends one sees them pass, which counts as a failure, and deletes the lines.
"""

from __future__ import annotations

KNOWN: dict[str, dict[str, tuple[str, ...]]] = {}
"""Fault -> test -> its parameters."""


def known_fault(test: str, parameters: str) -> str | None:
    """The fault that this test fails for; None where it must pass."""
    return next((fault for fault, tests in KNOWN.items() if parameters in tests.get(test, ())), None)
