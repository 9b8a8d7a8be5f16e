"""Prompts of GSM8K and IFEval: what the model is asked for, beside what its completion is checked against."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from conch.config import DataConfig, RewardConfig
from conch.data.files import rows_at, training_rows
from conch.errors import DataError
from examples.grpo.settings import EnvSettings

TAGS = ("<think>", "</think>", "<answer>", "</answer>")

_THINK = "Think first, between <think> and </think>: write down how you come to your answer."
_TAGGED = "Then give the answer itself, once, between <answer> and </answer>."
_NUMBER = "The answer is a number, without a unit and without words."
_BARE = "Then write what was asked for, and nothing else."

_HUB = {
    "gsm8k": DataConfig(train="openai/gsm8k", subset="main", eval="openai/gsm8k:test"),
    "ifeval": DataConfig(train="google/IFEval"),
}


def form_asked_for(dataset: str, reward: RewardConfig) -> str:
    """What a prompt says about the form of the completion: the reasoning in <think>, the answer in <answer>.

    Where IFEval's `share` is the reward, the answer stands bare: tags around it would be words of a text that
    must end with others, say.
    """
    if dataset == "gsm8k":
        return f"{_THINK} {_TAGGED} {_NUMBER}"
    return f"{_THINK} {_BARE if reward.ifeval.version == 'share' else _TAGGED}"


def messages(text: str, form: str) -> list[dict[str, str]]:
    """A prompt as what a user says, for models with a chat template. All in one turn: some templates know no
    system's."""
    return [{"role": "user", "content": f"{text.strip()}\n\n{form}"}]


def plain(text: str, form: str) -> str:
    """A prompt as a text that a model without a chat template goes on with."""
    return f"{text.strip()}\n\n{form}\n\nSolution:\n"


def read_prompts(
    env: EnvSettings, asked: str, *, has_template: bool, evaluates: bool
) -> tuple[Sequence[dict[str, Any]], Sequence[dict[str, Any]] | None]:
    """Prompts to train on, and to evaluate with, each with the row's columns beside.

    asked: see `form_asked_for`.
    has_template: whether the tokenizer has a chat template.
    evaluates: False reads none for evaluations.

    Raises:
        DataError: there are no such rows.
    """
    make = messages if has_template else plain
    form = _form(env.dataset, lambda text: make(text, asked))
    hub = _HUB[env.dataset]
    source = hub if env.data is None else DataConfig(train=env.data)
    rows = training_rows(source.model_copy(update={"max_rows": env.max_rows}), "prompts", form=form)
    if not evaluates:
        return rows, None
    other = env.eval_data or (hub.eval if env.data is None else None)
    if other is not None:
        held = source.model_copy(update={"train": other, "max_rows": env.max_eval_rows})
        return rows, training_rows(held, "evaluation prompts", form=form)
    number = min(env.max_eval_rows, len(rows) // 10)
    if not number:
        raise DataError(
            f"{len(rows)} prompts are too few to keep a tenth of them for evaluations: give `env.eval_data`, "
            "or set `train.eval_frequency=0`"
        )
    kept = len(rows) - number
    return rows_at(rows, range(kept), "prompt"), rows_at(rows, range(kept, len(rows)), "prompt")


def _form(dataset: str, prompt_of: Callable[[str], Any]) -> Callable[[Any], dict[str, Any]]:
    """Brings rows as they are published into prompts."""
    column = {"gsm8k": "question", "ifeval": "prompt"}[dataset]
    needed = {"gsm8k": ("answer",), "ifeval": ("instruction_id_list", "kwargs")}[dataset]

    def form(row: Any) -> dict[str, Any]:
        if not isinstance(row, Mapping) or not isinstance(row.get(column), str):
            raise DataError(f"has no text `{column}`, as rows of {dataset} have")
        missing = [name for name in needed if row.get(name) is None]
        if missing:
            raise DataError(f"has no `{missing[0]}`, as rows of {dataset} have")
        rest = {name: value for name, value in row.items() if name not in (column, "prompt")}
        return {"prompt": prompt_of(row[column]), **rest}

    return form
