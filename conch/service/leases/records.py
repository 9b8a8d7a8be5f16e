"""What a ledger holds of groups and samples, and these as JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from conch.types import Completion, Prompt, Rollout

Outcome = Literal["waiting", "whole", "dropped"]
SampleStatus = Literal["open", "rewarded", "failed", "lapsed"]


@dataclass(frozen=True, slots=True)
class LedgerSettings:
    """What a ledger goes by.

    group_size: samples of a group.
    groups_per_step: P, groups that one update learns from.
    total_steps: updates of the run.
    lease_s: time for a reward, in seconds.
    max_staleness: updates, at most, between the weights that sampled a group and those that learn from it.
    max_groups: that are under way at once.
    """

    group_size: int
    groups_per_step: int
    total_steps: int
    lease_s: float
    max_staleness: int
    max_groups: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What a post of rewards is told.

    version: of the model: the first that has learned from the group, where `outcome` is `whole`; else the
        one at the time of the post.
    detail: why a group is dropped.
    """

    outcome: Outcome
    version: int
    detail: str = ""


@dataclass(slots=True)
class Sample:
    """One completion.

    hash: of the ids of prompt and completion.
    client: who has it; None before anybody does.
    lease_until: when it lapses.
    answer: to the post that settled it.
    """

    completion: Completion
    hash: str
    client: str | None
    lease_until: float
    status: SampleStatus = "open"
    reward: float | None = None
    answer: Answer | None = None


@dataclass(slots=True)
class Group:
    """The completions of one prompt.

    version: of the weights that sampled.
    key: name that clients share it by; "" for none.
    place: in the order of learning, once it is whole.
    requests: that its samples were handed out by.
    """

    number: int
    prompt: Prompt
    version: int
    key: str
    samples: list[Sample]
    place: int | None = None
    requests: list[str] = field(default_factory=list)

    @property
    def rollouts(self) -> list[Rollout]:
        """The samples as a trainer takes them."""
        return [Rollout(self.prompt, sample.completion, self.version) for sample in self.samples]


@dataclass(frozen=True, slots=True)
class EndedGroup:
    """What is remembered of a group that was learned from or dropped.

    samples: without their completions.
    reason: why it was dropped; "" for one that was learned from.
    """

    samples: tuple[Sample, ...]
    reason: str
    requests: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Handout:
    """Samples of a group that a request got. places: within the group."""

    group: Group
    places: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks for completions.

    client: "" for one that gives no name.
    request: "" for one that is not repeated.
    digest: of what is asked for.
    count: samples.
    """

    client: str
    request: str
    digest: str
    count: int


@dataclass(frozen=True, slots=True)
class Post:
    """Rewards of samples of one group.

    samples: number of the group and place in it; None where only the hashes name them.
    hashes: of the tokens that were rewarded.
    """

    client: str
    samples: tuple[tuple[int, int], ...] | None
    hashes: tuple[str, ...]
    rewards: tuple[float | None, ...]


def lease_state(asker: Asker, places: Sequence[int]) -> dict[str, Any]:
    """What a ledger notes of samples that it hands out, as JSON values."""
    who = {"client": asker.client, "request": asker.request, "digest": asker.digest}
    return {"places": [*places], **who}


def completion_state(completion: Completion) -> list[Any]:
    """A completion as JSON values."""
    return [
        completion.text,
        [*completion.token_ids],
        [*completion.logprobs],
        completion.finish_reason,
    ]


def completion_of(values: Sequence[Any]) -> Completion:
    """What `completion_state` gave."""
    text, ids, logprobs, reason = values
    return Completion(text, tuple(ids), tuple(logprobs), reason)


def sample_state(sample: Sample) -> list[Any]:
    """A sample as JSON values."""
    answer = sample.answer
    return [
        completion_state(sample.completion),
        *(sample.hash, sample.client, sample.lease_until, sample.status, sample.reward),
        None if answer is None else [answer.outcome, answer.version, answer.detail],
    ]


def sample_of(values: Sequence[Any]) -> Sample:
    """What `sample_state` gave."""
    completion, digest, client, until, status, reward, answer = values
    answered = None if answer is None else Answer(*answer)
    return Sample(completion_of(completion), digest, client, until, status, reward, answered)


def group_state(group: Group) -> dict[str, Any]:
    """A group as JSON values."""
    return {
        "number": group.number,
        "text": group.prompt.text,
        "prompt_ids": [*group.prompt.token_ids],
        "version": group.version,
        "key": group.key,
        "place": group.place,
        "requests": [*group.requests],
        "samples": [sample_state(sample) for sample in group.samples],
    }


def group_of(values: Mapping[str, Any]) -> Group:
    """What `group_state` gave."""
    prompt = Prompt(values["text"], tuple(values["prompt_ids"]))
    samples = [sample_of(each) for each in values["samples"]]
    rest = (values["version"], values["key"], samples, values["place"], [*values["requests"]])
    return Group(values["number"], prompt, *rest)
