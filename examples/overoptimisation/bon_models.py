"""Scores of answers by reward models: served ones, or checkpoints that this process serves meanwhile."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from conch.atomic_files import replace_text
from conch.config import RewardConfig, load
from conch.config.reward import source_in_short
from conch.log import get_logger, progress
from conch.rewards.factory import from_user
from conch.rewards.scorer import RewardScorer, total_reward
from conch.types import Completion, Dialogue, Prompt, Rollout
from examples.overoptimisation.bon_files import Entry
from examples.overoptimisation.served import Serving, identity_of, served

_log = get_logger("conch.overoptimisation")

TEMPLATE = "<|prompter|>{instruction}<|endoftext|><|assistant|>"
"""What the paper's reward models read in front of an answer."""

_ROWS_AT_ONCE = 1024


def score_entries(
    model: str, entries: Sequence[Entry], folder: Path, *, store: Path, template: str = TEMPLATE
) -> list[np.ndarray]:
    """Score all answers; of each entry one number per answer, in their order.

    Scores are written to `folder` entry by entry, and taken from there where they are of the same answers and
    the same model: a call that was cut short goes on.

    template: what a model of texts reads in front of an answer; a model with a chat template reads the
        instruction as the user's message.

    Raises:
        ConchError: the model cannot be found, converted or served; or it gave an answer no score.
    """
    marks = [mark_of(model, entry, template) for entry in entries]
    paths = [folder / f"entry_{number:06d}.json" for number in range(len(entries))]
    known = [_known(path, mark) for path, mark in zip(paths, marks, strict=True)]
    if all(scores is not None for scores in known):
        return [scores for scores in known if scores is not None]
    folder.mkdir(parents=True, exist_ok=True)
    with served([model], Serving(store)) as addresses:
        address = addresses[model]
        config = load(RewardConfig, {**source_in_short(address), "client": {"cache_size": 0}})
        with closing(from_user(None, config)) as source:
            source.check()
            scorer = RewardScorer(source, config)
            for number, entry in enumerate(progress(entries, desc=f"scoring by {model}")):
                if known[number] is None:
                    scores = _scores(scorer, entry, template)
                    value = {"of": marks[number], "scores": scores.tolist()}
                    replace_text(paths[number], json.dumps(value))
                    known[number] = scores
    return [scores for scores in known if scores is not None]


def _scores(scorer: RewardScorer, entry: Entry, template: str) -> np.ndarray:
    messages = ({"role": "user", "content": entry.instruction},)
    text = template.replace("{instruction}", entry.instruction, 1)
    prompt = Prompt(text, (), dialogue=Dialogue(messages))
    scores: list[float] = []
    for start in range(0, len(entry.answers), _ROWS_AT_ONCE):
        answers = entry.answers[start : start + _ROWS_AT_ONCE]
        scorer.submit([Rollout(prompt, Completion(answer, (), (), "eos"), 0) for answer in answers])
        scores += [total_reward(result, {}) for result in scorer.gather()]
    return np.array(scores)


def mark_of(model: str, entry: Entry, template: str) -> str:
    """What scores are of: the model, and the texts that it reads."""
    told: list[Any] = [identity_of(model), template, entry.instruction, entry.answers]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _known(path: Path, mark: str) -> np.ndarray | None:
    try:
        value = json.loads(path.read_bytes())
        return np.array(value["scores"], dtype=float) if value["of"] == mark else None
    except (OSError, ValueError, TypeError, KeyError):
        return None
