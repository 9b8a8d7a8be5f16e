"""Evaluations that a run keeps: every completion with its scores, one file each, to be scored again later.

`<run>/evaluations/step_000100.jsonl`, of a variant `step_000100@beta=10.jsonl`. The first line says what the
file is, each other line is one completion; those of a prompt stand together, in the order in which they were
sampled. A file is replaced as a whole: readers see the old one or the new one.

    {"conch_evaluation": 1, "step": 100, "variant": "", "metrics": {"eval/reward": ..., "eval/kl": ...},
     "sources": {"reward": "rm at host:8001"}}
    {"prompt": 0, "input": "a text, or [messages]", "output": "...", "num_tokens": 12,
     "scores": {"reward": 1.5, "gold": null}, "members": {"a": 1.4, "b": 1.6}, "metadata": {"answer": "7"}}
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from conch.atomic_files import replace_text
from conch.errors import DataError, missing_path

EVALUATIONS = "evaluations"
PROXY = "reward"
"""Name of the score that is learned from."""
GOLD = "gold"
"""Default name of the score that only watches."""

_FORMAT = 1
_NAME = re.compile(r"step_(\d+)(@.+)?\.jsonl")


@dataclass(frozen=True, slots=True)
class EvaluatedSample:
    """One completion of an evaluation.

    prompt: place of its prompt among the evaluation's prompts.
    input: the prompt, as text or as messages.
    scores: name of a source -> total score; None where it gave none.
    members: for an ensemble, each member's own score.
    metadata: the prompt's extra keys, which a verifier or a reward function reads.
    """

    prompt: int
    input: str | list[Mapping[str, Any]]
    output: str
    num_tokens: int
    scores: Mapping[str, float | None]
    members: Mapping[str, float | None] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def variance(self) -> float | None:
        """Population variance of the members' scores there are; None where no member gave one."""
        return members_variance(self.members)


def members_variance(members: Mapping[str, float | None]) -> float | None:
    """Population variance of the scores there are; None where there is none."""
    there = [score for score in members.values() if score is not None]
    if not there:
        return None
    mean = math.fsum(there) / len(there)
    return math.fsum((score - mean) ** 2 for score in there) / len(there)


@dataclass(frozen=True, slots=True)
class EvaluationRecord:
    """What was evaluated at a step.

    variant: suffix of a swept generation argument, "" without one.
    metrics: of the evaluation, by name; NaN as None.
    sources: name of a score -> what gave it.
    """

    step: int
    samples: tuple[EvaluatedSample, ...]
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    variant: str = ""
    sources: Mapping[str, str] = field(default_factory=dict)

    def column(self, name: str) -> list[float]:
        """A source's scores, NaN where it gave none or was never asked."""
        values = (sample.scores.get(name) for sample in self.samples)
        return [math.nan if value is None else value for value in values]

    def with_scores(self, name: str, scores: Sequence[float | None], source: str) -> EvaluationRecord:
        """The same with another source's scores, one per sample in order."""
        assert len(scores) == len(self.samples), "one score per sample"
        pairs = zip(self.samples, scores, strict=True)
        samples = tuple(
            replace(sample, scores={**sample.scores, name: number_or_none(score)}) for sample, score in pairs
        )
        return replace(self, samples=samples, sources={**self.sources, name: source})


def record_path(run_dir: Path, step: int, variant: str = "") -> Path:
    """Where the record of a step lies, or will."""
    return run_dir / EVALUATIONS / f"step_{step:06d}{variant}.jsonl"


def write_record(path: Path, record: EvaluationRecord) -> None:
    """Write a record, or replace it.

    Raises:
        OSError: the disk failed; the old content stays.
    """
    head = {
        "conch_evaluation": _FORMAT,
        "step": record.step,
        "variant": record.variant,
        "metrics": {name: number_or_none(value) for name, value in record.metrics.items()},
        "sources": dict(record.sources),
    }
    rows = (
        {
            "prompt": sample.prompt,
            "input": sample.input,
            "output": sample.output,
            "num_tokens": sample.num_tokens,
            "scores": {name: number_or_none(value) for name, value in sample.scores.items()},
            "members": {name: number_or_none(value) for name, value in sample.members.items()},
            **({"metadata": dict(sample.metadata)} if sample.metadata else {}),
        }
        for sample in record.samples
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, "".join(f"{_line(row)}\n" for row in (head, *rows)))


def delete_records(run_dir: Path, first_step: int) -> None:
    """Delete a run's records of this step and later ones, and what a kill left of one that was written."""
    for path in _listed(run_dir / EVALUATIONS):
        match = _NAME.fullmatch(path.name.removeprefix(".").removesuffix(".partial"))
        if match is not None and (int(match[1]) >= first_step or path.name.startswith(".")):
            path.unlink()


def read_record(path: Path) -> EvaluationRecord:
    """Read a record.

    Raises:
        DataError: the file is missing, damaged (the line is named) or of another format.
    """
    try:
        lines = path.read_bytes().splitlines()  # of bytes: a text may hold Unicode's own line ends
    except OSError as error:
        raise DataError(f"the evaluation {path} cannot be read: {error}{missing_path(path)}") from error
    rows = [_parsed(path, number, line) for number, line in enumerate(lines, start=1)]
    if not rows or rows[0].get("conch_evaluation") != _FORMAT:
        raise DataError(f"{path} is no evaluation that this release of Conch reads")
    head = rows[0]
    try:
        samples = tuple(EvaluatedSample(**row) for row in rows[1:])
        return EvaluationRecord(head["step"], samples, head["metrics"], head["variant"], head["sources"])
    except (TypeError, KeyError) as error:
        raise DataError(f"{path} is damaged: {error}; delete it, or evaluate again") from error


def records_of(run_dir: Path, variant: str = "") -> list[Path]:
    """Files of a run's evaluations of one variant, by step; empty where it kept none.

    run_dir: the run, or its folder of evaluations itself.
    """
    folder = run_dir / EVALUATIONS if (run_dir / EVALUATIONS).is_dir() else run_dir
    found: dict[int, Path] = {}
    for path in _listed(folder):
        if (match := _NAME.fullmatch(path.name)) and (match[2] or "") == variant:
            found[int(match[1])] = path
    return [found[step] for step in sorted(found)]


def _listed(folder: Path) -> Iterable[Path]:
    return folder.iterdir() if folder.is_dir() else ()


def _line(row: Mapping[str, Any]) -> str:
    """JSON with the letters of all languages as they are; with escapes where half of a surrogate pair, which
    UTF-8 has no place for, stands in a text."""
    line = json.dumps(row, ensure_ascii=False, default=str)
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(row, default=str)
    return line


def _parsed(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"line {number} of {path} is damaged: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"line {number} of {path} is damaged: no object")
    return row


def number_or_none(value: float | None) -> float | None:
    """The value as JSON has it, without NaN and infinity."""
    return None if value is None or not math.isfinite(value) else float(value)
