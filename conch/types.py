"""The nouns that every stage shares. No torch here: a reward client must start fast and run anywhere.

Example of what flows through one step:

    Prompt(text="k", token_ids=(11,))
    Completion(text="ba", token_ids=(2, 1, 22), logprobs=(-0.9, -0.1, -0.01), finish_reason="eos")
    Rollout(prompt, completion, policy_version=7)      .sample == "kba"
    RewardResult(RewardStatus.OK, scores={"reward": 0.62}, model="walks", version="3", latency_s=0.004)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Literal, Protocol, runtime_checkable

FinishReason = Literal["eos", "stop", "length"]
Metrics = dict[str, float]
"""Name `stage/quantity` -> value; every name is explained in docs/metrics.md."""

DEFAULT_OBJECTIVE = "reward"

ASSISTANT = "assistant"
"""The role of what a model writes."""


@dataclass(frozen=True, slots=True)
class Dialogue:
    """What a chat template renders.

    messages: each with "role" and what the template reads of it ("content", "tool_calls", ...); without keys
        whose value is None.
    tools: JSON schemas of the functions that the assistant may call; None where there are none.
    template_kwargs: further variables of the template.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Any, ...] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def answered(self, text: str) -> Dialogue:
        """This dialogue with the assistant's next message; where the assistant spoke last, it goes on."""
        last = self.messages[-1] if self.messages else {}
        if not text and last.get("role") == ASSISTANT:  # a call of a tool, say, that has no content to go on
            return self
        if last.get("role") != ASSISTANT:
            return replace(self, messages=(*self.messages, {"role": ASSISTANT, "content": text}))
        begun = last.get("content")
        whole = [*begun, {"type": "text", "text": text}] if isinstance(begun, list) else (begun or "") + text
        return replace(self, messages=(*self.messages[:-1], {**last, "content": whole}))

    def begun(self, opening: Any = "") -> tuple[Dialogue, str]:
        """This dialogue up to the text of its last message, the assistant's, and that text: `answered` puts
        them together again.

        What else the message has (thoughts, annotations) is no part of the text, and stays. Without a text of
        the assistant's, the dialogue stays as it is, and the text is "".

        opening: of the content, what is not part of the text either.

        Raises:
            ValueError: the content is no text, in words that follow the message's name.
        """
        *before, last = self.messages
        content = last.get("content")
        text = content_text(content) if last.get("role") == ASSISTANT else ""
        text = text[len(content_text(opening)) :]
        if not text:
            return self, ""
        is_plain = not opening and isinstance(content, str) and set(last) == {"role", "content"}
        if is_plain and before and before[-1].get("role") != ASSISTANT:
            return replace(self, messages=tuple(before)), text
        opened = opening or ([] if isinstance(content, list) else "")
        return replace(self, messages=(*before, {**last, "content": opened})), text


def text_parts(content: Any) -> list[str]:
    """Return the texts of a message's content, of which there is one, none, or one in each of some parts."""
    if isinstance(content, list):
        return [part["text"] for part in content if _is_text(part)]
    return [content] if isinstance(content, str) else []


def content_text(content: Any) -> str:
    """Return a message's content as one text: itself, or parts {"type": "text", "text": ...} one behind the
    other; "" for None.

    Raises:
        ValueError: it is something else, or a part is no text; in words that follow a message's name.
    """
    if isinstance(content, list):
        other = next((part for part in content if not _is_text(part)), None)
        if other is not None:
            kind = other.get("type") if isinstance(other, Mapping) else type(other).__name__
            raise ValueError(f"has a part of type {kind}, and only texts can be scored")
    elif not isinstance(content, str | None):
        raise ValueError(f'has a "content" of type {type(content).__name__}: give a text, or parts of text')
    return "".join(text_parts(content))


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, tokenised once.

    text: what the ids say; of a dialogue, its rendering by the policy's chat template.
    token_ids: without padding, as the sampler gets them.
    metadata: the extra keys of a prompt given as a dict; reach a reward function as keyword arguments.
    dialogue: what `text` renders; None for a prompt that was given as text, or cut to fit.
    """

    text: str
    token_ids: tuple[int, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    dialogue: Dialogue | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """What the sampler produced for one prompt. These ids are trained on; they are never made again from
    `text`.

    token_ids: sampled ids, the end-of-sequence token included where one was sampled.
    logprobs: log-probability of each id under the distribution it was drawn from (temperature, top-k and
        top-p applied), same length as `token_ids`.
    text: the ids decoded without special tokens.
    finish_reason: `eos` the model ended, `stop` a stop string was met (and cut off), `length` cut by the
        limit.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class Rollout:
    """A prompt, its completion, and the number of updates the policy had seen when it sampled it.

    policy_version: where weights changed while it was sampled, the one of its first token.
    version_runs: of a completion that went on under newer weights: versions in order, each with the number of
        tokens in a row that it sampled; empty where all tokens are of `policy_version`.
    """

    prompt: Prompt
    completion: Completion
    policy_version: int
    version_runs: tuple[tuple[int, int], ...] = ()

    @property
    def versions(self) -> tuple[tuple[int, int], ...]:
        """Versions of the weights in order, each with the number of tokens in a row that it sampled."""
        return self.version_runs or ((self.policy_version, len(self.completion.token_ids)),)

    @property
    def sample(self) -> str:
        """Prompt and output as one string: what a reward model of texts reads."""
        return self.prompt.text + self.completion.text

    @property
    def dialogue(self) -> Dialogue | None:
        """Prompt and output as messages: what a reward model with a chat template reads; None for a text."""
        return None if self.prompt.dialogue is None else self.prompt.dialogue.answered(self.completion.text)


class RewardStatus(str, Enum):
    """What became of one request for a reward. Only `OK` carries scores."""

    OK = "ok"
    TIMEOUT = "timeout"
    INVALID = "invalid"
    UNAVAILABLE = "unavailable"
    SKIPPED = "skipped"

    @property
    def is_infrastructure(self) -> bool:
        """True where asking again later can succeed (the server's fault), False for bad data or success."""
        return self in (RewardStatus.TIMEOUT, RewardStatus.UNAVAILABLE)


@dataclass(frozen=True, slots=True)
class RewardResult:
    """The reward of one rollout, or why there is none. A failure is a status, never a score of 0.0.

    scores: objective -> scalar score; a single objective is named "reward". Empty unless status is OK.
    token_scores: dense rewards, one per response token, instead of `scores`; None for scalar rewards.
    model, version: what scored it ("" where that has no meaning, e.g. a Python function's version).
    latency_s: seconds from the request to the reply.
    absent: objectives that do not apply to the sample, by a None, and add nothing to its reward; of a failure
        all that the source has, where none applies.
    detail: for a failure, what happened, in words for a person; for a score of an ensemble that not all
        members gave, how many did.
    members: for an ensemble's score, each member's own; None where it gave none.
    facts: further figures by name, which are measured and no part of the reward.
    """

    status: RewardStatus
    scores: Mapping[str, float] = field(default_factory=dict)
    token_scores: tuple[float, ...] | None = None
    model: str = ""
    version: str = ""
    latency_s: float = 0.0
    detail: str = ""
    members: Mapping[str, float | None] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    facts: Mapping[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """True where there is a score."""
        return self.status is RewardStatus.OK


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """Completions of one prompt, sampled together, with their rewards: one per rollout, in order."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    rewards: tuple[RewardResult, ...]

    @classmethod
    def split(
        cls, rollouts: Sequence[Rollout], rewards: Sequence[RewardResult], size: int
    ) -> list[RolloutGroup]:
        """Cut rollouts into groups of `size`; those of a prompt stand together."""
        cuts = [slice(first, first + size) for first in range(0, len(rollouts), size)]
        return [cls(rollouts[cut.start].prompt, tuple(rollouts[cut]), tuple(rewards[cut])) for cut in cuts]


OnFinished = Callable[[Mapping[int, Rollout]], None]
"""Told of completions as they end: their prompts' places -> rollouts. Must return at once."""


@runtime_checkable
class RolloutEngine(Protocol):
    """Something that samples completions from the current policy."""

    def generate(
        self, prompts: Sequence[Prompt], *, greedy: bool = False, on_finished: OnFinished | None = None
    ) -> Iterator[list[Rollout]]:
        """Yield rollouts chunk by chunk, in the order of `prompts`.

        on_finished: gets each rollout of a chunk as soon as it has ended, before the chunk is whole, so that
            scoring can start early. Called from within the iteration, once per rollout.
        """
        ...
