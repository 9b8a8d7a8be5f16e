"""Sampling from several servers: who is asked, which weights they hold, and what happens when one dies."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from conch.addresses import parse_servers
from conch.config import load
from conch.errors import ConfigError, RolloutError, RolloutUnavailableError
from conch.rollouts.protocol import Health, PromptRequest
from conch.rollouts.remote.batches import batch_size, missing_part, split_prompts
from conch.rollouts.remote.client import ServerClient
from conch.rollouts.remote.pool import ServerState, least_busy
from conch.rollouts.rendezvous import join, open_store, wait_for_members
from conch.rollouts.serve import main as serve_main
from conch.rollouts.server_config import ServerConfig
from conch.rollouts.weight_sync import BroadcastGroup, SharedFile, tensor_specs
from conch.types import Prompt, Rollout
from tests.fakes.rollout_server import FakeRolloutServer
from tests.footprint import wait_until
from tests.served_sampling import (
    LONG_S,
    LORA,
    Sampling,
    adapted,
    fake_servers,
    look_often_and_write_to,
    prompts,
)
from tests.tiny import tiny_decoder

WEIGHTS = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0], dtype=torch.bfloat16)}


@pytest.fixture(autouse=True)
def _looks_often_and_writes_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look_often_and_write_to(tmp_path, monkeypatch)


@pytest.fixture
def start() -> Iterator[Callable[..., FakeRolloutServer]]:
    with fake_servers() as make:
        yield make


def asked_for(rollouts: Sequence[Rollout]) -> list[tuple[int, ...]]:
    """The prompts' ids, as each completion repeats them."""
    return [rollout.completion.token_ids[:-1] for rollout in rollouts]


# ---------------------------------------------------------------------------------------------------- balance


def test_two_servers_share_the_prompts_and_order_is_kept(start: Callable[..., FakeRolloutServer]) -> None:
    servers = start(max_num_seqs=16), start(max_num_seqs=16)

    def until_all_is_asked_for(_number: int) -> None:
        while sum(server.most_rows for server in servers) < 32:
            time.sleep(0.001)

    for server in servers:
        server.before_line = until_all_is_asked_for
    sampling = Sampling(*servers)
    told: list[int] = []
    wanted = prompts(32)
    chunks = list(sampling.engine.generate(wanted, on_finished=lambda ended: told.extend(ended)))
    assert [len(chunk) for chunk in chunks] == [3] * 10 + [2]
    made = [rollout for chunk in chunks for rollout in chunk]
    assert [rollout.prompt for rollout in made] == wanted
    assert asked_for(made) == [prompt.token_ids for prompt in wanted]
    assert sorted(told) == list(range(32))
    assert servers[0].lines == servers[1].lines == 16


def test_same_seed_asks_for_the_same(start: Callable[..., FakeRolloutServer]) -> None:
    sampling = Sampling(start(), start())
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append([rollout.completion for rollout in sampling(prompts(8))])
    assert found[0] == found[1] != found[2]


def test_one_that_hangs_gets_no_more_while_the_other_works(start: Callable[..., FakeRolloutServer]) -> None:
    slow, quick = start(max_num_seqs=2), start(max_num_seqs=2)
    release = threading.Event()
    slow.before_line = lambda _number: release.wait(LONG_S) and None
    quick.before_line = lambda number: release.set() if number == 12 else None
    assert len(Sampling(slow, quick)(prompts(16))) == 16
    assert slow.lines <= 4 and quick.lines >= 12


def test_no_work_stays_on_a_servers_account(start: Callable[..., FakeRolloutServer]) -> None:
    """A request ends after its last completion. What was not taken off the account then would count for ever,
    until the server never had room again."""
    sampling = Sampling(start(max_num_seqs=4))
    for _ in range(30):
        assert len(sampling(prompts(4))) == 4
        (server,) = sampling.pool.servers
        assert (server.pending_tokens, server.pending_completions) == (0, 0)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ([(30, 3), (20, 6), (90, 1)], 1),
        ([(30, 3), (20, 7), (90, 1)], 0),
        ([(30, 7), (20, 7), (90, 8)], None),
        ([None, (20, 7), None], None),
        ([None, (0, 0), None], 1),
    ],
)
def test_least_busy_has_room_and_the_fewest_tokens(
    state: list[tuple[int, int] | None], expected: int | None
) -> None:
    health = Health(weights=None, max_model_len=9, max_num_seqs=8, workers=1, device="cpu")
    servers = [ServerState(ServerClient("h:1", 1.0), *((health, *each) if each else ())) for each in state]
    rows = 9 if state[1] == (0, 0) else 2
    assert least_busy(servers, rows) is (None if expected is None else servers[expected])


def test_equal_prompts_in_a_row_are_one_request_with_several_seeds() -> None:
    a, b = Prompt("a", (1,)), Prompt("b", (2,))
    batches = split_prompts([a, a, a, b, a, a], range(6), range(10, 16), 4)
    assert [[request.seeds for request in batch.requests] for batch in batches] == [
        [(10, 11, 12), (13,)],
        [(14, 15)],
    ]
    assert [batch.indices for batch in batches] == [[[0, 1, 2], [3]], [[4, 5]]]
    rest = missing_part(batches[0], {1, 2})
    assert rest is not None and rest.indices == [[1, 2]] and rest.requests[0].seeds == (11, 12)
    assert missing_part(batches[0], {4}) is None


# --------------------------------------------------------------------------------------------------- failures


def broken(_number: int) -> None:
    raise ConnectionAbortedError


def test_what_a_dead_server_owes_comes_from_another(start: Callable[..., FakeRolloutServer]) -> None:
    dying, living = start(), start()

    def die(number: int) -> None:
        if number == 6:
            threading.Thread(target=dying.stop).start()
        if number >= 6:
            broken(number)

    dying.before_line = die
    told: list[int] = []
    sampling = Sampling(dying, living)
    wanted = prompts(32)
    made = [
        each
        for chunk in sampling.engine.generate(wanted, on_finished=lambda ended: told.extend(ended))
        for each in chunk
    ]
    assert asked_for(made) == [prompt.token_ids for prompt in wanted]
    assert sorted(told) == list(range(32))
    assert living.lines >= 27


def test_server_that_comes_back_gets_its_weights_before_any_request(
    start: Callable[..., FakeRolloutServer],
) -> None:
    first, second = start(), start()
    sampling = Sampling(first, second)
    sampling(prompts(8))
    first.stop()
    sampling.version = 1
    assert len(sampling(prompts(8))) == 8
    again = start(first.port)
    sampling.version = 2

    def asks_it() -> bool:  # the other may have done all of the first work before this one is looked at
        assert {rollout.policy_version for rollout in sampling(prompts(16))} == {2}
        return "generate 2" in again.events

    wait_until(asks_it, lambda: f"nothing was asked of it: {again.events}")
    assert again.events[0] == "weights 2" and "refused 2" not in again.events


def test_server_restarted_between_two_calls_is_given_the_same_weights_again(
    start: Callable[..., FakeRolloutServer],
) -> None:
    server = start()
    sampling = Sampling(server)
    sampling(prompts(1))
    server.stop()
    again = start(server.port)
    assert len(sampling(prompts(1))) == 1
    assert again.events == ["refused 0", "weights 0", "generate 0"]


def test_completion_that_comes_twice_counts_once(start: Callable[..., FakeRolloutServer]) -> None:
    server = start()
    lines_for = server.lines_for
    server.lines_for = lambda body: [line for each in lines_for(body) for line in (each, each)]  # pyright: ignore[reportAttributeAccessIssue]
    told: list[int] = []
    wanted = prompts(4)
    made = list(Sampling(server).engine.generate(wanted, on_finished=lambda ended: told.extend(ended)))
    assert asked_for([each for chunk in made for each in chunk]) == [prompt.token_ids for prompt in wanted]
    assert sorted(told) == [0, 1, 2, 3]


def test_completion_of_another_version_is_refused(start: Callable[..., FakeRolloutServer]) -> None:
    server = start()
    server.says_version = 7
    with pytest.raises(RolloutError, match=rf"{server.address} answered with version 7 .*, 0 was asked for"):
        Sampling(server)(prompts(2))


def test_server_that_another_run_uses_is_given_up(start: Callable[..., FakeRolloutServer]) -> None:
    server = start()
    sampling = Sampling(server)

    def taken_by_another(body: dict[str, Any]) -> tuple[int, Any]:
        server.weights = {"source": "other", "version": body["weights"]["version"]}
        return 200, {**server.health(), "weights": body["weights"]}

    server.take_weights = taken_by_another  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(RolloutError, match="again and again: give each run servers of its own"):
        sampling(prompts(2))


def test_nobody_answers_within_the_deadline(start: Callable[..., FakeRolloutServer]) -> None:
    server = start()
    sampling = Sampling(server, deadline_s=0.2)
    server.stop()
    with pytest.raises(
        RolloutUnavailableError, match=r"no server of `rollout.urls` answers: .*conch rollout-server"
    ):
        sampling.pool.check()
    with pytest.raises(
        RolloutUnavailableError, match=r"no server came to hold version 0 .*deadline_s` = 0.2"
    ):
        sampling(prompts(2))


def test_server_that_cannot_take_weights_says_why(start: Callable[..., FakeRolloutServer]) -> None:
    server = start()
    server.weights_answer = (400, {"detail": "no such file on this machine"})
    with pytest.raises(RolloutError, match=f"{server.address} refuses: no such file on this machine"):
        Sampling(server)(prompts(2))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"prompt_index": -1}, "prompt_index: Input should be greater than or equal to 0"),
        ({"seed_index": 7}, "sent a completion that nobody asked for"),
        ({"logprobs": [-0.5]}, "3 tokens have 1 log-probs"),
        ({"logprobs": [float("nan")] * 3}, "logprobs.0: Input should be a finite number"),
        ({"token_ids": [-4, 1, 1]}, "token_ids.0: "),
        ({"text": None}, "text: "),
    ],
)
def test_completion_that_cannot_be_is_refused(
    start: Callable[..., FakeRolloutServer], changes: dict[str, Any], complaint: str
) -> None:
    server = start()
    lines = server.lines_for
    server.lines_for = lambda body: [{**line, **changes} for line in lines(body)]
    with pytest.raises(RolloutError, match=complaint):
        Sampling(server)(prompts(1))


def test_requests_stay_below_what_servers_take() -> None:
    assert [batch_size(prompts(count), 2) for count in (0, 1, 8, 800)] == [1, 1, 1, 100]
    assert batch_size([Prompt("p", (1,) * 4_000_000)] * 64, 1) == 2
    assert batch_size([Prompt("p", (1,))] * 1_000_000, 1) == 65_536
    ids = (262_143,) * 80_000  # a hundredth of the longest request, of a large vocabulary
    assert len(PromptRequest(token_ids=ids, seeds=(2**31 - 1,)).model_dump_json()) < 64e6 / 100


def test_prompt_beyond_the_smallest_max_model_len_is_refused(start: Callable[..., FakeRolloutServer]) -> None:
    with pytest.raises(ConfigError, match=r"a prompt of 2 tokens .* `max_model_len` of 5"):
        Sampling(start(), start(max_model_len=5))(prompts(2))


# ---------------------------------------------------------------------------------------------------- weights


def test_rank_that_does_not_send_waits_for_the_weights(start: Callable[..., FakeRolloutServer]) -> None:
    server = start()
    follower = Sampling(server, sends_weights=False)
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(follower, prompts(1))
        while server.looks < 3 and not asked.done():
            time.sleep(0.001)
        assert not server.events
        pool = Sampling(server).pool
        with pool.lease(0) as lease:
            pool.push_weights(lease)
        assert len(asked.result(LONG_S)) == 1
    assert server.events == ["weights 0", "generate 0"]


def names_in(path: str) -> set[str]:
    return set(load_file(path))


def test_adapter_goes_alone_once_its_base_is_there(start: Callable[..., FakeRolloutServer]) -> None:
    server = start(lora=LORA)
    sampling = Sampling(server, lm=adapted())
    sampling(prompts(1))
    base, first = (names_in(path) for path in server.files)
    assert "model.norm.weight" in base and len(base) == len(tiny_decoder("llama").state_dict())
    assert first == {
        f"model.layers.{layer}.self_attn.q_proj.lora_{factor}.weight" for layer in range(3) for factor in "AB"
    }
    sampling.version = 1
    sampling(prompts(1))
    assert server.events == ["base 0", "adapter 0", "generate 0", "adapter 1", "generate 1"]
    assert names_in(server.files[-1]) == first
    sampling.pool.close()
    assert not any(Path(path).exists() for path in server.files)


def test_restarted_server_is_given_its_base_before_the_adapter(
    start: Callable[..., FakeRolloutServer],
) -> None:
    server = start(lora=LORA)
    sampling = Sampling(server, lm=adapted())
    sampling(prompts(1))
    server.stop()
    again = start(server.port, lora=LORA)
    sampling(prompts(1))
    assert again.events == ["refused 0", "base 0", "adapter 0", "generate 0"]


def test_server_that_lost_its_base_to_another_run_is_given_it_again(
    start: Callable[..., FakeRolloutServer],
) -> None:
    server = start(lora=LORA)
    sampling = Sampling(server, lm=adapted())
    sampling(prompts(1))
    server.base, server.weights = "other", {"source": "other", "version": 0}
    sampling.version = 1
    sampling(prompts(1))
    assert server.events[3:] == ["base 1", "adapter 1", "generate 1"]


@pytest.mark.parametrize("lora", [None, {"rank": 2, "modules": ["q_proj"]}, {"rank": 8, "modules": ["fc"]}])
def test_each_server_gets_what_it_can_take(
    lora: dict[str, Any] | None, start: Callable[..., FakeRolloutServer]
) -> None:
    able, other = start(lora=LORA), start(lora=lora)
    sampling = Sampling(able, other, lm=adapted())
    sampling(prompts(2))
    sampling.version = 1
    sampling(prompts(2))
    assert [each for each in able.events if "generate" not in each] == ["base 0", "adapter 0", "adapter 1"]
    assert [each for each in other.events if "generate" not in each] == ["weights 0", "weights 1"]
    assert "model.norm.weight" in names_in(other.files[-1])


def test_shared_file_holds_the_latest_weights_alone(tmp_path: Path) -> None:
    file = SharedFile("run")
    path = file.path(3, lambda: WEIGHTS)
    assert all(torch.equal(load_file(path)[name], WEIGHTS[name]) for name in WEIGHTS)

    def unasked() -> dict[str, Tensor]:
        raise AssertionError("written already")

    assert file.path(3, unasked) == path
    assert file.path(4, lambda: WEIGHTS).name == "4.safetensors" and not path.exists()
    file.close()
    assert not list(tmp_path.iterdir())


def test_shared_memory_that_is_full_is_explained(tmp_path: Path) -> None:
    (tmp_path / "conch-run").write_text("in the way")
    with pytest.raises(RolloutError, match=r"cannot be written .* set `rollout.weights=broadcast`"):
        SharedFile("run").path(0, lambda: WEIGHTS)


@contextmanager
def sender_and_received(
    tensors: dict[str, Tensor],
) -> Iterator[tuple[BroadcastGroup, Future[dict[str, Tensor]]]]:
    """A group, and what its other member will have received of tensors like these."""
    store = open_store("127.0.0.1", LONG_S)
    settings: dict[str, Any] = {"address": "127.0.0.1", "timeout_s": LONG_S}

    def receive() -> dict[str, Tensor]:
        client = join("127.0.0.1", store.port, store.token, rank=1, timeout_s=LONG_S)
        return dict(BroadcastGroup(client, 1, 2, "gloo", **settings).receive(tensor_specs(tensors)))

    with ThreadPoolExecutor(1) as thread:
        received = thread.submit(receive)
        assert wait_for_members(store, 1, received.done, LONG_S)
        yield BroadcastGroup(store, 0, 2, "gloo", **settings), received


def test_nobody_waits_in_a_group_that_was_left() -> None:
    with sender_and_received(WEIGHTS) as (group, received):
        group.send([WEIGHTS["w"]])
        group.close()
        with pytest.raises(RolloutUnavailableError, match="the weights were not taken"):
            received.result(LONG_S / 2)


def test_broadcast_brings_every_tensor_as_it_was() -> None:
    tensors = {**WEIGHTS, "empty": torch.zeros(0, 2), "turned": torch.arange(6).reshape(2, 3).T}
    with sender_and_received(tensors) as (group, received):
        group.send(tensors.values())
        found = received.result(LONG_S)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_nobody_waits_for_a_server_that_has_refused() -> None:
    assert not wait_for_members(open_store("127.0.0.1", LONG_S), 1, lambda: True, LONG_S)


# --------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("urls", "complaint"),
    [
        ("host", "'host' is not of the form host:port"),
        ("http://host:8100", "not of the form"),
        ("a:1,,b:2", "'' is not of the form"),
        ("a:1, a:1", "names a server twice"),
    ],
)
def test_bad_addresses_are_refused(urls: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse_servers(urls, "rollout.urls")


def test_addresses_are_read() -> None:
    assert parse_servers("a:1, [::1]:2", "rollout.urls") == ["a:1", "[::1]:2"]
    client = ServerClient("[::1]:2", 1.0)
    assert (client.host, client.port) == ("::1", 2)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["model"], "`model` is no setting: write key=value"),
        (["model=x", "prot=1"], "unknown key `prot`; did you mean `port`"),
        (["port=8100"], "`model` is missing"),
        (["model=x", "port=0"], "`port`: "),
        (["model=x", "max_lora_rank=513"], "`max_lora_rank`: "),
        (
            ["model=x", "lora_target_modules=[q_proj]"],
            "`lora_target_modules` says where adapters",
        ),
        (["model=x", "lora_rank=8"], "unknown key `lora_rank`; did you mean `max_lora_rank`"),
        (["model=x", "kv_cache_memory_bytes=2 boats"], "`kv_cache_memory_bytes`: .*unit: boats"),
        (["model=x", "kv_cache_memory_bytes=0"], "`kv_cache_memory_bytes`: Input should be greater than 0"),
    ],
)
def test_bad_arguments_of_a_server_are_refused(arguments: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        serve_main(arguments)


def test_server_and_trainer_make_engines_of_the_same_settings() -> None:
    shared = {"max_model_len": 9, "kv_cache_memory_bytes": "2GiB", "max_num_seqs": 3, "enforce_eager": True}
    config = load(ServerConfig, {"model": "x", **shared}).rollout_config()
    assert (config.max_model_len, config.max_num_seqs, config.enforce_eager) == (9, 3, True)
    assert config.kv_cache_memory_bytes == 2 * 2**30
    assert config.gpu_memory_utilization == 0.9 and config.sleep_level == 0


def test_server_makes_room_for_adapters_where_it_is_told_to() -> None:
    assert ServerConfig(model="x").lora_capacity() is None
    capacity = ServerConfig(model="x", max_lora_rank=4, lora_target_modules=("q_proj",)).lora_capacity()
    assert capacity is not None and (capacity.rank, capacity.modules) == (4, ("q_proj",))
