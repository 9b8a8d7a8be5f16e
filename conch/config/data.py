"""Where samples and prompts come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from conch.config.base import Section


class DataConfig(Section):
    """What a trainer's own command line reads; from Python the data is passed directly, and of these keys
    `columns`, `apply_chat_template`, `min_tokens` and `max_tokens` alone count."""

    train: str | None = None
    """Training rows: a `.txt`, `.jsonl`, `.json` (these also as `.gz`), `.csv` or `.parquet` file, a folder,
    or a dataset of the Hugging Face hub, `owner/name` or `owner/name:split`. docs/data.md has the forms of
    rows."""

    eval: str | None = None
    """Evaluation rows, in the same forms."""

    subset: str | None = None
    """Configuration of a hub dataset that has several (`main` of `openai/gsm8k`)."""

    folder: str | None = None
    """Folder of a hub dataset to read instead of all (`harmless-base` of `Anthropic/hh-rlhf`)."""

    revision: str | None = None
    """Commit, tag or branch of a hub dataset."""

    columns: dict[str, str] = Field(default_factory=dict)
    """Columns that have other names than the forms of docs/data.md: name there -> column of the rows, as in
    `data.columns.prompt=question`; with dots, a key inside a column (`reward_model.ground_truth`). Columns
    that are not named stay as they are."""

    apply_chat_template: bool | None = None
    """Make messages of strings, for the tokenizer's chat template: a prompt is what a user says, a completion
    (chosen, rejected) what the assistant answers, and `Human:` and `Assistant:` in a text begin turns. None
    does so for rows that are questions and answers as their owners publish them (docs/data.md lists them);
    false takes the strings of these as they are."""

    streaming: bool = False
    """Read a hub dataset's rows as they come, without a copy on the disk: with `max_rows`, no more is fetched
    than is used."""

    max_rows: int | None = Field(default=None, ge=1)
    """Training rows to take, the first ones; None takes all."""

    max_eval_rows: int | None = Field(default=None, ge=1)
    """Evaluation rows to take, the first ones; None takes all."""

    min_tokens: int = Field(default=0, ge=0)
    """Shorter training rows (prompts, for trainers that sample) are left out, and counted; in tokens."""

    max_tokens: int | None = Field(default=None, ge=1)
    """Longer ones are left out instead of being cut, and counted; in tokens."""

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _path_as_text(cls, source: Any) -> Any:
        return str(source) if isinstance(source, Path) else source

    @model_validator(mode="after")
    def _some_length_is_left(self) -> DataConfig:
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise ValueError(
                f"`max_tokens` = {self.max_tokens} is below `min_tokens` = {self.min_tokens}: no row is left"
            )
        return self
