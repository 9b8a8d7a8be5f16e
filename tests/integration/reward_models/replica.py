"""A replica of a public reward model, and the dialogues on which replicas are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Messages = list[dict[str, str]]
Pipeline = Callable[[Messages], list[float]]
"""What the model card's code computes of one dialogue: one score per served reward. Plain transformers, one
dialogue at a time, float32, nothing of ours."""

QUESTION = {"role": "user", "content": "What is two and two?"}
DIALOGUES: tuple[Messages, ...] = (
    [QUESTION, {"role": "assistant", "content": "It is four."}],
    [QUESTION, {"role": "assistant", "content": "It is five, I think."}],
    [QUESTION, {"role": "assistant", "content": ""}],
    [
        QUESTION,
        {"role": "assistant", "content": "Four."},
        {"role": "user", "content": "And three and three?"},
        {"role": "assistant", "content": "Six."},
    ],
    [
        QUESTION,
        {"role": "assistant", "content": "Four."},
        {"role": "user", "content": "And three and three?"},
        {"role": "assistant", "content": "Seven, or so."},
    ],
)
"""One and two turns, two answers to each prompt, and an empty answer."""

SOLUTIONS: tuple[Messages, ...] = (
    [QUESTION, {"role": "assistant", "content": "Two is one and one.\n\nSo it is four."}],
    [QUESTION, {"role": "assistant", "content": "Two is one and one.\n\nSo it is five.\n\nOr not."}],
    [QUESTION, {"role": "assistant", "content": "It is four."}],
)
"""Answers of one to three steps, with a blank line between them; for process rewards."""


@dataclass(frozen=True)
class Replica:
    """A public family in tiny.

    name: row of the table in docs/converting.md.
    build: writes the checkpoint into an empty folder (weights, config, tokenizer, code as published), and
        returns the pipeline. Further checkpoints that it needs, such as a base model, go beside the folder.
    settings: options of the conversion, as the table names them; `{folder}` in a value is the checkpoint's
        folder, `{beside}` the one that holds it.
    dialogues: what it is asked.
    refused: words of the error where the family cannot be served; "" where it can.
    source: where the card's pipeline was read.
    """

    name: str
    build: Callable[[Path], Pipeline]
    settings: dict[str, Any] = field(default_factory=dict)
    dialogues: tuple[Messages, ...] = DIALOGUES
    refused: str = ""
    source: str = ""

    def options(self, folder: Path) -> dict[str, Any]:
        """Return the settings for a checkpoint in this folder."""
        places = {"{folder}": str(folder), "{beside}": str(folder.parent)}
        filled = dict(self.settings)
        for key, value in filled.items():
            for place, path in places.items():
                filled[key] = value.replace(place, path) if isinstance(value, str) else value
        return filled
