"""Film reviews with their sentiment: from the hub or a file to what each trainer learns from."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field

from conch.config import DataConfig, Section
from conch.data.files import evaluation_rows, training_rows
from conch.errors import DataError
from examples import presets

SIZES = ("hub", "tiny")
_HELD_OUT = 10
_SHORTEST_BEGINNING = 3


@dataclass(frozen=True, slots=True)
class Review:
    """label: 1 for a positive review, 0 for a negative one."""

    text: str
    label: int


class ReviewsConfig(Section):
    """Which reviews are learned from, and what the writer is to go on from."""

    half: Literal["all", "first", "second"] = "all"
    """Learn from one half of the training reviews only, the same in every program: so a classifier that
    judges a writer need not have seen what the writer's own classifier has."""

    opening_words: int = Field(default=4, ge=1)
    """Words of a review that a prompt is made of, where no `prompts` are given."""

    prompts: tuple[str, ...] = ()
    """Beginnings to train on; empty takes the openings of the training reviews."""

    eval_prompts: tuple[str, ...] = ("I don't know much about Hungarian underground",)
    """Beginnings that evaluations go on from, `train.eval_repeats` times each."""


def preset(trainer: str) -> str:
    """Name of the configuration for `trainer` that CONFIG_NAME asks for.

    Raises:
        ConfigError: there is none.
    """
    return presets.preset("sentiments", trainer, SIZES, SIZES[0])


def review(row: Any) -> Review:
    """A row with a text and a label of 1 or 0.

    Raises:
        DataError: it has no such things.
    """
    if not isinstance(row, Mapping) or not isinstance(row.get("text"), str) or not row["text"].strip():
        raise DataError('has no string "text"')
    label = row.get("label")
    if isinstance(label, bool) or label not in (0, 1):
        raise DataError(f'has the "label" {label!r}: 1 is positive, 0 negative')
    return Review(row["text"].strip(), int(label))


def reviews(data: DataConfig, config: ReviewsConfig) -> tuple[list[Review], list[Review]]:
    """Reviews to train on and to evaluate on.

    Without `data.eval` a tenth is held out. What is held out, and which half a review belongs to, depends on
    its text alone: it is the same in every program.

    Raises:
        ConfigError, DataError: see `conch.data.files`; or one of the two would lack a sentiment.
    """
    rows = training_rows(data, "reviews", form=review)
    held_out = evaluation_rows(data, form=review)
    if held_out is None:
        held_out = [row for row in rows if _number(row) % _HELD_OUT == 0][: data.max_eval_rows]
        rows = [row for row in rows if _number(row) % _HELD_OUT]
    if config.half != "all":
        wanted = ("first", "second").index(config.half)
        rows = [row for row in rows if _number(row) // _HELD_OUT % 2 == wanted]
    for name, part in (("train on", rows), ("evaluate on", held_out)):
        if {row.label for row in part} != {0, 1}:
            raise DataError(
                f"the {len(part)} reviews to {name} are not of both sentiments: give more reviews, or other "
                "ones than the first `data.max_rows` or `data.max_eval_rows`"
            )
    return rows, held_out


def _number(row: Review) -> int:
    return zlib.crc32(row.text.encode())


def prompts(rows: Sequence[Review], config: ReviewsConfig) -> list[str]:
    """Beginnings to write on from: those given, or the first words of each review, each once.

    Raises:
        DataError: no review is longer than `reviews.opening_words`.
    """
    if config.prompts:
        return list(config.prompts)
    words = [row.text.split() for row in rows]
    count = config.opening_words
    found = dict.fromkeys(" ".join(each[:count]) for each in words if len(each) > count)
    if not found:
        raise DataError(f"no review has more than `reviews.opening_words` = {count} words: take fewer")
    return list(found)


def pairs(rows: Sequence[Review], eos: str, *, rounds: int, seed: int) -> list[dict[str, str]]:
    """Positive reviews preferred to negative ones: `rounds` times each review of the rarer sentiment, against
    another one each time.

    Between a review of each sentiment, sigmoid of their log-odds' difference is the probability that the one
    is the positive one: so the scores that preferences teach are log-odds of P(positive), up to a constant.
    A third of the texts are whole and end in `eos`, a third are whole without it, as Triton gets them in the
    text form, and a third are cut behind any word: a writer's text may end anywhere, and a dense reward asks
    after each token.
    """
    rng = np.random.default_rng(seed)
    sides = [[row.text for row in rows if row.label == label] for label in (1, 0)]
    made: list[dict[str, str]] = []
    for _ in range(rounds):
        chosen, rejected = ([side[place] for place in rng.permutation(len(side))] for side in sides)
        made += [
            {"chosen": _shown(good, eos, rng), "rejected": _shown(bad, eos, rng)}
            for good, bad in zip(chosen, rejected, strict=False)
        ]
    return made


def _shown(text: str, eos: str, rng: np.random.Generator) -> str:
    """All of a text, with its end or without, or a beginning."""
    words, way = text.split(" "), rng.integers(3)
    if way == 0 or len(words) <= _SHORTEST_BEGINNING:
        return text + eos
    return text if way == 1 else " ".join(words[: rng.integers(_SHORTEST_BEGINNING, len(words))])
