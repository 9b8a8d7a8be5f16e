"""From the scores of a sample's steps to one reward for each token of its response.

A step's score goes to the token in which the step ends, and all other tokens get 0.0; scores of several
steps that end in one token add up, so nothing is lost where the model's tokens are shorter than the policy's.
Steps of the prompt do not count: no token of the policy ends them.

Where tokens end is counted in what the model was sent: characters of the text, or tokens. The policy's ids
are never made again from the text: how much text each token stands for is seen by decoding them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

from conch.errors import RewardInvalidError
from conch.types import Rollout

Decode = Callable[[Sequence[int]], str]
"""The policy's ids -> text, as the completions' texts were made."""

_HALF_A_CHARACTER = "\ufffd"

_CONTEXT = 8
"""Ids of a prompt that decide how the first characters behind it decode."""


def response_bounds(rollout: Rollout, decode: Decode | None) -> tuple[int, ...]:
    """Return where the response begins in its sample and where each of its R tokens ends.

    R + 1 numbers, each at least as large as the one before.

    decode: None counts tokens, else characters are counted.
    """
    if decode is None:
        start = len(rollout.prompt.token_ids)
        return tuple(range(start, start + len(rollout.completion.token_ids) + 1))
    start = len(rollout.prompt.text)
    completion = rollout.completion
    prompt = rollout.prompt.token_ids
    # Where the last ids are all special, an earlier one decides; an encoder-decoder's response reads none.
    for before in (prompt[-_CONTEXT:], prompt, ()):
        ends = _token_ends(before, completion.token_ids, decode)
        if not ends or ends[-1] == len(completion.text):
            break
    return (start, *(start + end for end in ends))


def token_scores(
    ends: Sequence[int], scores: Sequence[float], bounds: Sequence[int], *, may_be_cut: bool = True
) -> tuple[float, ...]:
    """Return one reward for each token of the response.

    ends: end of each of the sample's steps.
    scores: score of each step.
    bounds: from `response_bounds`.
    may_be_cut: True if the model cuts a sample that is too long, as it does with texts; else it refuses such
        a sample.

    Raises:
        RewardInvalidError: all of the response was cut off; a zero would be a false reward.
    """
    rewards = [0.0] * (len(bounds) - 1)
    response_steps = [(end, score) for end, score in zip(ends, scores, strict=True) if end > bounds[0]]
    if not response_steps and may_be_cut and bounds[-1] > bounds[0]:
        raise RewardInvalidError(
            "no step of the model's reply ends in the response: the sample was cut before it; serve the "
            "model with a larger --max_length, or with --truncation_side left"
        )
    for end, score in response_steps:
        if rewards:
            rewards[bisect_left(bounds, min(end, bounds[-1])) - 1] += score
    return tuple(rewards)


def _token_ends(before: Sequence[int], ids: Sequence[int], decode: Decode) -> list[int]:
    """Return the number of characters of the response's text up to and including each of its tokens.

    before: the prompt's last ids, behind which a first token keeps its space.

    Characters of several tokens belong to the last of them. A token is decoded together with those before it,
    since some decoders treat the first token of a text in a way of its own, but never with the whole text,
    which would take time that grows with the square of the length.
    """
    ends: list[int] = []
    row = [*before, *ids]
    context, fresh, length = 0, len(before), 0
    for place in range(len(before), len(row)):
        known, all_of_it = decode(row[context:fresh]), decode(row[context : place + 1])
        if len(all_of_it) > len(known) and not all_of_it.endswith(_HALF_A_CHARACTER):
            length += len(all_of_it) - len(known)
            context, fresh = fresh, place + 1
        ends.append(length)
    if fresh < len(row):  # a response that was cut within a character
        ends[-1] += len(decode(row[context:])) - len(decode(row[context:fresh]))
    return ends
