"""Rows to steer: of a probe, or generated; each with its prompt."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from conch.config import DataConfig, RewardConfig
from conch.data.files import like_rows, rows_at, training_rows
from conch.errors import ConfigError, DataError, RewardError
from conch.rewards.factory import from_user
from conch.rewards.steering.rows import steering_goals
from conch.types import Completion, Prompt, Rollout
from examples.steerability import texts
from examples.steerability.settings import SteerabilityConfig

Row = dict[str, Any]

TEXT, TEXT_ID = "text", "original_index"
SOURCE, TARGET, GOALS = "source_", "target_", "steering_goals"

_PHRASES = {
    "reading_difficulty": ("harder to read", "easier to read"),
    "formality": ("more formal", "more casual"),
    "textual_diversity": ("more varied in its words", "less varied in its words"),
    "text_length": ("longer", "shorter"),
}
"""Goal -> what more and less of it are called; others are named as they are."""

_ONLY = (
    "Leave everything else about it as it is, even where that sounds odd. Answer with the new text alone, "
    "without any explanation."
)


def instruction(row: Mapping[str, Any], goals: Sequence[str]) -> str:
    """Say in words which way and how far a row's text shall go."""
    wishes = []
    for goal in goals:
        source = _number(row.get(SOURCE + goal))
        target = None if source is None else _target(row.get(TARGET + goal), source)
        if target is None or source is None or target == source:
            continue
        more, less = _PHRASES.get(goal, (f"higher in {goal}", f"lower in {goal}"))
        move = target - source
        much = "much " if abs(move) > 0.5 else "slightly " if abs(move) < 0.2 else ""
        wishes.append(f"{much}{more if move > 0 else less}")
    if not wishes:
        return f"Write the text below again. {_ONLY}"
    listed = wishes[0] if len(wishes) == 1 else f"{', '.join(wishes[:-1])} and {wishes[-1]}"
    return f"Rewrite the text below so that it is {listed}. {_ONLY}"


def _number(value: Any) -> float | None:
    """None for what is none; the reward says so when it checks the row."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _target(value: Any, source: float) -> float | None:
    """A target; of a range the point that is nearest to where the text is."""
    if isinstance(value, (list, tuple)) and len(value) == 2:
        low, high = (_number(each) for each in value)
        return None if low is None or high is None else min(max(source, low), high)
    return _number(value)


def read_probe(config: SteerabilityConfig, goals: Sequence[str]) -> tuple[list[Row], list[Row]]:
    """Rows to learn from and rows to evaluate on: texts of one half of a probe each.

    goals: that rows are steered in which name none themselves.

    Raises:
        DataError: a column is missing, or there are fewer texts than are asked for.
    """
    assert config.probe is not None
    rows = training_rows(DataConfig(train=str(config.probe)), "rows", form=_row_with_text)
    by_text: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        by_text.setdefault(str(row.get(TEXT_ID, row[TEXT])), []).append(index)
    rng = random.Random(config.sampling_seed)
    names = sorted(by_text)
    rng.shuffle(names)
    half = len(names) // 2
    wanted = {"source_texts": (config.source_texts, names[half:])}
    wanted["held_out_texts"] = (config.held_out_texts, names[:half])
    for setting, (number, there) in wanted.items():
        if number > len(there):
            raise DataError(
                f"{config.probe} has {len(names)} texts, {len(there)} of them for this; "
                f"`steerability.{setting}` asks for {number}"
            )

    def drawn(number: int, there: Sequence[str], per_text: int) -> list[Row]:
        indices = [
            index
            for name in there[:number]
            for index in rng.sample(by_text[name], min(per_text, len(by_text[name])))
        ]
        chosen = rows_at(rows, indices, "row")
        return like_rows(chosen, [_with_prompt(row, goals) for row in chosen])

    return (
        drawn(config.source_texts, names[half:], config.instructions_per_text),
        drawn(config.held_out_texts, names[:half], config.held_out_instructions),
    )


def _row_with_text(row: Any) -> Row:
    if not isinstance(row, Mapping) or not isinstance(row.get(TEXT), str):
        raise DataError(f"has no `{TEXT}`, the text to be rewritten")
    return dict(row)


def _with_prompt(row: Row, goals: Sequence[str]) -> Row:
    try:
        own = steering_goals(row, tuple(goals))
    except DataError:  # the reward says so, with the row's line, when it checks the row
        own = ()
    content = f"{instruction(row, own)}\n\n{row[TEXT]}"
    kept = {key: value for key, value in row.items() if key.startswith((SOURCE, TARGET)) or key == GOALS}
    return {**kept, "prompt": [{"role": "user", "content": content}]}


def generated_rows(config: SteerabilityConfig, reward: RewardConfig) -> tuple[list[Row], list[Row]]:
    """Rows of generated texts, with their places in goal space as the reward's goals measure them."""
    return (
        _generated(
            config.source_texts, config.instructions_per_text, f"train {config.sampling_seed}", reward
        ),
        _generated(
            config.held_out_texts, config.held_out_instructions, f"held out {config.sampling_seed}", reward
        ),
    )


def _generated(number: int, per_text: int, seed: str, reward: RewardConfig) -> list[Row]:
    rng = random.Random(seed)
    sources = [texts.source_text(rng) for _ in range(number)]
    rows: list[Row] = []
    for text, values in zip(sources, measured(sources, reward), strict=True):
        here = {goal: values[goal] for goal in texts.STEERED}
        for _ in range(per_text):
            asked = {goal: rng.choice(texts.LEVELS) for goal in texts.STEERED}
            rows.append(
                {
                    "prompt": texts.tiny_prompt(text, here, asked),
                    **{SOURCE + goal: value for goal, value in values.items()},
                    **{TARGET + goal: value for goal, value in asked.items()},
                    GOALS: list(texts.STEERED),
                }
            )
    return rows


def measured(sources: Sequence[str], reward: RewardConfig) -> list[dict[str, float]]:
    """Where texts are in goal space, by the goals that the reward is made of.

    Raises:
        RewardError: a goal has no value for a text.
        ConfigError: the texts' goals are not among them.
    """
    plain = reward.model_copy(update={"steering": type(reward.steering)()})
    with from_user(None, plain) as source:
        source.check()
        samples = [Rollout(Prompt("", ()), Completion(text, (), (), "eos"), 0) for text in sources]
        results = source.submit(samples).result()
    bad = next((result for result in results if not result.ok), None)
    if bad is not None:
        raise RewardError(f"the generated texts cannot be measured: {bad.detail}")
    missing = [goal for goal in texts.STEERED if goal not in results[0].scores]
    if missing:
        raise ConfigError(
            f"generated texts are steered in {' and '.join(texts.STEERED)}, and the reward measures "
            f"{', '.join(results[0].scores)}: name these goals too, or give a `steerability.probe`"
        )
    return [dict(result.scores) for result in results]
