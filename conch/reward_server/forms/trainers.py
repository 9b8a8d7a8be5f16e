"""What the trainers send that ask a reward server by themselves: OpenRLHF and slime.

OpenRLHF (`openrlhf/utils/agent.py`, 0.11): one POST a sample, to the URL of `--reward.remote_url`.
    {"query": [prompt and completion], "prompts": [prompt], "labels": [label, "" for none]}
    -> {"rewards": [number], "scores": [number], "extra_logs": {name: [number]}}
The query is decoded with special tokens in it. `scores` are what its dynamic filtering looks at, and
`extra_logs`, of which every sample needs the same, go into its logs.

slime (`slime/rollout/rm_hub/__init__.py`, `--rm-type remote_rm --rm-url URL`): one POST a sample.
    {"prompt": text or messages, "response": text, "label": anything} -> number, or {name: number} from which
    `--reward-key` takes one
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
from conch.rewards.scorer import weight_of
from conch.types import RewardResult


def _read_openrlhf(body: Body, reader: Reader) -> Question:
    queries = texts(body, "query")
    labels = column(body, "labels", len(queries))
    if body.get("dialogues") is not None:  # what our own client adds, `reward.dialect=messages`
        dialogues = column(body, "dialogues", len(queries))
        if not all(isinstance(each, dict | None) for each in dialogues):
            raise RefusedError(BAD_REQUEST, '`dialogues` are objects with "messages", null for a text')
        rollouts = [
            reader.text(query, reader.row(label))
            if dialogue is None
            else reader.messages(dialogue.get("messages"), reader.row(label), dialogue)
            for query, dialogue, label in zip(queries, dialogues, labels, strict=True)
        ]
        return Question(rollouts, _tell_openrlhf)
    prompts = [each or "" for each in column(body, "prompts", len(queries))]
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise RefusedError(BAD_REQUEST, "`prompts` are texts")
    rollouts = [
        reader.within(query, prompt, reader.row(label))
        for query, prompt, label in zip(queries, prompts, labels, strict=True)
    ]
    return Question(rollouts, _tell_openrlhf)


def _tell_openrlhf(scores: Scores) -> dict[str, Any]:
    rewards = list(scores.totals)
    return {"rewards": rewards, "scores": rewards, "extra_logs": _parts(scores)}


def _parts(scores: Scores) -> dict[str, list[float]]:
    """What each objective adds to the rewards, where there are several; 0 where it does not apply."""
    names = dict.fromkeys(name for each in scores.results for name in (*each.scores, *each.absent))
    if len(names) < 2:
        return {}
    return {
        name: [weight_of(name, scores.weights) * each.scores.get(name, 0.0) for each in scores.results]
        for name in names
    }


def _slime_question(body: Body, reader: Reader) -> Question:
    prompt, response = body["prompt"], body["response"]
    if not isinstance(response, str) or not isinstance(prompt, str | list):
        raise RefusedError(BAD_REQUEST, "`response` is a text, `prompt` a text or a list of messages")
    rollout = reader.answered(prompt, reader.stripped(response), reader.row(body.get("label")))
    return Question([rollout], lambda scores: scores.totals[0])


def _slime_scores(body: Body, reader: Reader) -> Question:
    rollouts = _slime_question(body, reader).rollouts
    return Question(rollouts, lambda scores: named_scores(scores.totals[0], scores.results[0]))


def named_scores(total: float, result: RewardResult) -> dict[str, float]:
    """The scores of the objectives, and the reward."""
    return {**result.scores, "reward": total}


OPENRLHF = Form(
    "openrlhf",
    '{"query": [text, ...], "prompts": [text, ...], "labels": [...]}',
    frozenset({"query"}),
    _read_openrlhf,
)
_SLIME_SHAPE, _SLIME_KEYS = (
    '{"prompt": text, "response": text, "label": ...}',
    frozenset({"prompt", "response"}),
)
SLIME = Form("slime", _SLIME_SHAPE, _SLIME_KEYS, _slime_question)
SLIME_SCORES = Form("slime", _SLIME_SHAPE, _SLIME_KEYS, _slime_scores)
