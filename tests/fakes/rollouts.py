"""Rollouts without a policy: one token a letter, `a` is 1."""

from __future__ import annotations

from typing import Any

from conch.types import Completion, Prompt, Rollout


def letter_ids(text: str) -> tuple[int, ...]:
    """`a` -> 1, `b` -> 2, ..."""
    return tuple(ord(letter) - ord("a") + 1 for letter in text)


def rollout(prompt: str, output: str, **metadata: Any) -> Rollout:
    """A rollout of policy version 0 whose tokens are letters."""
    ids = letter_ids(output)
    completion = Completion(output, ids, (0.0,) * len(ids), "length")
    return Rollout(Prompt(prompt, letter_ids(prompt), metadata), completion, policy_version=0)


def rollouts(*outputs: str) -> list[Rollout]:
    """One rollout per output, all with the prompt `p`."""
    return [rollout("p", output) for output in outputs]
