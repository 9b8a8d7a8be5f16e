"""A judge that sees all completions of a prompt at once: which is the better one, not how good each is.

Equal answers are shown once and score alike. The order in which answers are shown is drawn from the seed, the
prompt and the answers, so that it is another one for each vote and the same whenever a step is done again.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from typing import Any

from conch.config import JudgeConfig
from conch.rewards.judge.parsers import UnreadableError, json_objects

_RANKED = re.compile(r"\d+(?:\s*[>=,]\s*\d+)+")
_MOST_DIGITS = 9


def shuffled(answers: Sequence[str], prompt: str, seed: int) -> list[int]:
    """Return the places of answers in the order in which they are shown."""
    content = "\0".join([str(seed), prompt, *answers]).encode("utf-8", "backslashreplace")
    order = list(range(len(answers)))
    random.Random(hashlib.sha256(content).digest()).shuffle(order)
    return order


def read_group(text: str, count: int, config: JudgeConfig) -> list[float]:
    """Return a score in [0, 1] for each of the `count` answers, in the order in which they were shown.

    ranking: 1 for the best, 0 for the last, evenly between; those that are told to be equal have their mean.
    best-worst: 1 for the best, 0 for the worst, 0.5 for the others.

    Raises:
        UnreadableError: it does not say so of every answer, or of one that is not there.
    """
    return _best_worst(text, count) if config.parser == "best-worst" else _ranking(text, count)


def _ranking(text: str, count: int) -> list[float]:
    tiers = _tiers(text)
    numbers = [number for tier in tiers for number in tier]
    if sorted(numbers) != list(range(1, count + 1)):
        raise UnreadableError(f"ranks {len(set(numbers))} answers, or one twice, where {count} were shown")
    scores, better = [0.0] * count, 0
    for tier in tiers:
        mean_rank = better + (len(tier) - 1) / 2
        for number in tier:
            scores[number - 1] = 1 - mean_rank / (count - 1)
        better += len(tier)
    return scores


def _tiers(text: str) -> list[list[int]]:
    """Numbers of answers, the best first; those that are equal together."""
    for content in json_objects(text):
        if isinstance(ranking := content.get("ranking"), list):
            return [
                [_number(each) for each in (tier if isinstance(tier, list) else [tier])] for tier in ranking
            ]
    matches = _RANKED.findall(text)
    if not matches:
        raise UnreadableError("holds no ranking such as 2 > 3 > 1")
    tiers = re.split(r"[>,]", matches[-1])
    return [[_number(number) for number in tier.split("=")] for tier in tiers]


def _best_worst(text: str, count: int) -> list[float]:
    for content in json_objects(text):
        if "best" in content and "worst" in content:
            best, worst = _number(content["best"]), _number(content["worst"])
            break
    else:
        found = [
            re.findall(rf"\b{word}\b\W*(?:answer\W*|is\W*)*(\d+)", text, re.I) for word in ("best", "worst")
        ]
        if not all(found):
            raise UnreadableError('holds no {"best": ..., "worst": ...}')
        best, worst = _number(found[0][-1]), _number(found[1][-1])
    if best == worst or not {best, worst} <= set(range(1, count + 1)):
        raise UnreadableError(f"names the same answer as best and worst, or one that is not among {count}")
    scores = [0.5] * count
    scores[best - 1], scores[worst - 1] = 1.0, 0.0
    return scores


def _number(value: Any) -> int:
    is_word = isinstance(value, (int, str)) and not isinstance(value, bool)
    text = str(value).strip() if is_word else ""
    if not text.isdecimal() or len(text) > _MOST_DIGITS:  # Python reads no number of thousands of digits
        raise UnreadableError("has something else than numbers of answers in its ranking")
    return int(text)
