"""Helpful & Harmless comparisons: from the hub or a file to prompts with a chosen and a rejected answer."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from conch.config import DataConfig
from conch.data.files import evaluation_rows, training_rows
from conch.errors import DataError
from examples import presets

SIZES = ("125M", "1B", "6B", "20B", "tiny")
DEFAULT_SIZE = "6B"
_ANSWER = "\n\nAssistant:"
_HELD_OUT = 5


@dataclass(frozen=True, slots=True)
class Comparison:
    """prompt: the dialogue up to and with its last "Assistant:". chosen, rejected: what the assistant may say
    then, the chosen answer preferred by a person."""

    prompt: str
    chosen: str
    rejected: str


def preset(trainer: str) -> str:
    """Name of the configuration for `trainer` of the size that CONFIG_NAME asks for.

    Raises:
        ConfigError: there is no such size.
    """
    return presets.preset("hh", trainer, SIZES, DEFAULT_SIZE)


def comparison(row: Any) -> Comparison:
    """A row as Anthropic gives it (two whole dialogues), or with the prompt apart (`Dahoas/rm-static`).

    Raises:
        DataError: it is neither, the dialogues answer different prompts, or an answer is empty.
    """
    keys = ("chosen", "rejected", *(("prompt",) if isinstance(row, Mapping) and "prompt" in row else ()))
    if not isinstance(row, Mapping) or not all(isinstance(row.get(key), str) for key in keys):
        raise DataError('has no strings "chosen" and "rejected"')
    if "prompt" in row:
        prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    else:
        (prompt, chosen), (other, rejected) = split_answer(row["chosen"]), split_answer(row["rejected"])
        if prompt != other:
            raise DataError('has "chosen" and "rejected" that answer different prompts')
    if not prompt.strip() or not chosen.strip() or not rejected.strip():
        raise DataError("has an empty prompt or answer")
    return Comparison(prompt, chosen, rejected)


def split_answer(dialogue: str) -> tuple[str, str]:
    """A dialogue cut behind its last "Assistant:".

    Raises:
        DataError: no assistant speaks in it.
    """
    before, marker, answer = dialogue.rpartition(_ANSWER)
    if not marker:
        raise DataError('has a dialogue without "\\n\\nAssistant:"')
    return before + marker, answer


def comparisons(config: DataConfig) -> tuple[list[Comparison], list[Comparison]]:
    """Comparisons to train on and to evaluate on.

    Without `data.eval` a fifth of the prompts is held out, the same ones in every program and in any order,
    however often they occur.

    Raises:
        ConfigError, DataError: see `conch.data.files`; or nothing is left for one of the two.
    """
    rows = training_rows(config, "comparisons", form=comparison)
    given = evaluation_rows(config, form=comparison)
    if given is not None:
        return rows, given
    train = [row for row in rows if not _is_held_out(row.prompt)]
    held_out = [row for row in rows if _is_held_out(row.prompt)]
    if not train or not held_out:
        raise DataError(f"{len(rows)} comparisons are too few to hold some out: give `data.eval`, or more")
    return train, held_out[: config.max_eval_rows]


def _is_held_out(prompt: str) -> bool:
    return zlib.crc32(prompt.encode()) % _HELD_OUT == 0


def with_originals(rows: Sequence[Comparison]) -> list[dict[str, str]]:
    """Prompts for a delta reward: each with the chosen answer as the one to be compared with."""
    return [{"prompt": row.prompt, "original_output": row.chosen} for row in rows]
