"""The options of `conch score`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from conch.cli import Option
from conch.config import Section
from conch.rewards.score import AskOptions
from conch.scoring.original import OriginalOptions
from conch.scoring.reading import InputFormat


class ColumnOptions(Section):
    """Columns of the input that have other names than in docs/data.md; with dots, a key inside of one."""

    text: str | None = None
    """Column of the whole text."""

    prompt: str | None = None
    """Column of the prompt, a text or messages."""

    completion: str | None = None
    """Column of the answer to the prompt."""

    messages: str | None = None
    """Column of the whole dialogue."""

    chosen: str | None = None
    """Column of a pair's better text, or of a list of them."""

    rejected: str | None = None
    """Column of a pair's worse text, or of a list of them."""

    answer: str | None = None
    """Column of the answer that a verifier compares with."""

    subset: str | None = None
    """Column of what pairs are reported by; by default `subset` or `domain` where there is one."""


class ScoreOptions(AskOptions):
    """Score samples or pairs with a reward: files, tables or standard input in, scores and a report out."""

    path: Annotated[str, Option(positional=True)] = "-"
    """File of rows, .jsonl, .json, .txt, .csv, .tsv (these also as .gz or .zst) or .parquet, a folder, or a
    dataset of the hub. `-` reads JSON lines from standard input."""

    url: str | None = None
    """`host:port/model`, several hosts with commas between, or `http://host:port/path`; without it the
    TRITON_HOST environment variable."""

    reward: str | None = None
    """Any reward in place of --url: what --url may be, `verifier:gsm8k`, `file.py:function`, and what else
    `reward` is in training."""

    batch_rows: int = Field(default=64, ge=1)
    """Most samples in a request."""

    rows_at_once: int = Field(default=256, ge=1)
    """Rows that are asked for together, and written together when all have their scores. A function is called
    for as many."""

    input_format: InputFormat | None = None
    """Format of the rows, where the ending does not say it or rows come from standard input."""

    rows_are: Literal["samples", "pairs"] | None = None
    """What a row is; by default the first rows tell."""

    columns: ColumnOptions = Field(default_factory=ColumnOptions)
    """Columns of the input that have other names than in docs/data.md; with dots, a key inside of one."""

    output: Annotated[Path | None, Option(("-o", "--output"))] = None
    """File for the scores, .jsonl, .csv or .parquet, which a later call goes on from; by default JSON lines
    to standard output."""

    keep: bool = False
    """Write the columns of the input in front of the scores."""

    overwrite: bool = False
    """Score anew where the output holds scores already."""

    retry_failed: bool = False
    """Ask again for the rows of the output that have no score, before going on with it."""

    report: Path | None = None
    """File for the report as JSON."""

    objective: str | None = None
    """Of several scores of a sample, the one that pairs and differences are about; by default their sum."""

    against: str | None = None
    """A second reward to compare with: another model, as --url or --reward names one, or the original of
    Hugging Face, a folder or a model of the hub, which computes here."""

    tolerance: float | None = Field(default=None, ge=0)
    """With --against: largest difference of two scores; a larger one is exit code 3."""

    original: OriginalOptions = Field(default_factory=OriginalOptions)
    """How the original of --against is read, where its files do not say; as `conch convert` takes it."""

    @model_validator(mode="after")
    def _one_reward(self) -> ScoreOptions:
        if self.url is not None and self.reward is not None:
            raise ValueError(f"--url {self.url} and --reward {self.reward}: give one of them")
        if self.tolerance is not None and self.against is None:
            raise ValueError("--tolerance is about two rewards: give the other one by --against")
        if self.retry_failed and self.output is None:
            raise ValueError("--retry-failed is about rows of an output: name it by --output")
        if self.retry_failed and self.overwrite:
            raise ValueError("--retry-failed keeps the scores that --overwrite removes: give one of them")
        return self
