"""Groups between admission and training: each is there once, the oldest is trained first, none is dropped.

A group is the completions of one prompt that are compared with each other. It is numbered when it is
admitted, and its number says in which step it is trained. Numbers count from 0 on each rank.

Two threads meet here: the trainer's, which admits and takes, and the stream's, which brings completions.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from conch.errors import ConchError
from conch.rewards.scorer import RewardRequest
from conch.types import Completion, Prompt, Rollout


@dataclass(frozen=True)
class Admission:
    """A prompt that is to be sampled.

    number: of the group.
    row: of the data.
    seeds: one for each completion.
    """

    number: int
    row: int
    seeds: tuple[int, ...]


@dataclass(eq=False)
class BufferedGroup:
    """A group on its way.

    rollouts: by their places; those that have ended.
    requests: for the rewards of these, each behind their places.
    """

    admission: Admission
    prompt: Prompt
    rollouts: dict[int, Rollout] = field(default_factory=dict)
    requests: list[tuple[Sequence[int], RewardRequest]] = field(default_factory=list)

    @property
    def missing(self) -> list[int]:
        """Places whose completions have not ended."""
        return [place for place in range(len(self.admission.seeds)) if place not in self.rollouts]

    @property
    def in_order(self) -> list[Rollout]:
        """All rollouts by their places."""
        return [self.rollouts[place] for place in range(len(self.admission.seeds))]


class GroupBuffer:
    """Groups that were admitted and have not been trained."""

    def __init__(self) -> None:
        self._groups: dict[int, BufferedGroup] = {}  # in the order of their numbers, as they are admitted
        self._changed = threading.Condition()
        self._error: ConchError | None = None

    def __len__(self) -> int:
        return len(self._groups)

    def admit(self, groups: Sequence[BufferedGroup]) -> None:
        """Take in groups, each behind those that are there."""
        with self._changed:
            for group in groups:
                assert group.admission.number > next(reversed(self._groups), -1)
                self._groups[group.admission.number] = group

    def put(self, number: int, place: int, rollout: Rollout) -> BufferedGroup:
        """Note a completion that has ended; returns its group."""
        with self._changed:
            group = self._groups[number]
            assert place not in group.rollouts, f"completion {place} of group {number} came twice"
            group.rollouts[place] = rollout
            return group

    def requested(self, group: BufferedGroup, places: Sequence[int], request: RewardRequest) -> None:
        """Note that the rewards of a group's completions at `places` are asked for."""
        with self._changed:
            group.requests.append((places, request))
            self._changed.notify_all()

    def fail(self, error: ConchError) -> None:
        """Have `take` raise what went wrong elsewhere; the first error stays."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def take(self, count: int) -> list[BufferedGroup]:
        """Remove the oldest `count` groups, once all of their completions have ended and are being scored.

        Raises:
            ConchError: what `fail` was told.
        """
        with self._changed:
            while not self._are_ready(count):
                if self._error is not None:
                    raise self._error
                self._changed.wait()
            return [self._groups.pop(number) for number in [*islice(self._groups, count)]]

    def _are_ready(self, count: int) -> bool:
        here = len(self._groups)
        assert here >= count, f"{count} groups are to be trained, {here} were admitted"
        return all(
            sum(len(places) for places, _ in group.requests) == len(group.admission.seeds)
            for group in islice(self._groups.values(), count)
        )

    def counts(self) -> tuple[int, int]:
        """Groups whose completions have all ended, and groups that are being sampled."""
        with self._changed:
            ended = sum(not group.missing for group in self._groups.values())
            return ended, len(self._groups) - ended

    def groups(self) -> list[BufferedGroup]:
        """All groups, the oldest first."""
        with self._changed:
            return [*self._groups.values()]

    def capture(self) -> Callable[[], list[dict[str, Any]]]:
        """Capture all groups with the completions that have ended; the result gives them as JSON values.

        To capture takes no time, to write 8 million tokens down takes seconds.
        """
        with self._changed:
            groups = [
                BufferedGroup(group.admission, group.prompt, dict(group.rollouts))
                for group in self._groups.values()
            ]
        return lambda: [_group_state(group) for group in groups]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt]) -> None:
        """Take up what `capture` gave; rewards are to be asked for again.

        prompts: by their rows.
        """
        self.admit([_group_of(values, prompts[values["row"]]) for values in state])


def _group_state(group: BufferedGroup) -> dict[str, Any]:
    admission = group.admission
    return {
        "number": admission.number,
        "row": admission.row,
        "seeds": list(admission.seeds),
        "rollouts": {str(place): _rollout_state(rollout) for place, rollout in group.rollouts.items()},
    }


def _group_of(values: Mapping[str, Any], prompt: Prompt) -> BufferedGroup:
    admission = Admission(values["number"], values["row"], tuple(values["seeds"]))
    ended = {int(place): _rollout_of(state, prompt) for place, state in values["rollouts"].items()}
    return BufferedGroup(admission, prompt, ended)


def _rollout_state(rollout: Rollout) -> dict[str, Any]:
    completion = rollout.completion
    return {
        "text": completion.text,
        # A token in 16 characters instead of 25 or so.
        "token_ids": _packed(np.asarray(completion.token_ids, dtype=np.int32)),
        "logprobs": _packed(np.asarray(completion.logprobs, dtype=np.float64)),
        "finish_reason": completion.finish_reason,
        "policy_version": rollout.policy_version,
        "version_runs": [list(run) for run in rollout.version_runs],
    }


def _rollout_of(state: Mapping[str, Any], prompt: Prompt) -> Rollout:
    completion = Completion(
        text=state["text"],
        token_ids=tuple(_unpacked(state["token_ids"], np.int32)),
        logprobs=tuple(_unpacked(state["logprobs"], np.float64)),
        finish_reason=state["finish_reason"],
    )
    runs = tuple((int(version), int(tokens)) for version, tokens in state["version_runs"])
    return Rollout(prompt, completion, state["policy_version"], runs)


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode("ascii")


def _unpacked(text: str, dtype: Any) -> list[Any]:
    return np.frombuffer(base64.b64decode(text), dtype=dtype).tolist()
