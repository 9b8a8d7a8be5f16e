"""Forms for whoever writes a client by hand.

    {"texts": [text, ...], "labels": [...]}                  -> {"rewards": [number, ...], ...}
    {"prompts": [...], "completions": [...], "labels": ...}  -> the same; one of each gives one number
    {"messages": [message, ...], "label": ...}               -> {"reward": number, ...}

With `"partial": true` a sample without a score is null, and "statuses" say why; without it the request fails.
Several objectives stand in "scores".
"""

from __future__ import annotations

from typing import Any

from conch.reward_server.forms.base import (
    BAD_REQUEST,
    Body,
    Form,
    Question,
    Reader,
    RefusedError,
    Scores,
    column,
    texts,
)
from conch.types import RewardStatus, Rollout


def _question(rollouts: list[Rollout], body: Body, *, single: bool) -> Question:
    partial = body.get("partial", False)
    if not isinstance(partial, bool):
        raise RefusedError(BAD_REQUEST, "`partial` is true or false")
    tell = _tell_one if single else _tell_all
    return Question(rollouts, lambda scores: tell(scores, partial), partial)


def _tell_all(scores: Scores, partial: bool) -> dict[str, Any]:
    results = scores.results
    names = dict.fromkeys(name for each in results for name in (*each.scores, *each.absent))
    told: dict[str, Any] = {
        "model": scores.model,
        "rewards": [total if each.ok else None for total, each in zip(scores.totals, results, strict=True)],
    }
    if len(names) > 1:
        told["scores"] = {name: [each.scores.get(name) for each in results] for name in names}
    if partial:
        told["statuses"] = [each.status.value for each in results]
        told["details"] = ["" if each.status is RewardStatus.OK else each.detail for each in results]
    return told


def _tell_one(scores: Scores, partial: bool) -> dict[str, Any]:
    told = _tell_all(scores, partial)
    one = {"model": told["model"], "reward": told["rewards"][0]}
    if "scores" in told:
        one["scores"] = {name: values[0] for name, values in told["scores"].items()}
    if partial:
        one |= {"status": told["statuses"][0], "detail": told["details"][0]}
    return one


def _read_texts(body: Body, reader: Reader) -> Question:
    samples, single = texts(body, "texts"), isinstance(body["texts"], str)
    labels = _labels(body, len(samples), single=single)
    rollouts = [reader.text(text, reader.row(label)) for text, label in zip(samples, labels, strict=True)]
    return _question(rollouts, body, single=single)


def _read_pairs(body: Body, reader: Reader) -> Question:
    plural = "completions" in body
    completions = texts(body, "completions" if plural else "completion")
    given = body.get("prompts" if plural else "prompt", "")
    single = isinstance(body["completions" if plural else "completion"], str)
    prompts = [given] if single else column({"prompts": given or None}, "prompts", len(completions))
    labels = _labels(body, len(completions), single=single)
    if not all(isinstance(prompt, str | list | None) for prompt in prompts):
        raise RefusedError(BAD_REQUEST, "a prompt is a text or a list of messages")
    rollouts = [
        reader.answered(prompt or "", completion, reader.row(each))
        for prompt, completion, each in zip(prompts, completions, labels, strict=True)
    ]
    return _question(rollouts, body, single=single)


def _read_dialogue(body: Body, reader: Reader) -> Question:
    rollout = reader.messages(body["messages"], reader.row(body.get("label")), body)
    return _question([rollout], body, single=True)


def _labels(body: Body, number: int, *, single: bool) -> list[Any]:
    """One label per sample. `label` beside several samples would say nothing of which."""
    label = body.get("label")
    if label is None or label == "":
        return column(body, "labels", number)
    if not single:
        raise RefusedError(BAD_REQUEST, "`label` is of one sample: give several a list, `labels`")
    return [label]


class _PairsForm(Form):
    """A form with two spellings."""

    def fits(self, body: object) -> bool:
        """Whether it is one of them."""
        return isinstance(body, dict) and ("completions" in body or "completion" in body)


TEXTS = Form("texts", '{"texts": [text, ...], "labels": [...]}', frozenset({"texts"}), _read_texts)
PAIRS = _PairsForm(
    "pairs", '{"prompt": text or messages, "completion": text, "label": ...}', frozenset(), _read_pairs
)
DIALOGUE = Form(
    "messages", '{"messages": [message, ...], "label": ...}', frozenset({"messages"}), _read_dialogue
)
