"""A run's folder as plain Python: settings, state, metrics, samples and alarms, without torch.

    run = conch.runs.load("outputs/2026-11-30/06-30-00")
    run.state, run.summary.best, run.settings["train"]["seed"]
    run.metrics()                     # one dict a step
    run.samples(source="evaluation")  # one dict a completion
    run.metrics_frame()               # the same as a pandas.DataFrame

Everything is read anew by each call, so the same object follows a run that goes on. Of a file that is being
written the last line may be half there: it is left out.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from conch.errors import ConfigError, DataError, missing_path
from conch.runs.listing import RunSummary, algorithm_of, read_settings, summarise
from conch.runs.state import METRICS_FILE

if TYPE_CHECKING:
    from pandas import DataFrame

ALARMS_FILE = "alarms.jsonl"
CHECKPOINTS = "checkpoints"

Source = Literal["evaluation", "rollout", "table"]

_SAMPLE_FILES: dict[Source, tuple[str, re.Pattern[str]]] = {
    "evaluation": ("evaluations", re.compile(r"step_(?P<step>\d+)(?P<variant>@.+)?\.jsonl")),
    "rollout": ("rollouts", re.compile(r"step_(?P<step>\d+)(?P<variant>@.+)?\.jsonl")),
    "table": ("samples", re.compile(r"eval(?P<variant>@.+)?_(?P<step>\d+)\.csv")),
}
"""Source -> folder of a run, and names of its files."""


@dataclass(frozen=True, slots=True)
class SampleFile:
    """A file with samples of one step.

    variant: suffix of a swept generation argument (`@beta=10`), "" without one.
    """

    path: Path
    source: Source
    step: int
    variant: str


@dataclass(frozen=True)
class Run:
    """A run on disk; make it with `load`.

    folder: of the run.
    """

    folder: Path

    @property
    def settings(self) -> dict[str, Any]:
        """The resolved configuration, section by section; {} where the run wrote none.

        Raises:
            DataError: `config.yaml` is damaged.
        """
        return read_settings(self.folder)

    @property
    def algorithm(self) -> str:
        """`ppo`, `grpo`, `async_grpo`, `rft`, `ilql`, `sft` or `reward_model`; "" where it is not known."""
        return algorithm_of(self.settings)

    @property
    def summary(self) -> RunSummary:
        """How the run stands: its state, steps, and best evaluation so far."""
        return summarise(self.folder)

    @property
    def state(self) -> str:
        """`running`, `finished`, `stopped`, `failed` or `killed`."""
        return self.summary.state

    @property
    def checkpoints(self) -> dict[int, Path]:
        """Step -> folder of a checkpoint, oldest first; whole ones, as a checkpoint is renamed once it is."""
        return dict(reversed(steps_of(self.folder).items()))

    def metrics(self) -> list[dict[str, Any]]:
        """One dict a step, in their order: `step`, and metric -> value, None for what was no number.

        Steps have different metrics, for not all of them evaluate. docs/metrics.md explains each name.

        Raises:
            DataError: a line is damaged; the last one may be half-written.
        """
        by_step: dict[int, dict[str, Any]] = {}
        for row in read_lines(self.folder / METRICS_FILE, needed="step"):
            by_step.setdefault(row["step"], {}).update(row)
        return [by_step[step] for step in sorted(by_step)]

    def alarms(self) -> list[dict[str, Any]]:
        """One dict for each alarm that began: `step`, `name`, `message`; [] where there was none."""
        path = self.folder / ALARMS_FILE
        return list(read_lines(path, needed="step")) if path.is_file() else []

    def sample_files(self) -> list[SampleFile]:
        """Files with samples, by source, step and variant.

        A table is left out where the whole evaluation was kept.
        """
        files: list[SampleFile] = []
        for source, (folder, pattern) in _SAMPLE_FILES.items():
            paths = (self.folder / folder).iterdir() if (self.folder / folder).is_dir() else ()
            matches = ((path, pattern.fullmatch(path.name)) for path in paths)
            found = [
                SampleFile(path, source, int(match["step"]), match["variant"] or "")
                for path, match in matches
                if match
            ]
            files += sorted(found, key=lambda file: (file.step, file.variant))
        kept = {(file.step, file.variant) for file in files if file.source == "evaluation"}
        return [file for file in files if file.source != "table" or (file.step, file.variant) not in kept]

    def samples(self, *, source: Source | None = None, step: int | None = None) -> list[dict[str, Any]]:
        """One dict a completion, those of evaluations first, by step.

        source: `evaluation` (every completion of an evaluation, `evaluation.keep`), `rollout` (what was
            trained on, `tracking.rollouts`) or `table` (the first rows of an evaluation whose completions
            were not kept); None takes all.
        step: None takes all.

        Returns:
            dicts with `source`, `step`, `variant`, `prompt` (text), `output` and `reward` (None where there
            is none), and as far as they are known `num_tokens`, `gold` and other scores of an evaluation by
            their names, `objective/<name>` of a reward with several, `member/<name>` of an ensemble,
            `fact/<name>`, `status` (of the reward), `kl`, `finish_reason`, `policy_version`, `metadata`,
            and `messages` of a dialogue.

        Raises:
            DataError: a line is damaged; the last one of a file may be half-written.
        """
        weights = (self.settings.get("reward") or {}).get("weights") or {}
        return [
            row
            for file in self.sample_files()
            if source in (None, file.source) and step in (None, file.step)
            for row in read_samples(file, weights)
        ]

    def _repr_html_(self) -> str:
        """What a notebook shows of a run that is the last value of a cell."""
        from conch.runs.notebook import run_html

        return run_html(self)

    def metrics_frame(self) -> DataFrame:
        """`metrics` as a pandas.DataFrame with the steps as its index.

        Raises:
            ConfigError: pandas is not installed.
        """
        frame = _frame(self.metrics(), ["step"])
        return frame.set_index("step")

    def samples_frame(self, *, source: Source | None = None, step: int | None = None) -> DataFrame:
        """`samples` as a pandas.DataFrame.

        Raises:
            ConfigError: pandas is not installed.
        """
        return _frame(
            self.samples(source=source, step=step), ["source", "step", "prompt", "output", "reward"]
        )


def load(folder: str | Path) -> Run:
    """Read a run's folder: `train.run_dir`, or `outputs/<date>/<time>`.

    Raises:
        DataError: it is no run; names a run that may be meant.
    """
    path = Path(folder)
    if not (path / METRICS_FILE).is_file():
        raise DataError(no_run(path))
    return Run(path)


def steps_of(run_dir: Path) -> dict[int, Path]:
    """Return step -> checkpoint folder of a run, whole or not, newest first."""
    folders = {
        int(match[1]): folder
        for folder in (run_dir / CHECKPOINTS).glob("step_*")
        if (match := re.fullmatch(r"step_(\d+)", folder.name))
    }
    return dict(sorted(folders.items(), reverse=True))


def no_run(folder: Path) -> str:
    """What to say of a folder without metrics."""
    if not folder.exists():
        return f"there is no folder {folder}{missing_path(folder)}"
    above = next((parent for parent in folder.resolve().parents if (parent / METRICS_FILE).is_file()), None)
    if above is not None:
        return f"{folder} is not a run folder, but lies in one: give {above}"
    below = sorted(folder.glob(f"**/{METRICS_FILE}"), key=lambda path: path.stat().st_mtime)
    newest = f"; the newest run below it is {below[-1].parent}" if below else ""
    return f"{folder} is not a run folder: it has no {METRICS_FILE}{newest}"


def read_lines(path: Path, *, needed: str = "") -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file; a last line that is half-written is left out.

    needed: a key that every object must have.

    Raises:
        DataError: the file cannot be read, or a line before the last is damaged.
    """
    try:
        lines = path.read_bytes().splitlines()  # of bytes: a text may hold Unicode's own line ends
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:  # no JSON, or no UTF-8
            if number == len(lines):
                return
            raise DataError(f"line {number} of {path} is damaged: {error}; delete that line") from error
        if not isinstance(row, dict) or (needed and not isinstance(row.get(needed), int)):
            wanted = f"no object with a {needed}" if needed else "no object"
            raise DataError(f"line {number} of {path} is damaged: {wanted}; delete that line")
        yield row


def read_samples(file: SampleFile, weights: Mapping[str, float] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of `Run.samples` that one file holds.

    weights: of a reward's objectives, in rollouts; 1 for those that it does not name.

    Raises:
        DataError: a line is damaged; the last one may be half-written.
    """
    where = {"source": file.source, "step": file.step, "variant": file.variant}
    if file.source == "table":
        yield from ({**where, **row} for row in _table_rows(file.path))
        return
    for line in read_lines(file.path):
        if "conch_evaluation" in line:  # the head of an evaluation
            continue
        if "output" not in line:
            raise DataError(f"{file.path} is damaged: a line has no output; delete the file")
        row = _evaluated(line) if file.source == "evaluation" else _rollout(line, weights or {})
        yield {**where, **row}


def as_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """A prompt as text; of messages, each one's role and content."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message.get('role', '')}: {_content(message)}" for message in prompt)


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def _evaluated(line: Mapping[str, Any]) -> dict[str, Any]:
    prompt, scores = line.get("input", ""), line.get("scores") or {}
    row = {"prompt": as_text(prompt), "output": line["output"], "reward": scores.get("reward"), **scores}
    row |= {"num_tokens": line.get("num_tokens")}
    row |= {f"member/{name}": score for name, score in (line.get("members") or {}).items()}
    if line.get("metadata"):
        row["metadata"] = line["metadata"]
    if not isinstance(prompt, str):
        row["messages"] = prompt
    return row


def _rollout(line: Mapping[str, Any], weights: Mapping[str, float]) -> dict[str, Any]:
    scores, dense = line.get("scores") or {}, line.get("token_scores")
    reward = None
    if line.get("reward_status", "ok") == "ok" and (scores or dense):
        shares = [_weight(name, weights) * score for name, score in scores.items() if score is not None]
        reward = math.fsum(shares) if dense is None else math.fsum(dense)
    row = {"prompt": line.get("prompt", ""), "output": line["output"], "reward": reward}
    row |= {"status": line.get("reward_status"), "kl": line.get("kl")}
    row |= {name: line.get(name) for name in ("finish_reason", "policy_version")}
    if len(scores) > 1:
        row |= {f"objective/{name}": score for name, score in scores.items()}
    row |= {f"member/{name}": score for name, score in (line.get("members") or {}).items()}
    return row | {f"fact/{name}": value for name, value in (line.get("facts") or {}).items()}


def _weight(objective: str, weights: Mapping[str, float]) -> float:
    """Its own, of `member/objective` else that of its member, else 1: as `conch.rewards` weighs them."""
    return weights.get(objective, weights.get(objective.partition("/")[0], 1.0))


def _table_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a table of samples; one that is half-written is left out."""
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            head, *rows = [*csv.reader(file)] or [[]]
    except (OSError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    for cells in rows:
        if len(cells) != len(head):
            continue
        row: dict[str, Any] = dict(zip(head, cells, strict=True))
        texts = {name: row.pop(name, "") for name in ("prompt", "output")}
        scores = {name.removesuffix("/reward"): _number(cell) for name, cell in row.items()}
        yield {**texts, "reward": scores.get("reward"), **scores}


def _number(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _frame(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> DataFrame:
    """A DataFrame of these rows; of none, with these columns."""
    try:
        import pandas
    except ImportError as error:
        raise ConfigError(
            "a DataFrame needs pandas: pip install pandas; `metrics()` and `samples()` do without"
        ) from error
    return pandas.DataFrame.from_records(list(rows), columns=None if rows else list(columns))
