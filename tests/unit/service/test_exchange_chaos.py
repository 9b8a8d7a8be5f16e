"""Fifty runs whose clients and service do what they should not; the trainer is a stand-in that notes what it
is told to learn from. `tests/integration/test_remote_chaos.py` does the same with processes and a network."""

from __future__ import annotations

import gc
import json
import random
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conch.service.leases.journal import Journal
from conch.service.leases.records import Answer, Asker, Handout, Post
from conch.service.protocol import TrainingSettings
from conch.service.refusals import RefusedError
from conch.service.runs.exchange import Ask, Exchange, LearnOrder, SampledGroup, SampleOrder
from conch.types import Completion, Prompt

SIZE, PER_STEP, STEPS, LEASE_S = 3, 2, 6, 100.0
_RECENT = 12
Learned = list[tuple[int, list[tuple[str, float | None]]]]


def reward_of(text: str) -> float:
    """What every client gives for a completion."""
    return random.Random(text).choice([-1.0, 0.1, 1 / 3, 5.0])


@dataclass
class Held:
    """Samples that a client has, or once had."""

    client: str
    handout: Handout

    def post(self, *, client: str | None = None) -> Post:
        """The rewards that are right, from who has them or from somebody else."""
        group, places = self.handout.group, self.handout.places
        return Post(
            self.client if client is None else client,
            tuple((group.number, place) for place in places),
            tuple(group.samples[place].hash for place in places),
            tuple(reward_of(group.samples[place].completion.text) for place in places),
        )


class World:
    """A run, its service, which can be killed, and its trainer. learned: groups by the version they made."""

    def __init__(self, folder: Path, seed: int, steps: int = STEPS, size: int = SIZE) -> None:
        self.chance = random.Random(seed)
        self.steps = steps
        self._size = size
        self.now = 0.0
        self.learned: dict[int, Learned] = {}
        self.told: list[tuple[Post, Answer]] = []
        self._folder = folder
        self._snapshots: list[str] = []
        self._start()

    def _start(self) -> None:
        settings = TrainingSettings(
            model_id="m",
            num_completions_per_prompt=self._size,
            training_batch_size=PER_STEP,
            max_steps=self.steps,
            logging_steps=100,  # of events a thousand are kept, which would fill up meanwhile
            lease_s=LEASE_S,
            max_staleness=self.steps,
            max_groups=12,
        )
        self.journal = Journal(self._folder)
        self.exchange = Exchange("run", settings, self.journal, idle_s=1e9, clock=lambda: self.now)
        self.exchange.open(json.loads(self._snapshots[-1]) if self._snapshots else None)

    def kill(self) -> None:
        """End the service between two writes, or within one, and start it again on what is on disk."""
        self.journal.close()
        if self.chance.random() < 0.5 and (segments := list(self._folder.glob("from_*"))):
            newest = max(segments, key=lambda path: int(path.stem.removeprefix("from_")))
            with newest.open("ab") as file:
                file.write(b'{"n":999,"do":"rew')
        self.now += self.chance.choice([0.0, 1e6])
        self._start()

    def checkpoint(self) -> None:
        """Save the ledger as a trainer does, of which the latest two are kept."""
        self._snapshots = [*self._snapshots[-1:], json.dumps(self.exchange.capture())]
        self.journal.forget(json.loads(self._snapshots[0])["sequence"] + 1)

    def work(self) -> None:
        """Have the trainer do all there is to do."""
        while self.exchange.version < self.steps:
            if self.exchange._ledger.next_groups() is None and not self.exchange._asks:
                return
            order = self.exchange.next_order()
            if isinstance(order, SampleOrder):
                first = self.exchange.next_number
                groups = [self._sampled(first + index) for index in range(len(order.asks))]
                self.exchange.deliver([*zip(order.asks, groups, strict=True)])
            else:
                assert isinstance(order, LearnOrder)
                self._learn(order)

    def _sampled(self, number: int) -> SampledGroup:
        completions = [
            Completion(f"{number}.{i}", (number, i), (-1.0, -1.0), "eos") for i in range(self._size)
        ]
        return SampledGroup(Prompt("p", (7,)), completions, self.exchange.version)

    def _learn(self, order: LearnOrder) -> None:
        groups = [
            (group.number, [(sample.status, sample.reward) for sample in group.samples])
            for group in order.groups
        ]
        version = self.exchange.version + 1
        # An update that was lost with the service is made again from the same.
        assert self.learned.setdefault(version, groups) == groups
        self.exchange.learned({})

    def ask(self, client: str, request: str) -> Future[Handout]:
        return self.exchange.ask(Ask("p", Asker(client, request, "d", self._size)))

    def reward(self, post: Post) -> Answer:
        answer = self.exchange.reward(post)
        self.told.append((post, answer))
        return answer

    def refused(self, post: Post, *reasons: str) -> None:
        """A post that must be refused in words, and change nothing."""
        before = self.exchange._ledger.state_dict()
        with pytest.raises(RefusedError) as refusal:
            self.exchange.reward(post)
        assert any(reason in str(refusal.value) for reason in reasons), refusal.value
        after = self.exchange._ledger.state_dict()
        # What has lapsed may be noted on this occasion.
        lapses = after["counts"]["samples_lapsed"] - before["counts"]["samples_lapsed"]
        assert lapses or before == after

    def misbehave(self, held: Held) -> None:
        """Send what fits nothing."""
        right = held.post()
        kind = self.chance.randrange(4)
        if kind == 0:
            few = Post(right.client, right.samples, right.hashes, right.rewards[:-1])
            self.refused(few, "rewards for 3 completions")
        elif kind == 1:
            bad = Post(right.client, right.samples, right.hashes, (float("nan"), *right.rewards[1:]))
            self.refused(bad, "reward 0 is nan")
        elif kind == 2:
            other = Post(right.client, right.samples, ("x", *right.hashes[1:]), right.rewards)
            self.refused(other, "has other tokens", "has ended long ago")
        else:
            self.refused(held.post(client="thief"), "is leased to another client", "has ended long ago")

    def check_end(self) -> None:
        """What must hold of every run that has made its last update."""
        assert self.exchange.version == self.steps and [*self.learned] == [*range(1, self.steps + 1)]
        numbers = [number for groups in self.learned.values() for number, _ in groups]
        assert len(numbers) == len({*numbers}) == PER_STEP * self.steps == self.counts["groups_learned"]
        for groups in self.learned.values():
            for number, samples in groups:
                given = [
                    None if reward is None else reward_of(f"{number}.{i}")
                    for i, (_, reward) in enumerate(samples)
                ]
                assert [reward for _, reward in samples] == given
        for post, answer in self.told:
            assert self.exchange.reward(post) == answer
        self.exchange.close("finished", "done")

    @property
    def counts(self) -> dict[str, int]:
        return self.exchange.counts()


def run_in_order(world: World, disturb: Any) -> dict[int, Learned]:
    """One client that asks for an update's groups, rewards them, and asks again.

    disturb: called with what it holds wherever something may go wrong.
    """
    number = 0
    while world.exchange.version < world.steps:
        requests = [f"r{number + index}" for index in range(PER_STEP)]
        number += PER_STEP
        disturb(None)
        futures = [world.ask("a", request) for request in requests]
        disturb(None)  # a service that dies here has forgotten the requests, and is asked again
        futures = [world.ask("a", request) for request in requests]
        world.work()
        disturb(None)  # or the answer is lost
        held = [Held("a", world.ask("a", request).result(0)) for request in requests]
        assert [each.handout.group.number for each in held] == [
            future.result(0).group.number for future in futures if future.done()
        ] or not all(future.done() for future in futures)
        for each in held:
            disturb(each)
            world.reward(each.post())
            disturb(each)
            world.reward(each.post())
        world.work()
    world.check_end()
    return world.learned


@pytest.mark.parametrize("seed", range(25))
def test_run_that_is_disturbed_in_order_learns_what_the_undisturbed_one_learns(
    tmp_path: Path, seed: int
) -> None:
    expected = run_in_order(World(tmp_path / "quiet", 0), lambda held: None)
    world = World(tmp_path / "loud", seed)

    def disturb(held: Held | None) -> None:
        what = world.chance.random()
        if what < 0.15:
            world.kill()
        elif what < 0.3:
            world.checkpoint()
        elif what < 0.7 and held is not None:
            world.misbehave(held)

    assert run_in_order(world, disturb) == expected


class Crowd:
    """Clients of a world that come and go, are late, forget, and repeat themselves."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._names = ["a", "b"]
        self._asked: list[tuple[str, str, Future[Handout]]] = []
        self._held: list[Held] = []
        self._number = 0

    def act(self) -> None:
        """Do one thing or another; then the trainer does what there is to do."""
        world, chance = self._world, self._world.chance
        world.now += chance.choice([0.0, 0.0, 1.0, 20.0])
        deeds = [self._ask, self._repeat, self._reward, self._misbehave, self._die, world.kill]
        [deed] = chance.choices([*deeds, world.checkpoint], [30, 10, 20, 20, 2, 3, 5])
        deed()
        world.work()
        ready = [each for each in self._asked if each[2].done()]
        self._asked = [each for each in self._asked if not each[2].done()]
        self._held += [Held(client, future.result()) for client, _, future in ready]

    def _ask(self) -> None:
        self._number += 1
        self._send(self._world.chance.choice(self._names), f"r{self._number}")

    def _repeat(self) -> None:
        if self._asked:
            self._send(*self._world.chance.choice(self._asked)[:2])

    def _send(self, client: str, request: str) -> None:
        try:
            self._asked.append((client, request, self._world.ask(client, request)))
        except RefusedError as refusal:
            assert refusal.status in (410, 429)

    def _reward(self) -> None:
        if self._held:
            try:
                self._world.reward(self._world.chance.choice(self._held[-_RECENT:]).post())
            except RefusedError as refusal:
                assert refusal.status == 410 and "given back" in str(refusal)

    def _misbehave(self) -> None:
        if self._held:
            self._world.misbehave(self._world.chance.choice(self._held[-_RECENT:]))

    def _die(self) -> None:
        self._number += 1
        self._names[self._world.chance.randrange(2)] = f"c{self._number}"


@pytest.mark.parametrize("seed", range(25))
def test_run_whose_clients_die_and_are_late_ends_and_learns_nothing_twice(tmp_path: Path, seed: int) -> None:
    world = World(tmp_path, seed)
    crowd = Crowd(world)
    for _ in range(3000):
        if world.exchange.version == world.steps:
            break
        crowd.act()
    waiting = world.exchange.when_version(world.steps + 1)
    world.check_end()
    with pytest.raises(RefusedError, match="is finished"):  # nobody waits for what will not come
        waiting.result(0)


def test_memory_is_flat_over_a_hundred_thousand_samples(tmp_path: Path) -> None:
    size = 50
    rounds = 100_000 // (size * PER_STEP)
    world = World(tmp_path, 0, steps=rounds, size=size)
    objects: list[int] = []
    for number in range(rounds):
        for future in _asked(world, number):
            world.exchange.reward(Held("a", future.result(0)).post())
        world.work()
        world.learned.clear()
        if number % 100 == 99:
            world.checkpoint()
            gc.collect()
            objects.append(len(gc.get_objects()))
    assert world.counts["samples_rewarded"] == 100_000
    # The ledger remembers 1024 groups, and is full of them by the sixth look.
    assert max(objects[5:]) - min(objects[5:]) < 1000, objects
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 3e6


def _asked(world: World, number: int) -> list[Future[Handout]]:
    futures = [world.ask("a", f"r{number}.{index}") for index in range(PER_STEP)]
    world.work()
    return futures
