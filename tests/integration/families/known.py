"""Tests that fail for a fault that is known, of ours or of a library, each with the fault.

They are expected to fail. Whoever mends one, or a release that does, makes them pass, which counts as a
failure: then the lines go.
"""

from __future__ import annotations

KNOWN: dict[str, dict[str, tuple[str, ...]]] = {
    "transformers 5.23: generate counts RoBERTa's positions from 0, its forward pass from behind the pad id; "
    "Conch samples what the forward pass gives": {
        "test_completions_end_where_those_of_transformers_end": ("roberta",),
    },
}
"""Fault -> test -> its parameters."""


def known_fault(test: str, parameters: str) -> str | None:
    """The fault that this test fails for; None where it must pass."""
    return next((fault for fault, tests in KNOWN.items() if parameters in tests.get(test, ())), None)
