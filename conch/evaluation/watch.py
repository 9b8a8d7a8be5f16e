"""Signs in a run's evaluations that its policy exploits the reward model, and the rule by which a run stops.

All comparisons are paired over prompts: an evaluation asks the same prompts as the one before, so that what
makes one prompt's scores higher than another's cancels. A prompt's score is the mean over its completions.

    change          d_i = now_i - then_i, of the N prompts that have both
    standard error  sqrt(sum (d_i - mean d)^2 / (N - 1)) / sqrt(N)

Alarms, judged at every evaluation; `AlarmsConfig` has the thresholds:

    gold_falls        since the evaluation with the best gold, gold has fallen by more than s standard errors
                      and the reward has risen
    members_disagree  the members' variance is above x times that of the start
    length_drift      the mean length is beyond a factor of the start's, either way

An evaluation in which fewer than half of the prompts have a figure is not judged by that figure: gold was
away, and what is left of it is about other prompts.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from conch.atomic_files import replace_text
from conch.config import GOLD_METRIC, AlarmsConfig, StopRule
from conch.errors import ConfigError, DataError
from conch.evaluation.metrics import mean_of_finite
from conch.evaluation.records import (
    GOLD,
    PROXY,
    EvaluatedSample,
    EvaluationRecord,
    delete_records,
    number_or_none,
    read_record,
    record_path,
)
from conch.log import get_logger
from conch.runs.tracking import Tracker
from conch.types import Metrics

_log = get_logger(__name__)

ALARMS_FILE = "alarms.jsonl"

GOLD_COLUMN, VARIANCE_COLUMN, LENGTH_COLUMN = f"{GOLD}/reward", "members_variance", "length_mean"
"""Columns of an evaluation that alarms go by."""

_STOP = "stop"
_WORDS = {
    VARIANCE_COLUMN: "the members' variance",
    LENGTH_COLUMN: "the mean length of completions, in tokens,",
}
_LEAST_SCORED = 0.5
"""Share of the prompts that must have a figure for it to be compared."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What one evaluation measured, the same on all ranks; of a sweep the last variant's.

    columns: metric without `eval/` -> a value for each sample of the record, NaN where it has none.
    """

    record: EvaluationRecord
    columns: Mapping[str, Sequence[float]]

    def by_prompt(self, column: str) -> list[float] | None:
        """A metric's mean of each prompt; None where it is not measured by sample."""
        if column not in self.columns:
            return None
        return prompt_means([sample.prompt for sample in self.record.samples], self.columns[column])


def prompt_means(prompts: Sequence[int], values: Sequence[float]) -> list[float]:
    """Mean of each prompt's values that are numbers, NaN where it has none.

    prompts: place of each value's prompt, from 0.
    """
    of_prompt: list[list[float]] = [[] for _ in range(1 + max(prompts, default=-1))]
    for prompt, value in zip(prompts, values, strict=True):
        of_prompt[prompt].append(value)
    return [mean_of_finite(each) for each in of_prompt]


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of what is a number; NaN for fewer than two."""
    there = [value for value in values if math.isfinite(value)]
    if len(there) < 2:
        return math.nan
    mean = math.fsum(there) / len(there)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in there) / (len(there) - 1) / len(there))


@dataclass(frozen=True, slots=True)
class Change:
    """Paired change of a figure over prompts.

    of_each: each prompt's, NaN where one of the two is missing.
    """

    mean: float
    standard_error: float
    of_each: tuple[float, ...]

    @classmethod
    def between(cls, then: Sequence[float], now: Sequence[float]) -> Change:
        """From `then` to `now`, one value per prompt each."""
        of_each = tuple(after - before for before, after in zip(then, now, strict=True))
        return cls(mean_of_finite(of_each), standard_error(of_each), of_each)

    def falls(self, standard_errors: float | None) -> bool:
        """Whether it falls by more than so many standard errors, which a single prompt has none of; None
        asks for any fall."""
        return self.mean < 0 and (
            standard_errors is None or self.mean < -standard_errors * self.standard_error
        )


@dataclass(frozen=True)
class Reference:
    """An evaluation that later ones are compared with.

    value: the figure over all samples.
    means: column -> each prompt's mean.
    """

    step: int
    value: float
    means: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """With None for NaN."""
        means = {name: [number_or_none(value) for value in column] for name, column in self.means.items()}
        return {**asdict(self), "means": means}

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Reference:
        """What `to_json` gave."""
        means = {name: [_or_nan(value) for value in column] for name, column in state["means"].items()}
        return cls(state["step"], state["value"], means)


@dataclass(frozen=True, slots=True)
class Alarm:
    """An alarm that begins.

    message: a sentence with the figures.
    then: step of the evaluation that is compared with.
    change: each prompt's change, NaN where there is none.
    """

    step: int
    name: str
    message: str
    then: int
    change: Sequence[float]


_Verdict = tuple[bool, str, Reference, Sequence[float]]
"""Whether an alarm is on, its sentence, what was compared with, and each prompt's change."""


class Watch:
    """Compares a run's evaluations with each other; a resumed run takes its state up."""

    def __init__(self) -> None:
        self._prompts = ""
        self._references: dict[str, Reference] = {}
        self._on: list[str] = []
        self._metric = ""
        self._margin: float | None = None
        self.falls = 0
        """Evaluations in a row that were below the best one, as the run's `StopRule` counts."""

    def judge(self, evaluation: Evaluation, config: AlarmsConfig) -> tuple[Metrics, list[Alarm]]:
        """Metrics `alarm/<name>`, 1 or 0, NaN where the evaluation cannot be judged; and the alarms that
        begin with it. Call it once for each evaluation, in order."""
        self._forget_other_prompts(evaluation)
        verdicts: dict[str, _Verdict | None] = {}
        if config.gold_falls is not None and {PROXY, GOLD_COLUMN} <= evaluation.columns.keys():
            verdicts["gold_falls"] = self._gold_falls(evaluation, config.gold_falls)
        if config.members_disagree is not None and VARIANCE_COLUMN in evaluation.columns:
            verdicts["members_disagree"] = self._drift(evaluation, VARIANCE_COLUMN, config.members_disagree)
        if config.length_drift is not None and LENGTH_COLUMN in evaluation.columns:
            drift = self._drift(evaluation, LENGTH_COLUMN, config.length_drift, both_ways=True)
            verdicts["length_drift"] = drift
        metrics = {
            f"alarm/{name}": math.nan if verdict is None else float(verdict[0])
            for name, verdict in verdicts.items()
        }
        begun: list[Alarm] = []
        for name, verdict in verdicts.items():
            if verdict is None:
                continue
            is_on, message, then, change = verdict
            if is_on and name not in self._on:
                begun.append(Alarm(evaluation.record.step, name, message, then.step, change))
            self._on = sorted({*self._on, name} if is_on else {*self._on} - {name})
        return metrics, begun

    def _gold_falls(self, evaluation: Evaluation, threshold: float) -> _Verdict | None:
        golds, proxies = evaluation.by_prompt(GOLD_COLUMN), evaluation.by_prompt(PROXY)
        assert golds is not None and proxies is not None, "judged where both are measured"
        if not _mostly_there(golds):
            return None
        now = Reference(evaluation.record.step, mean_of_finite(golds), {GOLD_COLUMN: golds, PROXY: proxies})
        best = self._references.setdefault("gold", now)
        gold = Change.between(best.means[GOLD_COLUMN], golds)
        proxy = Change.between(best.means[PROXY], proxies)
        if gold.mean > 0:
            self._references["gold"] = now
        message = (
            f"since step {best.step} gold has fallen by {-gold.mean:.4g} "
            f"({_in_errors(gold)} over {_count(gold.of_each)} prompts) while the reward has risen by "
            f"{proxy.mean:.4g}"
        )
        return gold.falls(threshold) and proxy.mean > 0, message, best, gold.of_each

    def _drift(
        self, evaluation: Evaluation, column: str, factor: float, *, both_ways: bool = False
    ) -> _Verdict | None:
        means = evaluation.by_prompt(column)
        value = mean_of_finite(evaluation.columns[column])
        assert means is not None, "judged where it is measured"
        if not _mostly_there(means):
            return None
        start = self._references.setdefault(column, Reference(evaluation.record.step, value, {column: means}))
        change = Change.between(start.means[column], means).of_each
        if start.value <= 0:  # no factor leads away from nothing
            return False, "", start, change
        ratio = value / start.value
        message = (
            f"{_WORDS[column]} is {value:.4g}, {ratio:.3g} times the {start.value:.4g} of step {start.step}"
        )
        return ratio > factor or (both_ways and ratio < 1 / factor), message, start, change

    def _forget_other_prompts(self, evaluation: Evaluation) -> None:
        """A resumed run may evaluate on other prompts than before: nothing can be paired then."""
        inputs = {sample.prompt: sample.input for sample in evaluation.record.samples}
        text = json.dumps([inputs[prompt] for prompt in sorted(inputs)], default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()
        if self._prompts not in ("", digest):
            self._references.clear()
            self._on, self.falls = [], 0
        self._prompts = digest

    def count_fall(self, step: int, scores: Metrics, evaluation: Evaluation | None, rule: StopRule) -> None:
        """Count an evaluation for `falls`. Call it once for each, after `judge`.

        It counts where the rule's metric is below the best evaluation so far, with a margin by more than that
        many standard errors of the paired change; else, an equal one too, the row is at its end. One in which
        the metric is not a number, or was not measured on half of the prompts, changes nothing.

        scores: all metrics of the evaluation.

        Raises:
            ConfigError: the metric is not evaluated, or has no standard error.
        """
        check_rule(rule, scores, evaluation)
        if self._metric != rule.metric:
            self._references.pop(_STOP, None)
            self._metric, self.falls = rule.metric, 0
        if self._margin != rule.standard_errors:
            self._margin, self.falls = rule.standard_errors, 0
        means = None if evaluation is None else evaluation.by_prompt(rule.metric.removeprefix("eval/"))
        value = scores[rule.metric]
        if not math.isfinite(value) or (means is not None and not _mostly_there(means)):
            return
        now = Reference(step, value, {} if means is None else {_STOP: means})
        best = self._references.setdefault(_STOP, now)
        if means is not None and _STOP in best.means:
            change = Change.between(best.means[_STOP], means)
        else:
            change = Change(value - best.value, 0.0, ())
        self.falls = self.falls + 1 if change.falls(rule.standard_errors) else 0
        if change.mean > 0:
            self._references[_STOP] = now

    def has_fallen(self, rule: StopRule) -> bool:
        """Whether a run stops by this rule; falls that another one has counted, before the run was resumed
        with this one, do not count."""
        is_counted = (self._metric, self._margin) == (rule.metric, rule.standard_errors)
        return is_counted and self.falls >= rule.count

    def reason(self, rule: StopRule) -> str:
        """Why the run stops, in words."""
        best = self._references[_STOP]
        return f"{rule.metric} was below that of step {best.step} for {self.falls} evaluations"

    def state_dict(self) -> dict[str, Any]:
        """JSON values, the same on all ranks."""
        references = {name: each.to_json() for name, each in self._references.items()}
        return {
            "prompts": self._prompts,
            "references": references,
            "on": list(self._on),
            "metric": self._metric,
            "margin": self._margin,
            "falls": self.falls,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._prompts, self._metric, self.falls = state["prompts"], state["metric"], state["falls"]
        self._margin = state.get("margin")
        self._references = {name: Reference.from_json(each) for name, each in state["references"].items()}
        self._on = list(state["on"])


def check_rule(rule: StopRule, scores: Metrics, evaluation: Evaluation | None) -> None:
    """Refuse a rule that this evaluation says nothing of.

    Raises:
        ConfigError: the metric is not among `scores`, or has no standard error over prompts.
    """
    if rule.metric not in scores:
        if rule.metric == GOLD_METRIC:
            raise ConfigError(NO_GOLD)
        names = ", ".join(sorted(scores))
        raise ConfigError(
            f"`train.stop_when` goes by {rule.metric}, which is no evaluation metric; there are: {names}"
        )
    column = rule.metric.removeprefix("eval/")
    if rule.standard_errors is not None and (evaluation is None or column not in evaluation.columns):
        raise ConfigError(
            f"`train.stop_when` counts standard errors over prompts, which {rule.metric} has none of: leave "
            "the margin out"
        )


NO_GOLD = (
    "`train.stop_when` goes by gold, and nothing gives it: set `evaluation.gold`, in Python `gold=`, or name "
    "another metric, `eval/reward falls for 3 evaluations`"
)


def comparable(scores: Metrics, metric: str) -> float:
    """The value by which an evaluation is compared with others: NaN for gold that most prompts lack."""
    failed = scores.get(f"eval/{GOLD}/failed_fraction", 0.0)
    return math.nan if metric == GOLD_METRIC and failed > 1 - _LEAST_SCORED else scores[metric]


def report(alarms: Sequence[Alarm], evaluation: Evaluation, tracker: Tracker) -> None:
    """Put alarms on record: a line of `alarms.jsonl`, a warning, and a table of samples each.

    Rank 0 alone.
    """
    for alarm in alarms:
        _log.warning("step %d: alarm %s: %s", alarm.step, alarm.name, alarm.message)
        line = {"step": alarm.step, "name": alarm.name, "message": alarm.message}
        with (tracker.run_dir / ALARMS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        then = _record_of(tracker.run_dir, alarm.then, evaluation.record.variant)
        rows = alarm_rows(alarm, then, evaluation.record)
        tracker.table(f"alarm_{alarm.name}", alarm.step, _TABLE, rows)


_TABLE = (
    *("prompt", "output_then", "output_now", "reward_then", "reward_now", "gold_then", "gold_now"),
    "change",
)


def alarm_rows(alarm: Alarm, then: EvaluationRecord | None, now: EvaluationRecord) -> list[list[Any]]:
    """Rows of an alarm's table: each prompt's first completion then and now, those first that changed most.

    then: None leaves its columns empty.
    """
    before, after = _first_of_each(then), _first_of_each(now)
    falls = alarm.name == "gold_falls"
    there = [prompt for prompt, change in enumerate(alarm.change) if math.isfinite(change)]
    order = sorted(there, key=lambda prompt: alarm.change[prompt] if falls else -abs(alarm.change[prompt]))
    return [
        [
            _shown(after[prompt].input),
            *(None if prompt not in each else each[prompt].output for each in (before, after)),
            *(_score(each, prompt, name) for name in (PROXY, GOLD) for each in (before, after)),
            alarm.change[prompt],
        ]
        for prompt in order
    ]


def cut_evaluations(run_dir: Path, last_step: int, *, evaluated: bool) -> None:
    """Delete what a run resumed after `last_step` writes again of its evaluations and alarms.

    evaluated: False also deletes what there is of that step's evaluation.
    """
    first = last_step + 1 if evaluated else last_step
    delete_records(run_dir, first)
    for table in (run_dir / "samples").glob("alarm_*_*.csv"):
        step = table.stem.rpartition("_")[2]
        if step.isdecimal() and int(step) >= first:
            table.unlink()
    path = run_dir / ALARMS_FILE
    if not path.exists():
        return
    kept: list[str] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] < first:
                kept.append(f"{line}\n")
        except (ValueError, KeyError, TypeError):  # a line that a kill cut short
            continue
    replace_text(path, "".join(kept))


def _record_of(run_dir: Path, step: int, variant: str) -> EvaluationRecord | None:
    path = record_path(run_dir, step, variant)
    try:
        return read_record(path) if path.exists() else None
    except DataError as error:
        _log.warning("%s", error)
        return None


def _first_of_each(record: EvaluationRecord | None) -> dict[int, EvaluatedSample]:
    """The first completion of each prompt."""
    first: dict[int, EvaluatedSample] = {}
    for sample in record.samples if record is not None else ():
        first.setdefault(sample.prompt, sample)
    return first


def _score(samples: Mapping[int, EvaluatedSample], prompt: int, name: str) -> float | None:
    return samples[prompt].scores.get(name) if prompt in samples else None


def _shown(prompt: str | list[Mapping[str, Any]]) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False, default=str)


def _mostly_there(means: Sequence[float]) -> bool:
    return _count(means) >= max(1, _LEAST_SCORED * len(means))


def _count(values: Sequence[float]) -> int:
    return sum(math.isfinite(value) for value in values)


def _in_errors(change: Change) -> str:
    if not change.standard_error > 0:
        return "by as much for every prompt,"
    return f"{-change.mean / change.standard_error:.3g} standard errors"


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
