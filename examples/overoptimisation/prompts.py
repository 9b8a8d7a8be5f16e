"""Instructions, and what is made of them: the policy's prompt, and what a gold reward model reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from conch.config import DataConfig, load
from conch.data.files import evaluation_rows, training_rows
from conch.errors import ConfigError, DataError
from conch.evaluation.records import EvaluatedSample
from conch.types import Completion, Prompt, Rollout
from examples.overoptimisation.settings import OPEN_ASSISTANT, StudyConfig

CHAT = "chat"
INSTRUCTION, INPUT = "instruction", "input"

_KNOWN: Mapping[str, DataConfig] = {
    "alpaca_farm": DataConfig(
        train="tatsu-lab/alpaca_farm:unlabeled",
        eval="tatsu-lab/alpaca_farm:val",
        subset="alpaca_instructions",
    )
}
"""Datasets that have a name of their own."""

_EOS = "<|endoftext|>"
"""Of the paper's models."""

_DEBUG_PROMPTS = 10
_HELD_OUT = 10
"""One instruction in so many is kept for evaluations where the data has none for them."""

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### "
    "Input:\n{input}\n\n### Response:"
)
"""The prompts that AlpacaFarm's models have learned from."""


def read_prompts(config: StudyConfig, eos: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Prompts to train on and to evaluate with, each with its instruction beside.

    eos: the policy's, for the template.

    Raises:
        ConfigError, DataError: there are none.
    """
    train: list[dict[str, str]] = []
    held: list[dict[str, str]] = []
    for dataset in config.datasets:
        data = _data(dataset)
        rows = training_rows(data, "instructions", form=instruction_of_row)
        others = evaluation_rows(data, form=instruction_of_row)
        if others is None:
            number = max(1, len(rows) // _HELD_OUT)
            rows, others = rows[:-number], rows[-number:]
        train += rows
        held += others
    if not train:
        raise DataError(f"{config.datasets[0]} has too few instructions to keep some for evaluations")
    held = held[: config.eval_size][: config.num_eval_prompts or None]
    if config.debug:
        train, held = train[:_DEBUG_PROMPTS], held[:_DEBUG_PROMPTS]
    made = [[prompt_of(row, config.prompt_template, eos) for row in rows] for rows in (train, held)]
    return made[0], made[1]


def _data(dataset: str | Mapping[str, Any]) -> DataConfig:
    if isinstance(dataset, str):
        return _KNOWN.get(dataset) or DataConfig(train=dataset)
    try:
        return load(DataConfig, dataset)
    except ConfigError as error:
        raise ConfigError(f"`datasets`: {error}") from None


def instruction_of_row(row: Any) -> dict[str, str]:
    """A row with its instruction and, where there is one, its input.

    Raises:
        DataError: it has neither `instruction` nor a text `prompt`.
    """
    if isinstance(row, str):
        return {INSTRUCTION: row}
    told = (row.get(INSTRUCTION) or row.get("prompt")) if isinstance(row, Mapping) else None
    if not isinstance(told, str) or not told.strip():
        raise DataError("has no text `instruction` (or `prompt`)")
    more = row.get(INPUT)
    return {INSTRUCTION: told, **({INPUT: more} if isinstance(more, str) and more.strip() else {})}


def prompt_of(row: Mapping[str, str], template: str, eos: str) -> dict[str, Any]:
    """What the policy reads of an instruction, which stands beside it."""
    told = "\n".join(row[key] for key in (INSTRUCTION, INPUT) if key in row)
    if template == CHAT:
        return {"prompt": [{"role": "user", "content": told}], **row}
    head, _, tail = template.partition("{instruction}")
    return {"prompt": head.replace("{eos}", eos) + told + tail.replace("{eos}", eos), **row}


def alpaca(sample: EvaluatedSample) -> Rollout:
    """A sample as AlpacaFarm's reward models read it: Alpaca's prompt around the instruction, then the
    answer."""
    told, more = sample.metadata.get(INSTRUCTION), sample.metadata.get(INPUT)
    if told is None:  # of a file of the paper's code, which holds no more than the instruction
        told = sample.input if isinstance(sample.input, str) else sample.input[-1].get("content")
    template = _ALPACA_WITH_INPUT.replace("{input}", str(more)) if more else _ALPACA
    text = template.replace("{instruction}", str(told), 1)
    return Rollout(Prompt(text, ()), Completion(sample.output, (), (), "eos"), policy_version=0)


def with_marks(sample: EvaluatedSample) -> Rollout:
    """A sample of a file of the paper's code as its models read it: between the marks of a dialogue."""
    assert isinstance(sample.input, str), "such a file holds texts"
    text = OPEN_ASSISTANT.replace("{instruction}", sample.input).replace("{eos}", _EOS)
    return Rollout(Prompt(text, ()), Completion(sample.output, (), (), "eos"), policy_version=0)


def names_of(paths: Sequence[str]) -> dict[str, str]:
    """Short names of reward models, all different -> the models: the ends of their paths."""
    short = [path.rstrip("/").rpartition("/")[2] for path in paths]
    return {
        (name if short.count(name) == 1 else f"{name}-{number}"): path
        for number, (name, path) in enumerate(zip(short, paths, strict=True), start=1)
    }
