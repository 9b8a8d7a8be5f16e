from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from conch.service.leases.ledger import _REMEMBERED, Event, Ledger
from conch.service.leases.records import Answer, Asker, Handout, LedgerSettings, Post
from conch.service.protocol import token_hash
from conch.service.refusals import RefusedError
from conch.types import Completion, Prompt

PROMPT = Prompt("p", (7, 8))


def new_ledger(events: list[Event] | None = None, **settings: Any) -> Ledger:
    """Groups of 3, two of which make an update; leases of 100 s."""
    values = {
        "group_size": 3,
        "groups_per_step": 2,
        "total_steps": 10,
        "lease_s": 100.0,
        "max_staleness": 2,
        "max_groups": 8,
        **settings,
    }
    return Ledger(LedgerSettings(**values), (lambda event: None) if events is None else events.append)


def completions(first: int, count: int = 3) -> list[Completion]:
    return [Completion(f"c{first + i}", (first + i, 1), (-0.5, -0.25), "eos") for i in range(count)]


def asker(client: str = "a", request: str = "", count: int = 3, digest: str = "d") -> Asker:
    return Asker(client, request, digest, count)


def issue(
    ledger: Ledger,
    *,
    version: int | None = None,
    now: float = 0.0,
    key: str = "",
    first: int | None = None,
    **who: Any,
) -> Handout:
    """A group that was handed out to client `a`; its tokens are its own unless `first` says which."""
    first = 100 + 10 * ledger.next_number if first is None else first
    version = ledger.step if version is None else version
    [handout] = ledger.issue(PROMPT, completions(first), version, key, [asker(**who)], now)
    assert isinstance(handout, Handout)
    return handout


def post(
    handout: Handout, *rewards: float | None, client: str = "a", places: Sequence[int] | None = None
) -> Post:
    places = handout.places if places is None else places
    hashes = tuple(handout.group.samples[place].hash for place in places)
    return Post(client, tuple((handout.group.number, place) for place in places), hashes, rewards)


def test_group_is_learned_from_when_all_its_rewards_are_there() -> None:
    ledger = new_ledger(groups_per_step=1)
    handout = issue(ledger)
    assert ledger.next_groups() is None
    assert ledger.reward(post(handout, 1.0, 2.0, places=[0, 2]), 1.0) == Answer("waiting", 0)
    assert ledger.next_groups() is None
    assert ledger.reward(post(handout, 3.0, places=[1]), 2.0) == Answer("whole", 1)
    [group] = ledger.next_groups() or []
    assert [sample.reward for sample in group.samples] == [1.0, 3.0, 2.0]
    ledger.learned()
    assert (ledger.step, ledger.next_groups(), ledger.under_way) == (1, None, 0)


def test_groups_are_learned_from_in_the_order_in_which_they_became_whole() -> None:
    ledger = new_ledger()
    handouts = [issue(ledger) for _ in range(4)]
    answers = [ledger.reward(post(handouts[index], 1.0, 2.0, 3.0), 1.0) for index in (2, 0, 3, 1)]
    assert [answer.version for answer in answers] == [1, 1, 2, 2]
    assert [group.number for group in ledger.next_groups() or []] == [2, 0]
    ledger.learned()
    assert [group.number for group in ledger.next_groups() or []] == [3, 1]


def test_rollouts_of_a_group_are_what_was_sampled() -> None:
    handout = issue(new_ledger(), version=0, first=50)
    first = handout.group.rollouts[0]
    assert (first.prompt, first.policy_version) == (PROMPT, 0)
    assert first.completion == Completion("c50", (50, 1), (-0.5, -0.25), "eos")
    assert handout.group.samples[0].hash == token_hash([7, 8, 50, 1])


@pytest.mark.parametrize("again", ["before", "after"])
def test_post_that_is_repeated_is_learned_from_once_and_gets_the_same_answer(again: str) -> None:
    events: list[Event] = []
    ledger = new_ledger(events, groups_per_step=1)
    handout = issue(ledger)
    part, rest = post(handout, 1.0, places=[0]), post(handout, 2.0, None, places=[1, 2])
    answers = [ledger.reward(part, 1.0), ledger.reward(rest, 2.0)]
    if again == "after":
        ledger.learned()
    before, number = ledger.state_dict(), len(events)
    assert [ledger.reward(part, 3.0), ledger.reward(rest, 4.0)] == answers
    assert len(events) == number
    assert ledger.state_dict() == before
    assert ledger.counts["posts_accepted"] == 2


def test_post_with_another_number_for_a_rewarded_sample_is_refused() -> None:
    ledger = new_ledger()
    handout = issue(ledger)
    ledger.reward(post(handout, 1.0, places=[0]), 1.0)
    with pytest.raises(
        RefusedError, match=r"sample 0 of group 0 was rewarded with 1\.0 before, now with 1\.5"
    ):
        ledger.reward(post(handout, 1.5, 2.0, 3.0), 1.0)
    assert [sample.reward for sample in handout.group.samples] == [1.0, None, None]


@pytest.mark.parametrize(
    ("rewards", "reason"),
    [
        ((1.0, 2.0), "there are 2 rewards for 3 completions"),
        ((1.0, 2.0, 3.0, 4.0), "there are 4 rewards for 3 completions"),
        ((), "there are 0 rewards for 3 completions"),
        ((1.0, float("nan"), 3.0), "reward 1 is nan, which is no number"),
        ((1.0, 2.0, float("-inf")), "reward 2 is -inf"),
        ((1.0, 2.0, -1.1e9), "reward 2 is -1.1e\\+09, whose square is too large"),
    ],
)
def test_rewards_that_fit_no_samples_are_refused_in_words(rewards: tuple[float, ...], reason: str) -> None:
    ledger = new_ledger()
    handout = issue(ledger)
    before = ledger.state_dict()
    with pytest.raises(RefusedError, match=reason):
        ledger.reward(post(handout, *rewards), 0.0)
    assert ledger.state_dict() == before


def test_post_for_nothing_is_refused() -> None:
    with pytest.raises(RefusedError, match="there are no rewards"):
        new_ledger().reward(Post("a", (), (), ()), 0.0)


def test_reward_for_other_tokens_is_refused() -> None:
    ledger = new_ledger()
    handout = issue(ledger)
    wrong = Post("a", ((0, 0),), (token_hash([7, 8, 9]),), (1.0,))
    with pytest.raises(RefusedError, match="sample 0 of group 0 has other tokens"):
        ledger.reward(wrong, 0.0)
    assert handout.group.samples[0].status == "open"


def test_reward_of_another_client_is_refused() -> None:
    ledger = new_ledger()
    handout = issue(ledger)
    with pytest.raises(RefusedError, match="sample 0 of group 0 is leased to another client") as refused:
        ledger.reward(post(handout, 1.0, 2.0, 3.0, client="b"), 0.0)
    assert refused.value.status == 409


@pytest.mark.parametrize(
    ("samples", "status", "reason"),
    [
        (((5, 0),), 404, "no such sample in group 5"),
        (((-1, 0),), 404, "no such sample in group -1"),
        (((0, 3),), 404, "no such sample in group 0"),
        (((0, 0), (1, 0)), 422, "of several groups"),
        (((0, 0), (0, 0)), 422, "named twice"),
        (((0, 0), (0, 1), (0, 2)), 422, "3 sample ids for"),
    ],
)
def test_samples_that_are_not_those_of_one_group_are_refused(
    samples: tuple[tuple[int, int], ...], status: int, reason: str
) -> None:
    ledger = new_ledger()
    issue(ledger), issue(ledger)
    count = min(2, len(samples))
    with pytest.raises(RefusedError, match=reason) as refused:
        ledger.reward(Post("a", samples, ("h",) * count, (1.0,) * count), 0.0)
    assert refused.value.status == status


def test_lease_that_ends_gives_its_samples_back() -> None:
    ledger = new_ledger(groups_per_step=1)
    handout = issue(ledger, now=5.0)
    ledger.reward(post(handout, 1.0, 2.0, places=[0, 1]), 6.0)
    assert ledger.next_lapse() == 105.0
    assert ledger.expire(104.9) == 0
    assert ledger.expire(105.0) == 1
    assert ledger.counts["samples_lapsed"] == 1
    [group] = ledger.next_groups() or []
    assert [sample.status for sample in group.samples] == ["rewarded", "rewarded", "lapsed"]
    with pytest.raises(RefusedError, match=r"was given back: no reward came within its lease of 100 s"):
        ledger.reward(post(handout, 3.0, places=[2]), 106.0)


def test_reward_that_comes_too_late_is_refused_though_nobody_looked_meanwhile() -> None:
    ledger = new_ledger()
    handout = issue(ledger)
    with pytest.raises(RefusedError, match="was given back"):
        ledger.reward(post(handout, 1.0, 2.0, 3.0), 100.0)
    assert ledger.counts["groups_without_rewards"] == 1
    assert ledger.under_way == 0


@pytest.mark.parametrize("rewards", [(1.0, None, None), (None, None, None)])
def test_group_with_too_few_rewards_is_dropped_and_says_so_again(rewards: tuple[float | None, ...]) -> None:
    ledger = new_ledger()
    handout = issue(ledger)
    answer = ledger.reward(post(handout, *rewards), 0.0)
    number = sum(reward is not None for reward in rewards)
    assert answer == Answer("dropped", 0, f"{number} of its 3 completions got a reward, 2 are needed")
    assert ledger.reward(post(handout, *rewards), 50.0) == answer
    assert (ledger.under_way, ledger.counts["groups_without_rewards"]) == (0, 1)


def test_group_that_is_too_old_for_its_update_is_dropped() -> None:
    ledger = new_ledger(groups_per_step=1, max_staleness=1)
    old, older, just_young_enough = (issue(ledger) for _ in range(3))
    assert ledger.reward(post(issue(ledger, version=2), 1.0, 2.0, 3.0), 0.0).outcome == "whole"
    assert ledger.reward(post(just_young_enough, 1.0, 2.0, 3.0), 0.0) == Answer("whole", 2)
    answer = ledger.reward(post(old, 1.0, 2.0, 3.0), 0.0)
    assert answer.outcome == "dropped" and "version 0 sampled it, and version 2 would learn" in answer.detail
    assert ledger.reward(post(older, 1.0, None, None), 0.0).outcome == "dropped"
    assert (ledger.counts["groups_too_old"], ledger.counts["groups_without_rewards"]) == (1, 1)


def test_group_behind_the_last_update_is_dropped() -> None:
    ledger = new_ledger(groups_per_step=1, total_steps=1)
    first, second = issue(ledger), issue(ledger)
    assert ledger.reward(post(first, 1.0, 2.0, 3.0), 0.0) == Answer("whole", 1)
    answer = ledger.reward(post(second, 1.0, 2.0, 3.0), 0.0)
    assert answer == Answer("dropped", 0, "the run's last update, number 1, has its groups already")


def test_several_clients_complete_a_group() -> None:
    ledger = new_ledger(groups_per_step=1)
    first = issue(ledger, key="shared", client="a", count=1)
    assert ledger.shared("shared")
    second = ledger.hand_out_shared("shared", asker(client="b", count=2), 1.0)
    assert (first.places, second.places) == ((0,), (1, 2))
    with pytest.raises(RefusedError, match="has 0 of 3 completions that nobody has, not 1"):
        ledger.hand_out_shared("shared", asker(client="c", count=1), 1.0)
    assert ledger.reward(post(second, 1.0, 2.0, client="b"), 2.0).outcome == "waiting"
    assert ledger.reward(post(first, 3.0), 2.0) == Answer("whole", 1)
    ledger.learned()
    assert not ledger.shared("shared")


def test_sample_that_nobody_has_cannot_be_rewarded_and_lapses() -> None:
    ledger = new_ledger(groups_per_step=1)
    first = issue(ledger, key="shared", client="", count=2)
    with pytest.raises(RefusedError, match="sample 2 of group 0 was handed out to nobody"):
        ledger.reward(post(first, 1.0, client="", places=[2]), 0.0)
    ledger.reward(post(first, 1.0, 2.0, client=""), 0.0)
    assert ledger.expire(100.0) == 1
    assert ledger.next_groups() is not None


def test_sample_that_has_lapsed_is_handed_out_to_nobody() -> None:
    ledger = new_ledger()
    issue(ledger, key="shared", count=1)
    ledger.hand_out_shared("shared", asker(client="b", count=1), 50.0)
    assert ledger.expire(100.0) == 2  # that of the first, and the one that nobody came for
    with pytest.raises(RefusedError, match="has 0 of 3 completions that nobody has"):
        ledger.hand_out_shared("shared", asker(client="c", count=1), 120.0)


def test_group_and_its_leases_are_one_event() -> None:
    events: list[Event] = []
    ledger = new_ledger(events)
    parts = ledger.issue(PROMPT, completions(10), 0, "k", [asker(count=2), asker("b", count=2)], 1.0)
    assert isinstance(parts[0], Handout) and parts[0].places == (0, 1)
    assert isinstance(parts[1], RefusedError) and "has 1 of 3 completions" in str(parts[1])
    assert [event["do"] for event in events] == ["issue"]


def test_settings_are_gone_by_from_where_they_changed() -> None:
    events: list[Event] = []
    ledger = new_ledger(events, groups_per_step=1, total_steps=1)
    ledger.go_by(ledger.settings, 0.0)
    first, second = issue(ledger), issue(ledger)
    answers = [ledger.reward(post(each, 1.0, 2.0, 3.0), 1.0) for each in (first, second)]
    assert [answer.outcome for answer in answers] == ["whole", "dropped"]
    longer = replace(ledger.settings, total_steps=5)
    ledger.go_by(longer, 2.0)
    ledger.go_by(longer, 3.0)
    assert [event["do"] for event in events].count("settings") == 2
    third = issue(ledger, now=4.0)
    assert ledger.reward(post(third, 1.0, 2.0, 3.0), 5.0) == Answer("whole", 2)
    # Told again, with the last settings from the start: what was settled by the first ones stays.
    again = new_ledger(groups_per_step=1, total_steps=5)
    again.replay(as_json(events))
    assert again.state_dict() == ledger.state_dict()
    assert [again.reward(post(each, 1.0, 2.0, 3.0), 6.0) for each in (first, second)] == answers


def test_names_of_clients_and_requests_are_kept_apart() -> None:
    ledger = new_ledger()
    issue(ledger, client="a/b", request="c")
    assert ledger.repeated(asker(client="a", request="b/c")) is None


def test_request_that_is_repeated_gets_the_same_samples() -> None:
    ledger = new_ledger()
    handout = issue(ledger, request="r1")
    again = ledger.repeated(asker(request="r1"))
    assert again is not None and (again.group, again.places) == (handout.group, handout.places)
    assert ledger.repeated(asker(request="r2")) is None
    assert ledger.repeated(asker(client="b", request="r1")) is None
    assert ledger.repeated(asker(request="")) is None
    with pytest.raises(RefusedError, match="was used before, to ask for something else"):
        ledger.repeated(asker(request="r1", digest="other"))
    ledger.reward(post(handout, None, None, None), 0.0)
    with pytest.raises(RefusedError, match="were rewarded, or have lapsed"):
        ledger.repeated(asker(request="r1"))


def test_prompts_beyond_the_bound_are_told_to_come_again() -> None:
    ledger = new_ledger(max_groups=3)
    issue(ledger)
    ledger.admit(1, waiting=1)
    with pytest.raises(
        RefusedError, match=r"2 groups are under way, 2 more would be above `max_groups` = 3"
    ) as no:
        ledger.admit(2, waiting=1)
    assert (no.value.status, no.value.retry_after_s) == (429, 1.0)


def hashes_of(handout: Handout) -> tuple[str, ...]:
    return tuple(sample.hash for sample in handout.group.samples)


def test_post_without_ids_is_found_by_its_tokens() -> None:
    ledger = new_ledger(groups_per_step=1)
    issue(ledger, client="", first=10)
    second = issue(ledger, client="", first=20)
    answer = ledger.reward(Post("", None, hashes_of(second), (1.0, 2.0, 3.0)), 0.0)
    assert answer == Answer("whole", 1)
    assert [group.number for group in ledger.next_groups() or []] == [1]
    assert ledger.reward(Post("", None, hashes_of(second), (1.0, 2.0, 3.0)), 1.0) == answer
    ledger.learned()
    assert ledger.reward(Post("", None, hashes_of(second), (1.0, 2.0, 3.0)), 2.0) == answer
    with pytest.raises(RefusedError, match="was rewarded with"):
        ledger.reward(Post("", None, hashes_of(second), (1.0, 2.0, 4.0)), 2.0)


def test_post_without_ids_that_is_repeated_takes_no_more_than_equal_groups_have() -> None:
    ledger = new_ledger(groups_per_step=1)
    first, second = (issue(ledger, client="", first=10) for _ in range(2))
    same = Post("", None, hashes_of(first), (1.0, 2.0, 3.0))
    answers = [ledger.reward(same, 0.0) for _ in range(4)]
    # Which of two equal groups a post is for nobody can tell, nor does it matter where rewards are equal.
    assert answers == [Answer("whole", 1), Answer("whole", 2), Answer("whole", 2), Answer("whole", 2)]
    assert ledger.counts["posts_accepted"] == 2
    with pytest.raises(RefusedError, match="was rewarded with"):
        ledger.reward(Post("", None, hashes_of(second), (4.0, 5.0, 6.0)), 0.0)


def test_equal_groups_without_ids_are_rewarded_one_after_the_other() -> None:
    ledger = new_ledger(groups_per_step=1)
    first, second = (issue(ledger, client="", first=10) for _ in range(2))
    for rewards in ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0)):
        ledger.reward(Post("", None, hashes_of(first), rewards), 0.0)
    assert [sample.reward for sample in first.group.samples] == [1.0, 2.0, 3.0]
    assert [sample.reward for sample in second.group.samples] == [4.0, 5.0, 6.0]


def test_post_without_ids_is_for_the_clients_own_group() -> None:
    ledger = new_ledger(groups_per_step=1)
    theirs, ours = (issue(ledger, client=client, first=10) for client in ("b", "a"))
    assert ledger.reward(Post("a", None, hashes_of(theirs), (1.0, 2.0, 3.0)), 0.0) == Answer("whole", 1)
    assert [sample.reward for sample in ours.group.samples] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("change", ["fewer", "other order", "other tokens"])
def test_post_without_ids_for_other_tokens_is_refused(change: str) -> None:
    ledger = new_ledger()
    one, two, three = hashes_of(issue(ledger, client="", first=10))
    hashes = {"fewer": (one, two), "other order": (two, one, three), "other tokens": (one, two, "x")}[change]
    with pytest.raises(RefusedError, match="no group of this run has just these tokens"):
        ledger.reward(Post("", None, hashes, (1.0,) * len(hashes)), 0.0)


def test_memory_of_ended_groups_is_bounded() -> None:
    ledger = new_ledger(groups_per_step=1, total_steps=10**6, max_staleness=10**6)
    number = _REMEMBERED + 100
    first = issue(ledger, request="r0")
    ledger.reward(post(first, 1.0, 2.0, 3.0), 0.0)
    ledger.learned()
    sizes: list[int] = []
    for index in range(1, number):
        handout = issue(ledger, request=f"r{index}")
        ledger.reward(post(handout, 1.0, 2.0, 3.0), 0.0)
        ledger.learned()
        if index in (_REMEMBERED, number - 1):
            sizes.append(sum(map(len, (ledger._groups, ledger._ended, ledger._requests, ledger._places))))
    assert sizes == [2 * _REMEMBERED] * 2
    with pytest.raises(RefusedError, match="group 0 has ended long ago"):
        ledger.reward(post(first, 1.0, 2.0, 3.0), 0.0)


def test_event_that_cannot_be_written_has_not_happened() -> None:
    ledger = new_ledger()
    handout = issue(ledger)
    before = ledger.state_dict()

    def fail(event: Event) -> None:
        raise OSError("disk full")

    ledger._on_event = fail
    with pytest.raises(OSError):
        ledger.reward(post(handout, 1.0, 2.0, 3.0), 1.0)
    assert ledger.state_dict() == before


def as_json(state: Any) -> Any:
    return json.loads(json.dumps(state))


def walk(ledger: Ledger, chance: random.Random, number: int) -> None:
    """A random life: some clients are late, some have no reward, some repeat themselves."""
    out: list[tuple[Handout, str]] = []
    now = ledger.clock
    for _ in range(number):
        now += chance.choice([0.0, 1.0, 30.0])
        if ledger.under_way < 6:
            client = chance.choice(["", "a", "b"])
            request = chance.choice(["", f"r{ledger.next_number}"])
            count = chance.choice([1, 2, 3])
            handout = issue(ledger, now=now, client=client, request=request, count=count, key=f"k{now}")
            out.append((handout, client))
        if out and chance.random() < 0.7:
            handout, client = chance.choice(out)
            places = chance.sample(handout.places, chance.randint(1, len(handout.places)))
            rewards = [chance.choice([None, 0.1, 1 / 3]) for _ in places]
            try:
                ledger.reward(post(handout, *rewards, client=client, places=places), now)
            except RefusedError:
                ledger.expire(now)
        if ledger.next_groups() is not None and chance.random() < 0.8:
            ledger.learned()


@pytest.mark.parametrize("seed", range(20))
def test_ledger_is_the_same_again_from_its_state_and_what_came_after(seed: int) -> None:
    events: list[Event] = []
    settings: dict[str, Any] = {"total_steps": 1000, "max_staleness": 1000}
    ledger = new_ledger(events, **settings)
    walk(ledger, random.Random(seed), 30)
    state = as_json(ledger.state_dict())
    restored = new_ledger(**settings)
    restored.load_state_dict(state)
    assert restored.state_dict() == ledger.state_dict()

    steps = ledger.step
    walk(ledger, random.Random(seed + 100), 30)
    restored.replay(as_json(events))
    assert restored.step == steps
    for _ in range(ledger.step - steps):
        restored.learned()
    ours, theirs = restored.state_dict(), ledger.state_dict()
    # What was learned from ended later here, so the order in which ended groups stand is another.
    for each in (ours, theirs):
        each["ended"] = sorted(each["ended"])
        each["requests"] = sorted(each["requests"])
    assert ours == theirs


def test_lease_goes_on_where_the_clock_stood() -> None:
    events: list[Event] = []
    ledger = new_ledger(events)
    handout = issue(ledger, now=10.0)
    ledger.reward(post(handout, 1.0, places=[0]), 60.0)
    restored = new_ledger()
    restored.replay(as_json(events))
    assert (restored.clock, restored.next_lapse()) == (60.0, 110.0)
    assert restored.reward(post(handout, 2.0, 3.0, places=[1, 2]), 109.0) == Answer("whole", 1)
