"""Groups are sampled beside training: each completion comes once, of weights that are new enough."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from conch.config import GenerationConfig, RolloutConfig
from conch.errors import ConchError, ConfigError, RolloutError, RolloutUnavailableError
from conch.rollouts.remote import stream as remote_stream
from conch.rollouts.remote.engine import RemoteEngine
from conch.rollouts.remote.pool import ServerPool
from conch.rollouts.remote.stream import GroupRequest, GroupStream
from conch.rollouts.weight_sync import adapter_tensors, checkpoint_tensors
from conch.types import Prompt, Rollout
from tests.fakes.rollout_server import FakeRolloutServer
from tests.footprint import wait_until
from tests.served_sampling import LONG_S, LORA, adapted, fake_servers, look_often_and_write_to
from tests.tiny import char_tokenizer, tiny_decoder

TOKENIZER = char_tokenizer("abcdefgh")
Start = Callable[..., FakeRolloutServer]


@pytest.fixture(autouse=True)
def _looks_often_and_writes_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look_often_and_write_to(tmp_path, monkeypatch)


@pytest.fixture
def start() -> Iterator[Start]:
    with fake_servers() as make:
        yield make


def hang(release: threading.Event) -> None:
    release.wait(LONG_S)


class Streaming:
    """A stream over fake servers, and what it has told.

    told: number and place of each completion, in order.
    rollouts: by number and place.
    """

    def __init__(
        self,
        *servers: FakeRolloutServer,
        lm: PreTrainedModel | None = None,
        deadline_s: float = LONG_S,
        sends_weights: bool = True,
        goes_on: bool = False,
    ) -> None:
        self.lm = tiny_decoder("gpt2") if lm is None else lm
        urls = ",".join(server.address for server in servers)
        config = RolloutConfig(urls=urls, weights="files", deadline_s=LONG_S)
        self.pool = ServerPool(config, lambda: self.lm, source="run", sends_weights=sends_weights)
        self.pool.check()
        self.told: list[tuple[int, int]] = []
        self.rollouts: dict[tuple[int, int], Rollout] = {}
        self.failures: list[ConchError] = []
        self.generation = GenerationConfig(max_new_tokens=4)
        self.stream = GroupStream(
            self.pool,
            self.generation,
            int(TOKENIZER.eos_token_id),  # pyright: ignore[reportArgumentType]
            deadline_s=deadline_s,
            goes_on=goes_on,
            on_completion=self._take,
            on_failure=self.failures.append,
        )

    def _take(self, number: int, place: int, rollout: Rollout) -> None:
        self.told.append((number, place))
        self.rollouts[number, place] = rollout

    def wait_for(self, count: int) -> None:
        """Until so many completions have come."""
        wait_until(
            lambda: len(self.told) >= count or bool(self.failures),
            lambda: f"{len(self.told)} of {count} have come: {self.stream.describe()}",
            LONG_S,
        )
        assert not self.failures, self.failures

    def wait_for_failure(self) -> ConchError:
        wait_until(lambda: bool(self.failures), lambda: "it has not failed", LONG_S)
        assert len(self.failures) == 1
        return self.failures[0]

    def close(self) -> None:
        self.stream.close()
        self.pool.close()


def groups(numbers: Sequence[int], size: int = 4, version: int = 0) -> list[GroupRequest]:
    """Of different prompts, with seeds that tell group and place."""
    return [
        GroupRequest(
            number,
            Prompt("p", (number // 8, number % 8)),
            tuple(number * 10 + place for place in range(size)),
            version,
        )
        for number in numbers
    ]


def assert_each_came_once(streaming: Streaming, requests: Sequence[GroupRequest]) -> None:
    """Each with its prompt, and of its own seed."""
    expected = {
        (request.number, place): (request.prompt, (*request.prompt.token_ids, seed))
        for request in requests
        for place, seed in enumerate(request.seeds)
    }
    assert sorted(streaming.told) == sorted(expected)
    for key, (prompt, token_ids) in expected.items():
        rollout = streaming.rollouts[key]
        assert rollout.prompt is prompt and rollout.completion.token_ids == token_ids


# ------------------------------------------------------------------------------------------ who is asked what


def test_each_server_is_asked_once_for_an_even_block_of_groups_in_a_row(start: Start) -> None:
    servers = start(), start(), start()
    with closing(Streaming(*servers)) as streaming:
        streaming.stream.hand_over(0)
        requests = groups(range(7))
        streaming.stream.submit(requests)
        streaming.wait_for(28)
        assert_each_came_once(streaming, requests)
    asked = [[tuple(prompt["token_ids"]) for prompt in server.requests[0]["prompts"]] for server in servers]
    assert all(len(server.requests) == 1 for server in servers)
    assert [ids for block in asked for ids in block] == [request.prompt.token_ids for request in requests]
    assert sorted(len(block) for block in asked) == [2, 2, 3]
    body = servers[0].requests[0]
    assert body["or_later"] is True and body["weights"] == {"source": "run", "version": 0}
    assert body["prompts"][0]["seeds"] == [0, 1, 2, 3]


def test_groups_of_different_lowest_versions_are_different_requests(start: Start) -> None:
    server = start()
    with closing(Streaming(server)) as streaming:
        streaming.stream.hand_over(2)
        requests = [*groups([0, 1], version=1), *groups([2], version=2)]
        streaming.stream.submit(requests)
        streaming.wait_for(12)
        assert_each_came_once(streaming, requests)
        assert {rollout.policy_version for rollout in streaming.rollouts.values()} == {2}
    assert [body["weights"]["version"] for body in server.requests] == [1, 2]


def test_older_groups_are_asked_for_first_and_a_busy_server_gets_no_more(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_stream, "_ORDER_S", 0.3)
    slow, quick = start(max_num_seqs=4), start(max_num_seqs=4)
    release = threading.Event()
    slow.before_line = lambda _number: hang(release)
    quick.before_line = lambda _number: wait_until(
        lambda: len(slow.requests) == 2, lambda: "it was not asked"
    )
    with closing(Streaming(slow, quick)) as streaming:
        streaming.stream.hand_over(0)
        requests = groups(range(12))
        for first in range(0, 12, 2):
            streaming.stream.submit(requests[first : first + 2])
        streaming.wait_for(40)
        release.set()
        streaming.wait_for(48)
        assert_each_came_once(streaming, requests)
    # One that is sampled, and one that is ready to follow.
    assert len(slow.requests) == 2 and len(quick.requests) == 10
    for server in (slow, quick):
        first_seeds = [body["prompts"][0]["seeds"][0] for body in server.requests]
        assert first_seeds == sorted(first_seeds)


def test_groups_wait_for_weights_that_no_server_holds_yet(start: Start) -> None:
    server = start()
    with closing(Streaming(server)) as streaming:
        streaming.stream.hand_over(0)
        requests = groups([0], version=1)
        streaming.stream.submit(requests)
        time.sleep(0.1)
        assert not streaming.told
        streaming.stream.hand_over(1)
        streaming.wait_for(4)
        assert {rollout.policy_version for rollout in streaming.rollouts.values()} == {1}


def test_prompt_that_is_too_long_is_refused_by_name(start: Start) -> None:
    with closing(Streaming(start(max_model_len=8))) as streaming:
        long = GroupRequest(0, Prompt("p", (1, 2, 3, 4, 5)), (1,), 0)
        with pytest.raises(ConfigError, match="a prompt of 5 tokens"):
            streaming.stream.submit([long])


# -------------------------------------------------------------------------------------------------- failures


def test_what_a_dead_server_owes_comes_from_another_by_the_same_seeds(start: Start) -> None:
    dying, living = start(), start()

    def die(number: int) -> None:
        if number == 6:
            threading.Thread(target=dying.stop).start()
        if number >= 6:
            raise ConnectionAbortedError

    dying.before_line = die
    with closing(Streaming(dying, living)) as streaming:
        streaming.stream.hand_over(0)
        requests = groups(range(8))
        streaming.stream.submit(requests)
        streaming.wait_for(32)
        assert_each_came_once(streaming, requests)
    assert living.lines == 27


def test_completion_that_comes_twice_counts_once(start: Start) -> None:
    server = start()
    lines_for = server.lines_for
    server.lines_for = lambda body: [line for each in lines_for(body) for line in (each, each)]  # pyright: ignore[reportAttributeAccessIssue]
    with closing(Streaming(server)) as streaming:
        streaming.stream.hand_over(0)
        requests = groups(range(3))
        streaming.stream.submit(requests)
        streaming.wait_for(12)
        wait_until(lambda: server.lines == 24, lambda: "it does not send all twice")
        assert_each_came_once(streaming, requests)


def test_completion_of_an_older_version_is_refused(start: Start) -> None:
    server = start()
    server.says_version = 2
    with closing(Streaming(server)) as streaming:
        streaming.stream.hand_over(3)
        streaming.stream.submit(groups([0], version=3))
        error = streaming.wait_for_failure()
    assert isinstance(error, RolloutError)
    assert f"{server.address} answered with version 2 of the policy, 3 or a later one was asked" in str(error)
    assert not streaming.told


@pytest.mark.parametrize(
    ("runs", "is_right"), [([[0, 1], [2, 2]], True), ([[0, 1], [2, 1]], False), ([[1, 3]], False)]
)
def test_versions_of_tokens_are_told_and_must_fit(
    runs: list[list[int]], is_right: bool, start: Start
) -> None:
    server = start()
    lines_for = server.lines_for
    server.lines_for = lambda body: [{**line, "version_runs": runs} for line in lines_for(body)]  # pyright: ignore[reportAttributeAccessIssue]
    with closing(Streaming(server)) as streaming:
        streaming.stream.hand_over(0)
        streaming.stream.submit(groups([0]))
        if is_right:
            streaming.wait_for(4)
            assert streaming.rollouts[0, 0].version_runs == ((0, 1), (2, 2))
        else:
            assert "tokens that version 0 began" in str(streaming.wait_for_failure())


def test_what_can_never_be_sampled_fails_once(start: Start) -> None:
    server = start()
    server.lines_for = lambda _body: [{"prompt_index": 9, "seed_index": 0, **LINE}]  # pyright: ignore[reportAttributeAccessIssue]
    with closing(Streaming(server)) as streaming:
        streaming.stream.hand_over(0)
        streaming.stream.submit(groups([0]))
        assert "sent a completion that nobody asked for" in str(streaming.wait_for_failure())


LINE: dict[str, Any] = {"token_ids": [1], "logprobs": [0.0], "text": "", "finish_reason": "eos", "version": 0}


def test_weights_that_can_never_be_loaded_fail_with_the_servers_words(start: Start) -> None:
    server = start()
    server.weights_answer = (400, {"detail": "no such file on this machine"})
    with closing(Streaming(server)) as streaming:
        streaming.stream.hand_over(0)
        streaming.stream.submit(groups([0]))
        assert "refuses: no such file on this machine" in str(streaming.wait_for_failure())
        with pytest.raises(RolloutError, match="no such file"):
            streaming.stream.wait_for_weights()


def test_mistake_of_who_takes_completions_ends_the_stream(start: Start) -> None:
    with closing(Streaming(start())) as streaming:

        def fail(_number: int, _place: int, _rollout: Rollout) -> None:
            raise ValueError("full")

        streaming.stream._on_completion = fail
        streaming.stream.hand_over(0)
        streaming.stream.submit(groups([0]))
        assert "sampling beside training failed: full" in str(streaming.wait_for_failure())


def test_silence_ends_the_stream_and_says_who_is_away_and_what_is_missing(start: Start) -> None:
    silent, away = start(), start()
    release = threading.Event()
    silent.before_line = lambda number: hang(release) if number > 2 else None
    with closing(Streaming(silent, away, deadline_s=0.6)) as streaming:
        streaming.stream.hand_over(0)
        away.stop()
        time.sleep(0.8)  # nothing is to come: no reason to fail
        assert not streaming.failures
        streaming.stream.submit(groups([4, 5]))
        error = streaming.wait_for_failure()
        release.set()
    assert isinstance(error, RolloutUnavailableError)
    assert "completions of 2 of groups 4 to 5 are missing, and no server sent one for 0.6 s" in str(error)
    assert f"{silent.address} holds version 0, samples 2 of groups 4 to 5, asked for" in str(error)
    assert f"{away.address} is away" in str(error)


def test_silence_of_no_server_at_all_is_told(start: Start) -> None:
    server = start()
    with closing(Streaming(server, deadline_s=0.5)) as streaming:
        server.stop()
        streaming.stream.hand_over(0)
        streaming.stream.submit(groups([0]))
        assert f"{server.address} is away" in str(streaming.wait_for_failure())


def test_block_over_which_one_server_after_the_other_is_lost_is_given_up(start: Start) -> None:
    server = start()

    def fail(_number: int) -> None:
        raise ConnectionAbortedError

    server.before_line = fail
    with closing(Streaming(server)) as streaming:
        streaming.stream.hand_over(0)
        streaming.stream.submit(groups([0]))
        assert "10 servers in a row were lost before one completion of group 0" in str(
            streaming.wait_for_failure()
        )


def test_close_waits_for_no_completion(start: Start) -> None:
    server = start()
    release, asked = threading.Event(), threading.Event()

    def say(_number: int) -> None:
        asked.set()
        hang(release)

    server.before_line = say
    streaming = Streaming(server)
    streaming.stream.hand_over(0)
    streaming.stream.submit(groups([0]))
    assert asked.wait(LONG_S)
    start_s = time.monotonic()
    streaming.close()
    wait_until(
        lambda: not any(thread.name.startswith("stream") for thread in threading.enumerate()),
        lambda: "a thread waits on",
    )
    assert time.monotonic() - start_s < 5
    release.set()
    assert not streaming.failures and not streaming.told


# --------------------------------------------------------------------------------------------------- weights


def changed(lm: PreTrainedModel) -> None:
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(1.0)


def copied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def keep_files(server: FakeRolloutServer) -> list[dict[str, torch.Tensor]]:
    """What the server is sent, read as it comes."""
    sent: list[dict[str, torch.Tensor]] = []
    take_weights = server.take_weights

    def take(body: dict[str, Any]) -> tuple[int, Any]:
        sent.append(load_file(body["path"]))
        return take_weights(body)

    server.take_weights = take  # pyright: ignore[reportAttributeAccessIssue]
    return sent


def test_hand_over_returns_at_once_and_only_the_newest_weights_follow(start: Start) -> None:
    server = start()
    release, taking = threading.Event(), threading.Event()
    sent = keep_files(server)
    take_weights = server.take_weights

    def take(body: dict[str, Any]) -> tuple[int, Any]:
        taking.set()
        hang(release)
        return take_weights(body)

    server.take_weights = take  # pyright: ignore[reportAttributeAccessIssue]
    with closing(Streaming(server)) as streaming:
        moments = []
        for version in range(4):
            moments.append(copied(checkpoint_tensors(streaming.lm)))
            streaming.stream.hand_over(version)
            changed(streaming.lm)
            if version == 0:
                assert taking.wait(LONG_S)
        assert not server.events
        release.set()
        streaming.stream.wait_for_weights()
        assert server.events == ["weights 0", "weights 3"]
    # The file of version 0 was read late, after the policy had changed three times.
    assert_same(sent[0], moments[0])
    assert_same(sent[1], moments[3])


def test_memory_of_a_snapshot_is_used_again_but_not_while_it_is_sent(start: Start) -> None:
    server = start()
    with closing(Streaming(server)) as streaming:
        places = []
        for version in range(3):
            snapshot = streaming.pool.snapshot(version, goes_on=False)
            places.append({tensor.data_ptr() for tensor in snapshot.tensors("whole").values()})
            if version == 0:
                snapshot.end()
                continue
            with snapshot.sending():
                snapshot.end()
                other = streaming.pool.snapshot(9, goes_on=False)
                assert not places[-1] & {tensor.data_ptr() for tensor in other.tensors("whole").values()}
            other.end()
        assert places[0] == places[1]


def test_server_that_comes_back_gets_the_newest_weights_and_its_work(start: Start) -> None:
    first, second = start(), start()
    with closing(Streaming(first, second)) as streaming:
        streaming.stream.hand_over(0)
        streaming.stream.wait_for_weights()
        first.stop()
        second.stop()
        streaming.stream.hand_over(1)
        requests = groups(range(4), version=1)
        streaming.stream.submit(requests)
        again = start(first.port)
        streaming.wait_for(16)
        assert_each_came_once(streaming, requests)
    assert "weights 1" in again.events and "weights 0" not in again.events


def test_adapter_goes_alone_after_its_base_and_is_that_of_the_moment(start: Start) -> None:
    server = start(lora=LORA)
    sent = keep_files(server)
    lm = adapted()
    base = copied(checkpoint_tensors(lm, merged=False))
    with closing(Streaming(server, lm=lm)) as streaming:
        moments = []
        for version in range(2):
            moments.append(copied(adapter_tensors(lm)))
            streaming.stream.hand_over(version)
            with torch.no_grad():
                for name, parameter in lm.named_parameters():
                    if ".lora_" in name:
                        parameter.add_(1.0)
            streaming.stream.wait_for_weights()
        server.stop()
        again = start(server.port, lora=LORA)
        resent = keep_files(again)
        streaming.stream.submit(groups([0], version=1))
        streaming.wait_for(4)
    assert server.events[:3] == ["base 0", "adapter 0", "adapter 1"]
    assert again.events[:2] == ["base 1", "adapter 1"]
    for found, wanted in zip([*sent, *resent], [base, *moments, base, moments[1]], strict=True):
        assert_same(found, wanted)


def test_weights_say_whether_completions_go_on(start: Start) -> None:
    for goes_on in (False, True):
        server = start()
        bodies: list[dict[str, Any]] = []
        take_weights = server.take_weights

        def take(body: dict[str, Any], take: Any = take_weights, bodies: Any = bodies) -> tuple[int, Any]:
            bodies.append(body)
            return take(body)

        server.take_weights = take  # pyright: ignore[reportAttributeAccessIssue]
        with closing(Streaming(server, goes_on=goes_on)) as streaming:
            streaming.stream.hand_over(0)
            streaming.stream.wait_for_weights()
        assert [body["goes_on"] for body in bodies] == [goes_on]


def test_rank_that_sends_no_weights_samples_and_waits_for_those_of_the_other(start: Start) -> None:
    server = start()
    with (
        closing(Streaming(server)) as sender,
        closing(Streaming(server, sends_weights=False)) as receiver,
    ):
        for version in range(2):
            sender.stream.hand_over(version)
            receiver.stream.hand_over(version)
            receiver.stream.wait_for_weights()
            assert server.weights == {"source": "run", "version": version}
        receiver.stream.submit(groups([0], version=1))
        receiver.wait_for(4)
    assert [event for event in server.events if "weights" in event] == ["weights 0", "weights 1"]


def test_evaluation_samples_beside_the_stream(start: Start) -> None:
    server = start()
    release = threading.Event()

    def say(number: int) -> None:
        if number == 3:
            hang(release)

    server.before_line = say
    with closing(Streaming(server)) as streaming:
        streaming.stream.hand_over(5)
        requests = groups([0, 1], version=4)
        streaming.stream.submit(requests)
        streaming.wait_for(2)
        streaming.stream.wait_for_weights()
        engine = RemoteEngine(
            streaming.pool, TOKENIZER, streaming.generation, version=lambda: 5, deadline_s=LONG_S
        )
        made = [each for chunk in engine.generate([Prompt("p", (1,))] * 3) for each in chunk]
        assert len(made) == 3 and {rollout.policy_version for rollout in made} == {5}
        release.set()
        streaming.wait_for(8)
        assert_each_came_once(streaming, requests)
    assert [event for event in server.events if "weights" in event] == ["weights 5"]


# ----------------------------------------------------------------------------------------------------- words


def test_watchdog_reads_who_waits_for_what(start: Start) -> None:
    server = start(max_num_seqs=4)
    release, asked = threading.Event(), threading.Event()

    def say(_number: int) -> None:
        asked.set()
        hang(release)

    server.before_line = say
    with closing(Streaming(server)) as streaming:
        assert streaming.stream.describe() == [f"{server.address} holds no weights"]
        streaming.stream.hand_over(0)
        streaming.stream.wait_for_weights()
        for number in range(4):
            streaming.stream.submit(groups([number]))
        assert asked.wait(LONG_S)
        wait_until(lambda: "2 of groups 0 to 1" in streaming.stream.describe()[0], lambda: "not two blocks")
        words, waiting = streaming.stream.describe()
        assert words == f"{server.address} holds version 0, samples 2 of groups 0 to 1, asked for 0 s ago"
        assert waiting == "2 of groups 2 to 3 wait for a server"
        release.set()


def test_idle_share_is_what_servers_say_from_call_to_call(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_stream, "_LOOK_S", 0.05)
    server = start()
    health, clock = server.health, {"busy_s": 1.0, "clock_s": 10.0}
    server.health = lambda: {**health(), **clock}  # pyright: ignore[reportAttributeAccessIssue]

    def idle_after(busy_s: float, clock_s: float) -> tuple[float, float]:
        clock.update(busy_s=busy_s, clock_s=clock_s)
        looks = server.looks
        wait_until(lambda: server.looks > looks + 1, lambda: "nobody looks")
        return streaming.stream.idle()

    with closing(Streaming(server)) as streaming:
        streaming.stream.hand_over(0)
        assert idle_after(1.0, 10.0) == (0.0, 0.0)
        assert idle_after(3.0, 14.0) == (2.0, 4.0)
        assert streaming.stream.idle() == (0.0, 0.0)
        assert idle_after(0.5, 1.0) == (0.0, 0.0)  # started anew
        assert idle_after(0.75, 2.0) == (0.25, 1.0)
