"""Which samples are out, with whom and until when, what they got, and which groups are learned from when.

    sample   open -> rewarded | failed (the client has no reward) | lapsed (none came within the lease)
    group    open -> whole -> learned            its samples are settled, two or more of them with a reward
                  -> dropped                     fewer, or too old for the update that it would be part of

The whole groups are learned from in the order in which they became whole: the one in place i by update
i // P, P groups each, which makes version i // P + 1 of the model. So what an answer says of a post holds for
ever, and a post that is repeated gets the same answer.

Everything that changes the ledger is an event, a JSON object that goes to `on_event` before it is applied.
`state_dict` and the events behind it give the same ledger again; the end of an update is no event, for an
update that was lost is done again.

The clock is that of the ledger, in seconds, and stands still while there is none.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from conch.service.leases.checks import check_rewards, dealt
from conch.service.leases.records import (
    Answer,
    Asker,
    EndedGroup,
    Group,
    Handout,
    LedgerSettings,
    Post,
    Sample,
    completion_of,
    completion_state,
    group_of,
    group_state,
    lease_state,
    sample_of,
    sample_state,
)
from conch.service.protocol import token_hash
from conch.service.refusals import BUSY, CONFLICT, GONE, NOT_FOUND, UNPROCESSABLE, RefusedError
from conch.types import Completion, Prompt

Event = dict[str, Any]

_REMEMBERED = 1024
"""Groups that have ended and are still known, for posts that are repeated."""

_FEWEST = 2
"""Rewards that a group needs: one has nothing to be compared with."""

_BUSY_S = 1.0


class Ledger:
    """Groups between sampling and learning. Not for several threads at once.

    step: updates that were made.
    clock: the latest time that it was told.
    sequence: number of the latest event.
    on_event: gets each event before it is applied; where it fails, nothing has happened.
    """

    def __init__(
        self, settings: LedgerSettings, on_event: Callable[[Event], object] = lambda event: None
    ) -> None:
        self.settings = settings
        self.step = 0
        self.clock = 0.0
        self.sequence = 0
        self.counts: dict[str, int] = dict.fromkeys(_COUNTS, 0)
        self._on_event = on_event
        self._next_number = 0
        self._next_place = 0
        self._groups: dict[int, Group] = {}
        self._ended: OrderedDict[int, EndedGroup] = OrderedDict()
        self._requests: dict[str, tuple[str, int, tuple[int, ...]]] = {}
        self._keys: dict[str, int] = {}
        self._places: dict[int, int] = {}

    def go_by(self, settings: LedgerSettings, now: float) -> None:
        """Go by these settings from now on; what was settled before stays as it is."""
        if settings != self.settings or not self.sequence:
            self._emit({"do": "settings", "values": asdict(settings)}, now)

    # ------------------------------------------------------------------------------------------- completions

    @property
    def next_number(self) -> int:
        """Number of the next group."""
        return self._next_number

    @property
    def under_way(self) -> int:
        """Groups that have not ended."""
        return len(self._groups)

    def admit(self, number: int, waiting: int = 0) -> None:
        """See that there is room for further groups.

        waiting: groups that are about to be sampled.

        Raises:
            RefusedError: there is none.
        """
        most = self.settings.max_groups
        if self.under_way + waiting + number > most:
            raise RefusedError(
                BUSY,
                f"{self.under_way + waiting} groups are under way, {number} more would be above "
                f"`max_groups` = {most}: reward some of them first, or come again",
                retry_after_s=_BUSY_S,
            )

    def repeated(self, asker: Asker) -> Handout | None:
        """What a request was given before; None for a new one.

        Raises:
            RefusedError: it asked for something else then, or its group has ended.
        """
        known = self._requests.get(_request_key(asker.client, asker.request)) if asker.request else None
        if known is None:
            return None
        digest, number, places = known
        if digest != asker.digest:
            raise RefusedError(
                CONFLICT, f"`request_id` {asker.request!r} was used before, to ask for something else"
            )
        if number not in self._groups:
            raise RefusedError(
                GONE, f"the completions of `request_id` {asker.request!r} were rewarded, or have lapsed"
            )
        return Handout(self._groups[number], places)

    def shared(self, key: str) -> bool:
        """Whether there is a group of this name."""
        return key in self._keys

    def issue(
        self,
        prompt: Prompt,
        completions: Sequence[Completion],
        version: int,
        key: str,
        askers: Sequence[Asker],
        now: float,
    ) -> list[Handout | RefusedError]:
        """Take in a group that was sampled, and lease its samples to those who wait for it, one behind the
        other. Returns what each gets; a refusal for one that asks for more than are left.

        All of it is one event: there is no group on disk that nobody comes for, since his lease is not.
        """
        free = [*range(len(completions))]
        parts: list[tuple[int, ...] | RefusedError] = []
        leases: list[Event] = []
        for asker in askers:
            try:
                places = dealt(free, asker, len(completions))
            except RefusedError as refusal:
                parts.append(refusal)
                continue
            parts.append(places)
            leases.append(lease_state(asker, places))
            del free[: len(places)]
        number = self._next_number
        event = {
            "do": "issue",
            "number": number,
            "text": prompt.text,
            "prompt_ids": [*prompt.token_ids],
            "completions": [completion_state(completion) for completion in completions],
            "version": version,
            "key": key,
            "leases": leases,
        }
        self._emit(event, now)
        group = self._groups[number]
        return [each if isinstance(each, RefusedError) else Handout(group, each) for each in parts]

    def hand_out_shared(self, key: str, asker: Asker, now: float) -> Handout:
        """Lease the next samples of the group of this name to who asks.

        Raises:
            RefusedError: there are not so many that nobody has.
        """
        group = self._groups[self._keys[key]]
        free = [place for place, each in enumerate(group.samples) if each.client is None and _is_open(each)]
        places = dealt(free, asker, len(group.samples))
        self._emit({"do": "lease", "number": group.number, **lease_state(asker, places)}, now)
        return Handout(group, places)

    # ----------------------------------------------------------------------------------------------- rewards

    def reward(self, post: Post, now: float) -> Answer:
        """Note rewards, all of a post or none. Samples that have the same rewards already stay as they are.

        Raises:
            RefusedError: says which sample cannot be rewarded, and why.
        """
        self.expire(now)
        number, places, new = self._examined(post)
        if new:
            pairs = [[place, reward] for place, reward in new]
            self._emit({"do": "reward", "number": number, "step": self.step, "rewards": pairs}, now)
        return self._answer(number, places)

    def answered(self, post: Post) -> Answer | None:
        """What a post was answered that is repeated; None for one that has something new.

        Raises:
            RefusedError: as `reward` does.
        """
        number, places, new = self._examined(post)
        return None if new else self._answer(number, places)

    def expire(self, now: float) -> int:
        """Give back samples whose lease has ended; returns how many."""
        lapsed = [
            (group.number, [place for place, each in enumerate(group.samples) if _has_lapsed(each, now)])
            for group in self._groups.values()
        ]
        for number, places in lapsed:
            if places:
                self._emit({"do": "lapse", "number": number, "step": self.step, "places": places}, now)
        return sum(len(places) for _, places in lapsed)

    def next_lapse(self) -> float | None:
        """When the next lease ends; None where none is out."""
        times = [
            each.lease_until for group in self._groups.values() for each in group.samples if _is_open(each)
        ]
        return min(times, default=None)

    # ---------------------------------------------------------------------------------------------- learning

    def next_groups(self) -> list[Group] | None:
        """The groups that the next update learns from, in their order; None until all of them are whole."""
        first, count = self.step * self.settings.groups_per_step, self.settings.groups_per_step
        numbers = [self._places.get(place) for place in range(first, first + count)]
        if any(number is None for number in numbers):
            return None
        return [self._groups[number] for number in numbers if number is not None]

    def learned(self) -> None:
        """Note that an update has learned from `next_groups`."""
        groups = self.next_groups()
        assert groups is not None, "an update learns from whole groups"
        self.step += 1
        self.counts["groups_learned"] += len(groups)
        for group in groups:
            self._end(group, "")

    # ------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "step": self.step,
            "clock": self.clock,
            "sequence": self.sequence,
            "settings": asdict(self.settings),
            "counts": dict(self.counts),
            "next_number": self._next_number,
            "next_place": self._next_place,
            "groups": [group_state(group) for group in self._groups.values()],
            "ended": [
                [number, each.reason, [*each.requests], [sample_state(sample) for sample in each.samples]]
                for number, each in self._ended.items()
            ],
            "requests": [
                [key, digest, number, [*places]] for key, (digest, number, places) in self._requests.items()
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.settings = LedgerSettings(**state["settings"])
        self.step, self.clock, self.sequence = state["step"], state["clock"], state["sequence"]
        self.counts = dict.fromkeys(_COUNTS, 0) | dict(state["counts"])
        self._next_number, self._next_place = state["next_number"], state["next_place"]
        self._groups = {values["number"]: group_of(values) for values in state["groups"]}
        self._ended = OrderedDict(
            (number, EndedGroup(tuple(sample_of(each) for each in samples), reason, tuple(requests)))
            for number, reason, requests, samples in state["ended"]
        )
        self._requests = {
            key: (digest, number, tuple(places)) for key, digest, number, places in state["requests"]
        }
        self._keys = {group.key: number for number, group in self._groups.items() if group.key}
        self._places = {
            group.place: number for number, group in self._groups.items() if group.place is not None
        }

    def replay(self, events: Sequence[Event]) -> None:
        """Apply events that came after `state_dict` was taken; those before it are passed over."""
        for event in events:
            if event["n"] > self.sequence:
                self._apply(event)

    # ------------------------------------------------------------------------------------------------- parts

    def _emit(self, event: Event, now: float) -> None:
        event = {"n": self.sequence + 1, "t": max(now, self.clock), **event}
        self._on_event(event)
        self._apply(event)

    def _apply(self, event: Event) -> None:
        self.sequence, self.clock = event["n"], event["t"]
        _APPLIERS[event["do"]](self, event)

    def _apply_settings(self, event: Event) -> None:
        self.settings = LedgerSettings(**event["values"])

    def _apply_issue(self, event: Event) -> None:
        prompt = Prompt(event["text"], tuple(event["prompt_ids"]))
        until = event["t"] + self.settings.lease_s
        samples = [
            Sample(completion, token_hash([*prompt.token_ids, *completion.token_ids]), None, until)
            for completion in map(completion_of, event["completions"])
        ]
        number = event["number"]
        self._groups[number] = Group(number, prompt, event["version"], event["key"], samples)
        self._next_number = number + 1
        if event["key"]:
            self._keys[event["key"]] = number
        self.counts["groups_sampled"] += 1
        for lease in event["leases"]:
            self._note_lease(self._groups[number], lease, event["t"])

    def _apply_lease(self, event: Event) -> None:
        self._note_lease(self._groups[event["number"]], event, event["t"])

    def _note_lease(self, group: Group, lease: Event, now: float) -> None:
        for place in lease["places"]:
            sample = group.samples[place]
            sample.client, sample.lease_until = lease["client"], now + self.settings.lease_s
        if lease["request"]:
            key = _request_key(lease["client"], lease["request"])
            group.requests.append(key)
            self._requests[key] = (lease["digest"], group.number, tuple(lease["places"]))
        self.counts["requests_served"] += 1

    def _apply_reward(self, event: Event) -> None:
        group = self._groups[event["number"]]
        settled = [group.samples[place] for place, _ in event["rewards"]]
        for sample, (_, reward) in zip(settled, event["rewards"], strict=True):
            sample.status, sample.reward = ("failed" if reward is None else "rewarded"), reward
            self.counts[f"samples_{sample.status}"] += 1
        self.counts["posts_accepted"] += 1
        self._settle(group, event["step"], settled)

    def _apply_lapse(self, event: Event) -> None:
        group = self._groups[event["number"]]
        for place in event["places"]:
            group.samples[place].status = "lapsed"
        self.counts["samples_lapsed"] += len(event["places"])
        self._settle(group, event["step"], [])

    def _settle(self, group: Group, step: int, rewarded: Sequence[Sample]) -> None:
        """See whether a group is whole by now.

        step: updates that were made when this happened.
        rewarded: the samples whose post gets the answer.
        """
        reason = ""
        if any(_is_open(sample) for sample in group.samples):
            answer = Answer("waiting", step)
        elif reason := self._why_dropped(group):
            answer = Answer("dropped", step, reason)
        else:
            place = group.place = self._next_place
            self._places[place] = group.number
            self._next_place += 1
            answer = Answer("whole", place // self.settings.groups_per_step + 1)
        for sample in rewarded:
            sample.answer = answer
        if reason:
            self._end(group, reason)

    def _why_dropped(self, group: Group) -> str:
        """Why no update can learn from a group without open samples; "" where one can. Counts it."""
        rewarded = sum(sample.status == "rewarded" for sample in group.samples)
        learner = self._next_place // self.settings.groups_per_step
        age = learner - group.version
        if rewarded < _FEWEST:
            self.counts["groups_without_rewards"] += 1
            return f"{rewarded} of its {len(group.samples)} completions got a reward, {_FEWEST} are needed"
        if learner >= self.settings.total_steps:
            self.counts["groups_behind_the_end"] += 1
            return f"the run's last update, number {self.settings.total_steps}, has its groups already"
        if age > self.settings.max_staleness:
            self.counts["groups_too_old"] += 1
            return (
                f"version {group.version} sampled it, and version {learner} would learn from it: older than "
                f"`max_staleness` = {self.settings.max_staleness}"
            )
        return ""

    def _end(self, group: Group, reason: str) -> None:
        """Keep of a group what answers need."""
        del self._groups[group.number]
        self._keys.pop(group.key, None)
        if group.place is not None:
            del self._places[group.place]
        samples = tuple(replace(sample, completion=_FORGOTTEN) for sample in group.samples)
        self._ended[group.number] = EndedGroup(samples, reason, tuple(group.requests))
        while len(self._ended) > _REMEMBERED:
            _, forgotten = self._ended.popitem(last=False)
            for key in forgotten.requests:
                self._requests.pop(key, None)

    def _examined(self, post: Post) -> tuple[int, tuple[int, ...], list[tuple[int, float | None]]]:
        """Group and places of a post, and the rewards that are new, each behind its place.

        Raises:
            RefusedError: the post cannot be taken.
        """
        check_rewards(post)
        number, places = self._named(post)
        new = [
            (place, reward)
            for place, reward, hash_ in zip(places, post.rewards, post.hashes, strict=True)
            if self._is_new(number, place, reward, hash_, post.client)
        ]
        return number, places, new

    def _answer(self, number: int, places: Sequence[int]) -> Answer:
        """The answer to the post that settled these samples; of several posts to the last."""
        answers = [self._sample(number, place).answer for place in places]
        return max((each for each in answers if each is not None), key=_weight_of_answer)

    def _sample(self, number: int, place: int) -> Sample:
        group = self._groups.get(number)
        return self._ended[number].samples[place] if group is None else group.samples[place]

    def _named(self, post: Post) -> tuple[int, tuple[int, ...]]:
        """The group and the places that a post is about.

        Raises:
            RefusedError: it names none, or not those of one group.
        """
        if post.samples is None:
            return self._found_by_hashes(post)
        if len(post.samples) != len(post.hashes):
            raise RefusedError(
                UNPROCESSABLE,
                f"there are {len(post.samples)} sample ids for {len(post.hashes)} completions",
            )
        numbers = {number for number, _ in post.samples}
        if len(numbers) > 1:
            raise RefusedError(UNPROCESSABLE, "the samples are of several groups: post each group by itself")
        if len({*post.samples}) < len(post.samples):
            raise RefusedError(UNPROCESSABLE, "a sample is named twice")
        [number] = numbers
        places = tuple(place for _, place in post.samples)
        if not 0 <= number < self._next_number or not all(
            0 <= each < self.settings.group_size for each in places
        ):
            raise RefusedError(
                NOT_FOUND, f"there is no such sample in group {number}: this run has given out none"
            )
        if number not in self._groups and number not in self._ended:
            raise RefusedError(GONE, f"group {number} has ended long ago")
        return number, places

    def _found_by_hashes(self, post: Post) -> tuple[int, tuple[int, ...]]:
        """The group whose whole completions have these hashes, of equal ones the client's own: the oldest
        that waits for rewards, else one with these very rewards, else the latest."""
        same = {
            number: samples
            for number, samples in self._all_samples()
            if tuple(sample.hash for sample in samples) == post.hashes
        }
        if not same:
            raise RefusedError(
                NOT_FOUND,
                "no group of this run has just these tokens, in this order: send all `completion_tokens` as "
                "they came, or `sample_ids`",
            )
        own = {
            number: samples
            for number, samples in same.items()
            if all(sample.client == post.client for sample in samples)
        }
        candidates = own or same
        waiting = [number for number, samples in candidates.items() if all(map(_is_open, samples))]
        repeated = [
            number
            for number, samples in candidates.items()
            if all(
                each.answer is not None and each.reward == reward
                for each, reward in zip(samples, post.rewards, strict=True)
            )
        ]
        number = waiting[0] if waiting else (repeated or [*candidates])[-1]
        return number, tuple(range(len(post.hashes)))

    def _all_samples(self) -> Iterator[tuple[int, Sequence[Sample]]]:
        yield from ((number, each.samples) for number, each in self._ended.items())
        yield from ((number, each.samples) for number, each in self._groups.items())

    def _is_new(self, number: int, place: int, reward: float | None, hash_: str, client: str) -> bool:
        """Whether a sample has to be given this reward; False where it has it.

        Raises:
            RefusedError: it cannot.
        """
        sample, name = self._sample(number, place), f"sample {place} of group {number}"
        if sample.client is None:
            raise RefusedError(CONFLICT, f"{name} was handed out to nobody")
        if sample.client != client:
            raise RefusedError(CONFLICT, f"{name} is leased to another client")
        if sample.hash != hash_:
            raise RefusedError(
                CONFLICT, f"{name} has other tokens: the reward is for a completion that was not given out"
            )
        if sample.status == "lapsed":
            raise RefusedError(
                GONE,
                f"{name} was given back: no reward came within its lease of {self.settings.lease_s:g} s",
            )
        if sample.status != "open" and sample.reward != reward:
            raise RefusedError(
                CONFLICT,
                f"{name} was rewarded with {sample.reward} before, now with {reward}: the first stays",
            )
        return sample.status == "open"


_COUNTS = (
    *(
        "groups_sampled",
        "groups_learned",
        "groups_without_rewards",
        "groups_too_old",
        "groups_behind_the_end",
    ),
    *("samples_rewarded", "samples_failed", "samples_lapsed", "requests_served", "posts_accepted"),
)
_APPLIERS: dict[str, Callable[[Ledger, Event], None]] = {
    "settings": Ledger._apply_settings,
    "issue": Ledger._apply_issue,
    "lease": Ledger._apply_lease,
    "reward": Ledger._apply_reward,
    "lapse": Ledger._apply_lapse,
}
_FORGOTTEN = Completion("", (), (), "length")


def _is_open(sample: Sample) -> bool:
    return sample.status == "open"


def _has_lapsed(sample: Sample, now: float) -> bool:
    return _is_open(sample) and sample.lease_until <= now


def _request_key(client: str, request: str) -> str:
    return f"{len(client)}:{client}/{request}"


def _weight_of_answer(answer: Answer) -> tuple[bool, int]:
    """Of several answers that samples of one post got one by one, the last."""
    return answer.outcome != "waiting", answer.version
