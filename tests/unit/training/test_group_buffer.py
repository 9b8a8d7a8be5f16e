"""The buffer between sampling and training: order, waiting, failures, what a checkpoint holds."""

from __future__ import annotations

import json
import math
import threading
from concurrent.futures import Future

import pytest

from conch.errors import RolloutError
from conch.rewards.scorer import RewardRequest
from conch.training.overlap.buffer import Admission, BufferedGroup, GroupBuffer
from conch.types import Completion, Prompt, Rollout

PROMPTS = [Prompt(letter, (index,)) for index, letter in enumerate("abcdef")]
WAIT_S = 30.0


def admitted(*numbers: int, size: int = 2) -> list[BufferedGroup]:
    """A group for each number, of the row of that number."""
    return [
        BufferedGroup(Admission(number, number, tuple(range(number, number + size))), PROMPTS[number])
        for number in numbers
    ]


def rollout(prompt: Prompt, *logprobs: float, version: int = 0) -> Rollout:
    return Rollout(prompt, Completion("x", (3,) * len(logprobs), logprobs, "eos"), version)


def complete(buffer: GroupBuffer, number: int) -> None:
    """Bring both completions of a group, the second one first, and ask for their rewards."""
    for place in (1, 0):
        group = buffer.put(number, place, rollout(PROMPTS[number], -0.5, version=place))
        buffer.requested(group, [place], RewardRequest([group.rollouts[place]], Future()))


def test_take_gives_the_oldest_whatever_ended_first() -> None:
    buffer = GroupBuffer()
    buffer.admit(admitted(0, 1, 2))
    for number in (2, 1, 0):
        complete(buffer, number)
    taken = buffer.take(2)
    assert [group.admission.number for group in taken] == [0, 1]
    assert [each.policy_version for each in taken[0].in_order] == [0, 1]
    assert [group.admission.number for group in buffer.take(1)] == [2]
    assert len(buffer) == 0


def test_take_waits_for_the_last_completion_of_the_oldest() -> None:
    buffer = GroupBuffer()
    buffer.admit(admitted(0, 1))
    complete(buffer, 1)
    taken: list[BufferedGroup] = []
    thread = threading.Thread(target=lambda: taken.extend(buffer.take(1)))
    thread.start()
    first = buffer.put(0, 1, rollout(PROMPTS[0], -0.5))
    buffer.requested(first, [1], RewardRequest([first.rollouts[1]], Future()))
    thread.join(0.2)
    assert thread.is_alive()
    first = buffer.put(0, 0, rollout(PROMPTS[0], -0.5))
    thread.join(0.2)
    assert thread.is_alive(), "a completion was taken whose reward nobody had asked for"
    buffer.requested(first, [0], RewardRequest([first.rollouts[0]], Future()))
    thread.join(WAIT_S)
    assert [group.admission.number for group in taken] == [0]


def test_failure_is_raised_by_who_waits_and_by_who_comes_later() -> None:
    buffer = GroupBuffer()
    buffer.admit(admitted(0))
    raised: list[Exception] = []

    def take() -> None:
        try:
            buffer.take(1)
        except RolloutError as error:
            raised.append(error)

    thread = threading.Thread(target=take)
    thread.start()
    buffer.fail(RolloutError("the first"))
    buffer.fail(RolloutError("a second, of the first"))
    thread.join(WAIT_S)
    assert [str(error) for error in raised] == ["the first"]
    with pytest.raises(RolloutError, match="the first"):
        buffer.take(1)


def test_groups_that_are_whole_are_given_before_a_failure_is() -> None:
    """What ended is learned from: the failure is of something else."""
    buffer = GroupBuffer()
    buffer.admit(admitted(0, 1))
    complete(buffer, 0)
    buffer.fail(RolloutError("no server"))
    assert [group.admission.number for group in buffer.take(1)] == [0]
    with pytest.raises(RolloutError):
        buffer.take(1)


def test_state_brings_back_completions_bit_for_bit() -> None:
    buffer = GroupBuffer()
    buffer.admit(admitted(3, 5))
    values = (-1 / 3, -1e-300, -math.pi * 1e7)
    runs = ((4, 2), (5, 1))
    ended = Rollout(PROMPTS[3], Completion("häß", (70_000, 0, 2**31 - 1), values, "stop"), 4, runs)
    buffer.put(3, 1, ended)
    captured = buffer.capture()
    buffer.put(3, 0, rollout(PROMPTS[3], -0.5))
    state = json.loads(json.dumps(captured()))
    restored = GroupBuffer()
    restored.load_state_dict(state, PROMPTS)
    first, second = restored.groups()
    assert first.rollouts == {1: ended}
    assert first.missing == [0]
    assert (second.admission, second.missing) == (Admission(5, 5, (5, 6)), [0, 1])
    assert restored.counts() == (0, 2)
