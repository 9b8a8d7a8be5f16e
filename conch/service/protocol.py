"""The messages between a training service and its clients.

A group is the completions of one prompt, which are compared with each other. Each completion is a sample with
an id; it is leased to the client that asked, which rewards it within `lease_s` seconds or has it given back.

Names and defaults of `TrainingSettings` (but that of the learning rate) and of the fields `prompt`,
`completions`, `completion_tokens`, `rewards` and `model_version` are those of the first service of this kind,
whose clients work unchanged; all other fields may be left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

KEY_HEADER = "api-key"
"""Header with the key; `authorization: Bearer KEY` is read as well."""

KEY_VARIABLE = "CONCH_SERVICE_KEY"
"""Environment variable that clients and service take the key from."""

MODEL_VERSION_HEADER = "model-version"
"""Header of a downloaded model: the number of updates that it has seen."""

MOST_VERSIONS = 10**12
"""Largest number of a version that can be asked for."""

Text = Annotated[str, Field(max_length=4_000_000)]
Name = Annotated[str, Field(max_length=200)]
ModelVersion = tuple[str, int]
"""Id of the run, and number of updates that the model has seen."""

RunState = Literal["starting", "running", "stopping", "stopped", "finished", "failed"]


class Message(BaseModel):
    """Base of all that a client sends: unknown fields are refused, for none does nothing in silence."""

    # What is no number is sent as that, for the service to refuse it: as null it would say something else.
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, ser_json_inf_nan="constants"
    )


class Reply(BaseModel):
    """Base of all that a service answers: fields of later releases are passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)


def token_hash(token_ids: Sequence[int]) -> str:
    """Hash of the ids of a prompt and its completion: what says that a reward is for these very tokens."""
    return hashlib.sha256(",".join(map(str, token_ids)).encode()).hexdigest()[:32]


class TrainingSettings(Message):
    """What a run trains, how long, and what it expects of its clients."""

    model_id: str = Field(min_length=1, max_length=4096)
    """Model to start from: a folder on the service's machine, or a hub id."""

    max_completion_length: int = Field(default=6, ge=1)
    """Longest completion, in tokens."""

    num_completions_per_prompt: int = Field(default=3, ge=2, le=4096)
    """Completions of a prompt, which are compared with each other."""

    training_batch_size: int = Field(default=1, ge=1, le=65536)
    """Prompts in one micro-batch."""

    learning_rate: float = Field(default=1e-5, gt=0, allow_inf_nan=False)
    """Peak learning rate."""

    gradient_accumulation_steps: int = Field(default=1, ge=1, le=65536)
    """Micro-batches of an update: it learns from `training_batch_size` times as many prompts."""

    logging_steps: int = Field(default=1, ge=1)
    """Updates from one event with metrics to the next, at `/events`."""

    max_steps: int = Field(default=201, ge=1, le=MOST_VERSIONS)
    """Updates of the run, which ends with the last."""

    lease_s: float = Field(default=600.0, gt=0, le=7 * 86400)
    """Time for a completion's reward, in seconds; then the completion is given back, and its group learns
    without it. Time in which the service is down does not count."""

    max_staleness: int = Field(default=8, ge=0)
    """Updates, at most, between the weights that sampled a group and those that learn from it; an older group
    is dropped, and counted. Younger ones are weighed for their age."""

    max_groups: int | None = Field(default=None, ge=1)
    """Groups under way at once, those that wait to be sampled or learned from among them; further prompts are
    told to come again (429). None takes four updates' worth, at least 32."""

    save_every: int = Field(default=50, ge=1)
    """Updates from one checkpoint to the next. What happens between two is in a journal: nothing is lost."""

    seed: int = Field(default=0, ge=0, le=2**31)
    """Seeds sampling: a group's completions depend on it, on the group's number and on the weights."""

    overrides: dict[str, Any] = Field(default_factory=dict)
    """Further settings of the run, in the sections of Conch's configuration: `{"model": {"peft_config":
    {"r": 8}}, "grpo": {"kl": {"coef": 0.0}}, "generation": {"temperature": 0.8}}`."""

    @property
    def prompts_per_step(self) -> int:
        """Groups that one update learns from."""
        return self.training_batch_size * self.gradient_accumulation_steps

    @property
    def most_groups(self) -> int:
        """`max_groups`, or what stands for None."""
        return max(32, 4 * self.prompts_per_step) if self.max_groups is None else self.max_groups


class CompletionsRequest(Message):
    """Ask for completions of a prompt."""

    prompt: Text | list[dict[str, Any]] = Field(min_length=1)
    """A text, or messages that the model's chat template renders: `[{"role": "user", "content": "..."}]`."""

    request_id: Name | None = None
    """Chosen by the client, once for a request: asked again with the same one, the service gives the same
    completions."""

    client_id: Name = ""
    """Who asks: a sample is rewarded by the client that it was leased to."""

    group: Name | None = None
    """Name of a group that several clients share, with one prompt: the first request has the group sampled,
    each gets `num_completions` of it."""

    num_completions: int | None = Field(default=None, ge=1)
    """Completions that this request gets of its `group`; None takes the whole group."""

    wait_s: float | None = Field(default=None, ge=0, le=3600)
    """Longest wait for the completions, in seconds; then the answer is 503 with `retry-after`. None takes the
    service's own limit."""

    run_id: Name | None = None
    """Run that is asked; None takes the one that runs."""


class CompletionsResponse(Reply):
    """Completions of a prompt, leased to the client that asked; all lists in the same order."""

    prompt: str
    """The prompt, of messages its rendering."""

    completions: list[str]
    """Texts, without special tokens."""

    completion_tokens: list[list[int]]
    """Ids of prompt and completion together."""

    model_version: ModelVersion
    """Weights that sampled."""

    sample_ids: list[str] = Field(default_factory=list)
    """Ids of the samples."""

    token_hashes: list[str] = Field(default_factory=list)
    """`token_hash` of each of `completion_tokens`."""

    finish_reasons: list[str] = Field(default_factory=list)
    """Why each ended: `eos`, `stop` for a stop string, `length` cut by the limit."""

    lease_s: float = 0.0
    """Seconds that are left to reward these."""


class RewardsRequest(Message):
    """Reward samples of one group. The same request twice is learned from once, and gets the same answer."""

    rewards: list[float | None]
    """One number for each sample; null where the client has none: the group learns without it."""

    sample_ids: list[Name] | None = None
    """Ids of the samples. Without them `completion_tokens` are those of a whole reply of `/completions`."""

    token_hashes: list[Name] | None = None
    """Hashes as they came with the completions; these or `completion_tokens` say which tokens were read."""

    completion_tokens: list[list[int]] | None = None
    """Ids as they came with the completions."""

    prompt: Text | list[dict[str, Any]] = ""
    """Not read: the service knows the prompt."""

    completions: list[Text] = Field(default_factory=list)
    """Not read: the service knows the texts."""

    client_id: Name = ""
    """Who rewards: the client that the samples were leased to."""

    wait_s: float = Field(default=0.0, ge=0, le=3600)
    """How long the answer waits for the update that learns from these samples, in seconds."""

    run_id: Name | None = None
    """Run of the samples; None takes the one that runs."""

    @classmethod
    def from_completions(
        cls, completions: CompletionsResponse, rewards: Sequence[float | None], client_id: str = ""
    ) -> RewardsRequest:
        """Rewards of all completions of a reply, in its order.

        A service of the first kind gives no sample ids; its completions are named by their tokens.
        """
        if not completions.sample_ids:
            return cls(
                prompt=completions.prompt,
                completions=completions.completions,
                completion_tokens=completions.completion_tokens,
                rewards=[*rewards],
            )
        return cls(
            rewards=[*rewards],
            sample_ids=completions.sample_ids,
            token_hashes=completions.token_hashes,
            client_id=client_id,
            run_id=completions.model_version[0],
        )


class RewardsResponse(Reply):
    """What becomes of rewarded samples."""

    model_version: ModelVersion
    """The first model that has learned from the group, where that is settled; else the present one."""

    outcome: Literal["waiting", "whole", "dropped"] = "waiting"
    """`waiting`: the group lacks rewards of others. `whole`: it is learned from, in the update that makes
    `model_version`. `dropped`: it is not, see `detail`."""

    detail: str = ""
    """Why a group is dropped."""


class Refusal(Reply):
    """One request of a batch that was refused."""

    status: int
    """As HTTP has it."""

    detail: str
    """Why, in a sentence."""


class CompletionsBatch(Message):
    """Ask for completions of several prompts, which are sampled together."""

    requests: list[CompletionsRequest] = Field(min_length=1, max_length=4096)
    """One for each prompt."""


class CompletionsBatchResponse(Reply):
    """What each request of a batch got, in its order."""

    replies: list[CompletionsResponse | Refusal]
    """Completions, or why there are none."""


class RewardsBatch(Message):
    """Reward several groups."""

    requests: list[RewardsRequest] = Field(min_length=1, max_length=4096)
    """One for each group, or part of a group."""


class RewardsBatchResponse(Reply):
    """What each request of a batch got, in its order."""

    replies: list[RewardsResponse | Refusal]
    """What becomes of it, or why it was refused."""


class ResumeRequest(Message):
    """Go on with a run that was stopped, that failed, or that is to make more updates than it has."""

    run_id: Name
    """Its id."""

    settings: TrainingSettings | None = None
    """From now on; None takes those that it had. Only `max_steps` (more), `lease_s`, `max_staleness`,
    `max_groups`, `save_every` and `logging_steps` may differ from these."""


class ModelRequest(Message):
    """Ask for the model."""

    version: int | None = Field(default=None, ge=0, le=MOST_VERSIONS)
    """Number of updates that it has seen: one that was downloaded before. None takes the present one."""

    run_id: Name | None = None
    """Its run; None takes the latest."""


class RunReply(Reply):
    """A run after `/start` or `/stop`."""

    status: str
    """`started`, `starting` where the model still loads, or `stopped`."""

    run_id: str
    """Id of the run."""

    model_version: ModelVersion
    """The model as it is now."""


class StatusResponse(Reply):
    """State of a run, and counts since it began."""

    training_settings: TrainingSettings | None = None
    """Of the run; null before the first."""

    completion_requests_served: int = 0
    """Prompts whose completions were handed out."""

    reward_requests_served: int = 0
    """Posts of rewards that were accepted, repeated ones not counted."""

    run_id: str = ""
    """Id of the run."""

    state: RunState | Literal["none"] = "none"
    """`none` before the first run."""

    error: str = ""
    """Why a run failed."""

    model_version: ModelVersion = ("", 0)
    """The model as it is now."""

    counts: dict[str, int] = Field(default_factory=dict)
    """Of groups and samples, by what became of them."""

    metrics: dict[str, float | None] = Field(default_factory=dict)
    """Of the latest update; docs/metrics.md explains the names."""


class RunsResponse(Reply):
    """All runs below the service's folder, the newest first."""

    runs: list[StatusResponse]
    """Without their metrics."""
