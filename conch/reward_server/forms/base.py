"""From bodies to samples: what all forms share.

    body -> `Form.read` -> `Question`: rollouts, and how their scores are told -> `Question.answer` -> body

A form asks for one number a sample. Where a sample got none, the request fails as a whole: no client that we
know takes a hole for anything but a number or a crash, see docs/reward_server.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from conch.types import ASSISTANT, Completion, Dialogue, Prompt, RewardResult, Rollout, text_parts

Body = Mapping[str, Any]

BAD_REQUEST, NOT_FOUND, UNPROCESSABLE, TOO_MANY, UNAVAILABLE, LATE = 400, 404, 422, 429, 503, 504


class RefusedError(Exception):
    """A request that is not scored.

    status: of HTTP.
    retry_after_s: when to ask again, in seconds; None where that does not help.
    """

    def __init__(self, status: int, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Scores:
    """The results of a request's samples, in order.

    model: name of the reward.
    totals: one number per sample; NaN where it has none.
    weights: of the objectives.
    """

    model: str
    totals: Sequence[float]
    results: Sequence[RewardResult]
    weights: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Question:
    """What a body asks for.

    answer: makes the answer's JSON of the scores.
    partial: whether the answer can say that a sample has no score; else one without fails the request.
    """

    rollouts: list[Rollout]
    answer: Callable[[Scores], Any]
    partial: bool = False


def detail_error(status: int, reason: str) -> dict[str, Any]:
    """The error of a form that has none of its own."""
    del status
    return {"detail": reason}


@dataclass(frozen=True, slots=True)
class Form:
    """One wire form.

    name: in metrics.
    shape: its body, as refusals show it.
    keys: a body fits that has these.
    read: raises `RefusedError` where the body cannot be read.
    error: body of an error, from its status and a sentence.
    busy: status where too much waits; one that the form's clients ask again after.
    """

    name: str
    shape: str
    keys: frozenset[str]
    read: Callable[[Body, Reader], Question]
    error: Callable[[int, str], dict[str, Any]] = detail_error
    busy: int = TOO_MANY

    def fits(self, body: object) -> bool:
        """Whether a body is of this form."""
        return isinstance(body, Mapping) and self.keys <= body.keys()


@dataclass(frozen=True, slots=True)
class Reader:
    """Makes rollouts for one reward.

    label_key: see `RewardServerConfig`.
    always_labels: whether a row has the key even where a client sends no label, since a function names it.
    strip: see `RewardServerConfig`.
    needs_completions: whether the reward looks at the completion apart from its prompt, as verifiers do.
    reads: what a served model takes; `any` where Python code is given both.
    """

    label_key: str = "label"
    always_labels: bool = False
    strip: tuple[str, ...] = ()
    needs_completions: bool = True
    reads: Literal["texts", "dialogues", "both", "any"] = "any"

    def text(self, text: str, row: Mapping[str, Any] | None = None) -> Rollout:
        """A text by itself: the completion of an empty prompt."""
        return _rollout(Prompt("", (), row or {}), text)

    def answered(self, prompt: str | list[Any], completion: str, row: Mapping[str, Any]) -> Rollout:
        """A completion of a text, or of messages."""
        if isinstance(prompt, str):
            return _rollout(Prompt(prompt, (), row), completion)
        dialogue = self._dialogue(prompt)
        return _rollout(Prompt(_contents(dialogue.messages), (), row, dialogue), completion)

    def within(self, query: str, prompt: str, row: Mapping[str, Any]) -> Rollout:
        """A prompt and its completion as one text.

        Raises:
            RefusedError: the reward needs the completion, and the text does not begin with the prompt.
        """
        query = self.stripped(query)
        if query.startswith(prompt):
            return _rollout(Prompt(prompt, (), row), query[len(prompt) :])
        if self.needs_completions:
            raise RefusedError(
                UNPROCESSABLE,
                "a query does not begin with its prompt, so nobody knows where the completion begins, which "
                "this reward reads: were prompts cut, or rendered anew?",
            )
        return _rollout(Prompt("", (), row), query)

    def messages(
        self, messages: Any, row: Mapping[str, Any] | None = None, body: Body | None = None
    ) -> Rollout:
        """A dialogue, whose last message is what is scored.

        body: may hold `tools` and `chat_template_kwargs`.
        """
        dialogue = self._dialogue(messages, body)
        last = dialogue.messages[-1]
        if last.get("role") != ASSISTANT:
            raise RefusedError(
                BAD_REQUEST,
                f"the last message is the {last['role']}'s: what is scored is a message of the {ASSISTANT}",
            )
        try:
            begun, text = dialogue.begun()
        except ValueError as error:
            raise RefusedError(BAD_REQUEST, f"the last message {error}") from None
        return _rollout(Prompt(_contents(begun.messages), (), row or {}, begun), text)

    def row(self, label: Any) -> dict[str, Any]:
        """The row that a label stands for; clients send None or "" where they have none."""
        if label is None or label == "":
            return {self.label_key: None} if self.always_labels else {}
        return dict(label) if isinstance(label, Mapping) else {self.label_key: label}

    def stripped(self, text: str) -> str:
        """A text without special tokens at its end."""
        cut = True
        while cut:
            cut = False
            for token in self.strip:
                if token and text.endswith(token):
                    text, cut = text[: -len(token)], True
        return text

    def _dialogue(self, messages: Any, body: Body | None = None) -> Dialogue:
        if self.reads == "texts":
            raise RefusedError(
                UNPROCESSABLE,
                "the reward model reads texts, and only the policy's trainer knows its chat template: send "
                "texts, or convert the model with --template chat",
            )
        _check_messages(messages)
        body = body or {}
        tools, kwargs = body.get("tools"), body.get("chat_template_kwargs") or {}
        if not isinstance(tools, list | None) or not isinstance(kwargs, Mapping):
            raise RefusedError(BAD_REQUEST, "`tools` is a list, `chat_template_kwargs` an object")
        clean = ({key: value for key, value in each.items() if value is not None} for each in messages)
        return Dialogue(tuple(clean), tuple(tools) if tools else None, dict(kwargs))


def _rollout(prompt: Prompt, completion: str) -> Rollout:
    return Rollout(prompt, Completion(completion, (), (), "eos"), 0)


def _contents(messages: Sequence[Mapping[str, Any]]) -> str:
    """What messages say, for rewards that read texts: nobody here knows a template."""
    contents = ("".join(text_parts(each.get("content"))) for each in messages)
    return "\n\n".join(each for each in contents if each)


def _check_messages(messages: Any) -> None:
    ok = (
        isinstance(messages, list)
        and messages
        and all(isinstance(each, Mapping) and isinstance(each.get("role"), str) for each in messages)
    )
    if not ok:
        raise RefusedError(
            BAD_REQUEST, 'messages are a list of objects with a "role" and what the template reads of them'
        )


def texts(body: Body, key: str) -> list[str]:
    """A list of texts under a key; a single text counts as a list of one."""
    value = body.get(key)
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return value
    raise RefusedError(BAD_REQUEST, f"`{key}` is a text or a list of texts")


def column(body: Body, key: str, number: int) -> list[Any]:
    """One value per sample under a key; None each where it is absent."""
    value = body.get(key)
    if value is None:
        return [None] * number
    if not isinstance(value, list) or len(value) != number:
        got = f"{len(value)}" if isinstance(value, list) else f"a {type(value).__name__}"
        raise RefusedError(BAD_REQUEST, f"`{key}` is a list with one entry for each of {number}, not {got}")
    return value
