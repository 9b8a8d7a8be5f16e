"""Settings of evaluations: what watches them, what is kept of them, the alarms, and when they stop a run."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pydantic import Field

from conch.config.base import Section
from conch.config.reward import HttpDialect, RewardAuthConfig, RewardClientConfig
from conch.config.verifiers import GSM8KConfig, IFEvalConfig, VerifierName

GOLD_METRIC = "eval/gold/reward"

_GRAMMAR = "<gold|eval/metric> falls for <k> evaluations[ by more than <s> standard errors]"
_RULE = re.compile(
    r"(?P<metric>gold|eval/\S+) falls for (?P<count>\d+) evaluations?"
    r"( by more than (?P<errors>\d+(\.\d+)?) standard errors?)?"
)


@dataclass(frozen=True, slots=True)
class StopRule:
    """When a run stops: once so many evaluations in a row were each below the best one so far.

    metric: name of the evaluation metric.
    count: evaluations in a row.
    standard_errors: by more than so many standard errors each; None counts any fall.
    """

    metric: str
    count: int
    standard_errors: float | None = None


def parse_stop_rule(text: str) -> StopRule:
    """Read `gold falls for 3 evaluations by more than 2 standard errors`; `gold` is `eval/gold/reward`.

    Raises:
        ValueError: `text` is something else; says what is asked for.
    """
    match = _RULE.fullmatch(" ".join(text.split()))
    if match is None or int(match["count"]) < 1:
        raise ValueError(f"write `{_GRAMMAR}`, for example `gold falls for 3 evaluations`")
    metric = GOLD_METRIC if match["metric"] == "gold" else match["metric"]
    if metric.endswith("loss"):
        raise ValueError(f"`{metric}` is the better the lower it is: stop by it with `train.early_stopping`")
    return StopRule(metric, int(match["count"]), float(match["errors"]) if match["errors"] else None)


class AlarmsConfig(Section):
    """Thresholds of the signs that a policy exploits its reward model. An alarm is a fact on record; it stops
    nothing."""

    gold_falls: float | None = Field(default=3.0, ge=0)
    """Standard errors by which gold must have fallen since its best evaluation, while the reward rose: what
    Gao et al. 2022 (arXiv:2210.10760) call overoptimisation. The standard error is that of the paired
    difference over prompts. The best of many evaluations is so by luck in part: of runs with 20 evaluations
    of a policy that stands still, 61 % reach 2 standard errors, 11 % reach 3 and 1 % reach 4 where gold and
    reward have nothing in common; at a correlation of 0.5, 17 % reach 2 and 1 % reach 3. None gives no
    alarm."""

    members_disagree: float | None = Field(default=4.0, gt=1)
    """Factor by which the variance of an ensemble's members must have grown since the start; 4 is twice the
    standard deviation. Members part where none of them has learned from data (Coste et al. 2023,
    arXiv:2310.02743). None gives no alarm."""

    length_drift: float | None = Field(default=2.0, gt=1)
    """Factor by which the mean length of completions must have grown or shrunk since the start: length is
    what reward models are most often exploited by (Singhal et al. 2023, arXiv:2310.03716). None gives no
    alarm."""


class EvaluationConfig(Section):
    """What watches a run in its evaluations and is never learned from, and what is kept of them."""

    gold: str | None = None
    """A reward that watches: scores the evaluation's completions beside the reward that is learned from, as
    `eval/gold/reward`, and decides which checkpoint is best. `host:port/model` (or several servers of it),
    `http://host:port/path`, `verifier:gsm8k`, `judge:FILE.yaml`, or a Python function as `file.py:name`.
    While it is away, the run goes on."""

    gold_dialect: HttpDialect = "query"
    """As `reward.dialect`, for a `gold` that is an HTTP endpoint."""

    gold_client: RewardClientConfig = Field(default_factory=RewardClientConfig)
    """Requests to a served `gold`."""

    gold_auth: RewardAuthConfig = Field(default_factory=RewardAuthConfig)
    """Access to its servers."""

    verifier: VerifierName | None = None
    """Check the evaluation's completions as `reward.verifier` would, beside the reward that is learned from;
    its figures are `eval/<verifier>/<quantity>`."""

    gsm8k: GSM8KConfig = Field(default_factory=GSM8KConfig)
    """How GSM8K's answers are checked here."""

    ifeval: IFEvalConfig = Field(default_factory=IFEvalConfig)
    """How IFEval's instructions are checked here."""

    keep: bool = True
    """Keep every completion of an evaluation with its scores in `evaluations/step_N.jsonl` of the run's
    folder, where further scores can be added and figures be made of them. Without, the tables of alarms lack
    what was written before."""

    alarms: AlarmsConfig = Field(default_factory=AlarmsConfig)
    """Signs that a policy exploits its reward model."""
