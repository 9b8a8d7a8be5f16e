"""Settings of rewards: their source, its client, access to its servers, and the response to failures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from conch.config.auth import AuthConfig
from conch.config.base import Section
from conch.config.judge import JudgeConfig
from conch.config.steering import GoalServerConfig, SteeringConfig
from conch.config.verifiers import GSM8KConfig, IFEvalConfig, VerifierName

FailurePolicy = Literal["raise", "drop", "wait"]
OnModelChange = Literal["raise", "warn", "accept"]

# Of an ensemble, combined by the trainer or by a server.
EnsembleObjective = Literal["mean", "wco", "uwo"]
OnMemberFailure = Literal["fail", "renormalise"]
EnsembleVariance = Literal["population", "sample"]
"""What the sum of squared deviations from the mean of k scores is divided by: k, or k - 1 (for one score the
variance is 0 by either name)."""


class RewardClientConfig(Section):
    """Requests to a served reward model: time limits, sizes, and how many at once."""

    connect_timeout_s: float = Field(default=5.0, gt=0)
    """Longest wait for a connection to a server, in seconds."""

    request_timeout_s: float = Field(default=10.0, gt=0)
    """Time limit of one request, in seconds; long requests get `timeout_per_1k_tokens_s` more."""

    timeout_per_1k_tokens_s: float = Field(default=2.0, ge=0)
    """Added to `request_timeout_s` and `deadline_s` for every 1,000 tokens in the request and in those that
    the server works on before it, in seconds, so that long samples are not the ones that get lost. Raise it
    for a slow server; 4 bytes of text count as a token."""

    deadline_s: float = Field(default=60.0, gt=0)
    """Time limit of one request with all its retries, in seconds; long requests get
    `timeout_per_1k_tokens_s` more."""

    max_in_flight: int = Field(default=4, ge=1)
    """Requests that a process keeps under way at once, per server."""

    batch_rows: int = Field(default=64, ge=1)
    """Most samples in a request; lowered to the server's own limit."""

    batch_tokens: int = Field(default=8192, ge=1)
    """Most tokens in a request, padding included; a longer sample goes alone. 4 bytes of text count as a
    token."""

    max_request_mb: float = Field(default=64.0, gt=0)
    """Largest request, in millions of bytes: more is sent in several, and a larger sample is not scored."""

    cache_size: int = Field(default=10_000, ge=0)
    """Latest scores that are kept, so that equal samples need no request."""


class RewardAuthConfig(AuthConfig):
    """Access to the servers of a reward model: certificates, secrets and headers."""

    headers_env: dict[str, str] = Field(default_factory=dict)
    """Header -> environment variable that holds its value, sent with every request to a served model; values
    are not logged. For proxies that ask for a token: `authorization: MY_TOKEN`."""


class RewardFailureConfig(Section):
    """Response of the run to rewards that do not come, or come from another model."""

    policy: FailurePolicy = "raise"
    """`raise`: every process leaves with the reason. `drop`: failed samples leave the loss, within
    `max_fraction`. `wait`: keep asking a server that is away, for at most `wait_budget_s`."""

    max_fraction: float = Field(default=0.1, ge=0, le=1)
    """With `drop`: largest share of a step's samples that may fail; more stops the run."""

    wait_budget_s: float = Field(default=3600.0, gt=0)
    """With `wait`: longest outage to sit out, in seconds."""

    checkpoint_after_s: float = Field(default=300.0, ge=0)
    """With `wait`: seconds of an outage after which a checkpoint is saved, from which the interrupted step
    (or evaluation) can be done again. One is saved as well when the budget is spent."""

    on_model_change: OnModelChange = "raise"
    """When a server turns out to serve another version or content than at the start: `raise` stops the run,
    `warn` says so and goes on, `accept` goes on."""


class GoalsConfig(Section):
    """How the figures of a reward `goals:...` are given."""

    normalize: bool = True
    """Scores between 0 and 1, by the range of each goal. False gives grades, shares and words as they are."""

    normalization: Path | None = None
    """File with each goal's range, `goal: {min: ..., max: ...}`. None takes the steerability benchmark's,
    which has the four goals of `conch.rewards.goals`."""


JUDGE = "judge:"
"""Before the name of a judge's YAML file, where an address could stand too."""
VERIFIER = "verifier:"
"""Before a verifier's name."""
GOALS = "goals:"
"""Before the names of goals."""


def is_function_name(text: str) -> bool:
    """Whether it is `file.py:name` or `module:name`, where it may be an address as well."""
    if text.startswith((GOALS, JUDGE, VERIFIER)):
        return False
    # What stands behind the colon of an address is a port, with a model's name behind that.
    return text.rpartition(":")[0].endswith(".py") or bool(re.fullmatch(r"[\w.]+:[A-Za-z_]\w*", text))


def source_in_short(word: str) -> dict[str, Any]:
    """The keys of a section `reward` that `host:port/model`, `http://host:port/path`, `verifier:gsm8k`,
    `judge:FILE.yaml`, `file.py:name` or `module:name` stands for."""
    if word.startswith(JUDGE):
        return {"judge": {"file": word.removeprefix(JUDGE)}}
    if word.startswith(VERIFIER):
        return {"verifier": word.removeprefix(VERIFIER)}
    return {"function" if is_function_name(word) else "url": word}


HttpDialect = Literal["query", "messages", "goals"]
"""What is sent to an HTTP endpoint, and what it replies."""


class RewardConfig(Section):
    """Source of the rewards, requests to it, and the response to its failures."""

    url: str | None = None
    """`host:port/model` of a served reward model, or `host1:port,host2:port/model` for several servers of the
    same model; `http://host:port/path` of an endpoint that speaks JSON. Where rewards are learned from, None
    takes the TRITON_HOST environment variable; SFT and ILQL, which only measure with them, do not. Unused
    when a Python function is passed."""

    function: str | None = None
    """A Python function instead of a served model, as `file.py:name` or `module:name`; docs/rewards.md says
    how it is called. Its file is run."""

    verifier: VerifierName | None = None
    """A check instead of a served model: `gsm8k` compares the answer with the row's, `ifeval` looks whether
    the row's instructions are followed. As one of several `members`, write `verifier:gsm8k`."""

    gsm8k: GSM8KConfig = Field(default_factory=GSM8KConfig)
    """How GSM8K's answers are checked."""

    ifeval: IFEvalConfig = Field(default_factory=IFEvalConfig)
    """How IFEval's instructions are checked."""

    goals: GoalsConfig = Field(default_factory=GoalsConfig)
    """How the goals of a reward `goals:reading_difficulty,text_length` are given."""

    dialect: HttpDialect = "query"
    """Of an HTTP endpoint: `query` sends {"query": [sample, ...]} and reads {"rewards": [number, ...]};
    `messages` sends "dialogues" as well, each {"messages": [...]}, or null for a prompt that is a text;
    `goals` sends {"texts": [...]} or [text, ...] and reads {goal: [number or null, ...]}, as `goal_server`
    says."""

    goal_server: GoalServerConfig = Field(default_factory=GoalServerConfig)
    """What is asked of an endpoint with `dialect=goals`."""

    steering: SteeringConfig = Field(default_factory=SteeringConfig)
    """Rewards for reaching the targets of a row in several goals."""

    members: dict[str, str] = Field(default_factory=dict)
    """Several rewards instead of one `url`: name -> what `url` may be. `combine` makes one of them."""

    combine: Literal["sum", EnsembleObjective] = "sum"
    """Of several named rewards: `sum` them with `weights`, or take them for an ensemble whose reward is the
    `mean` of their scores, the least (`wco`), or the mean less `uwo_weight` times the variance (`uwo`)."""

    uwo_weight: float = Field(default=0.1, ge=0)
    """With `combine=uwo`: cost of a variance of 1."""

    variance: EnsembleVariance = "population"
    """With `combine=uwo`: the variance of k scores, divided by k (`population`, as in the paper) or by k - 1
    (`sample`, as in its authors' code for PPO). One score has none, that is 0."""

    on_member_failure: OnMemberFailure = "fail"
    """A sample that a member of an ensemble does not score: `fail` gives it the member's failure,
    `renormalise` the objective over the others, counted as `reward/degraded_fraction`."""

    weights: dict[str, float] = Field(default_factory=dict)
    """Objective -> weight in the sum, for rewards with several objectives; unnamed objectives weigh 1. The
    name of a member stands for all its objectives that are not named."""

    score_range: tuple[float, float] | None = None
    """Lowest and highest score that a served model can give; another is no score. None takes any finite
    one."""

    dense: bool = False
    """Take the scores of steps or tokens from a served model that gives them (converted with --granularity):
    each goes to the token of the response in which its step ends. False takes the one score of a sample."""

    delta: bool = False
    """The reward of a sample is its score less that of a reference answer to the same prompt: each prompt is
    a dict with an `original_output`, whose score is asked for once."""

    record: bool = False
    """Write a line for every score to `rewards.jsonl` in the run folder: step, sample hash, model, version,
    status, latency, values; no texts."""

    replay: Path | None = None
    """A run's folder, or its `rewards.jsonl`: take the rewards that it recorded instead of asking anybody."""

    client: RewardClientConfig = Field(default_factory=RewardClientConfig)
    """Requests to a served model."""

    auth: RewardAuthConfig = Field(default_factory=RewardAuthConfig)
    """Access to its servers."""

    failure: RewardFailureConfig = Field(default_factory=RewardFailureConfig)
    """Response to missing rewards."""

    judge: JudgeConfig = Field(default_factory=JudgeConfig)
    """A language model that is asked for its opinion, instead of a served reward model; docs/judges.md. As
    one of several `members`, write `judge:FILE.yaml`."""

    @property
    def named_by(self) -> tuple[str, ...]:
        """Keys of this section that name what gives the rewards: one at most, and none where TRITON_HOST may.

        `replay` is none of them: it stands in for whatever is named.
        """
        sources = {
            "url": self.url,
            "function": self.function,
            "verifier": self.verifier,
            "members": self.members,
            "judge": self.judge.is_set,
        }
        return tuple(key for key, source in sources.items() if source)

    @model_validator(mode="after")
    def _dense_fits(self) -> RewardConfig:
        if self.dense and self.delta:
            raise ValueError("`delta` is a difference of two scores, `dense` gives more: set one of them")
        if self.dense and self.score_range and not self.score_range[0] <= 0 <= self.score_range[1]:
            raise ValueError("`score_range` must hold 0 with `dense`: tokens that end no step get it")
        return self

    @model_validator(mode="after")
    def _one_source(self) -> RewardConfig:
        if self.url is not None and self.members:
            raise ValueError("give `url` for one reward or `members` for several, not both")
        if self.function is not None and (self.url is not None or self.members):
            raise ValueError("give `function` or `url` or `members`, one of them")
        if self.verifier is not None and (self.url or self.members or self.function):
            raise ValueError(
                f"`verifier` = {self.verifier} stands beside `url`, `members` or `function`: give one of "
                f"them, or name both rewards in `members`, as in `members={{model: host:8001/name, "
                f"{self.verifier}: verifier:{self.verifier}}}`"
            )
        if self.judge.is_set and (self.members or self.function or self.verifier or self.url):
            raise ValueError(
                "`judge` stands beside `url`, `members`, `function` or `verifier`: give one of them, or name "
                "all in `members`, as in `members={model: host:8001/name, judge: judge:FILE.yaml}`"
            )
        alone = (
            None if self.judge.is_set else next(filter(self.judge.differs, JudgeConfig.model_fields), None)
        )
        if alone is not None:
            raise ValueError(
                f"`judge.{alone}` is of a judge that this section names, by `judge.file`, or by `judge.url` "
                "and `judge.model`, and it names none: write it into the file of a `judge:FILE.yaml`"
            )
        return self

    @model_validator(mode="after")
    def _goal_server_is_asked(self) -> RewardConfig:
        if self.dialect == "goals":
            return self
        default = GoalServerConfig()
        names = GoalServerConfig.model_fields
        idle = next(
            (name for name in names if getattr(self.goal_server, name) != getattr(default, name)), None
        )
        if idle is not None:
            raise ValueError(
                f"`goal_server.{idle}` acts with `dialect` = goals only, not with {self.dialect}"
            )
        return self

    @model_validator(mode="after")
    def _steering_fits(self) -> RewardConfig:
        if not self.steering.is_on:
            return self
        for name, is_set in (
            ("dense", self.dense),
            ("delta", self.delta),
            ("combine", self.combine != "sum"),
        ):
            if is_set:
                raise ValueError(f"`steering` makes rewards of goals that are measured: leave `{name}` out")
        if unknown := sorted(set(self.weights) - set(self.steering.rewards)):
            raise ValueError(
                f"`weights` names `{unknown[0]}`, which is not in `steering.rewards`: "
                f"{', '.join(self.steering.rewards)}"
            )
        return self

    @model_validator(mode="after")
    def _range_in_order(self) -> RewardConfig:
        if self.score_range is not None and not self.score_range[0] < self.score_range[1]:
            raise ValueError(f"`score_range` is (lowest, highest), not {self.score_range}")
        return self
