"""What a rank says that waits for others in vain, and where the stacks go."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from conch.config import OnlineRunConfig, load
from conch.distributed import collective_watch
from conch.distributed.collective_watch import CollectiveWatch
from conch.distributed.collectives import Collectives
from conch.distributed.stuck import file_of, thread_stacks, within, write_report
from conch.errors import ConfigError, DistributedError
from conch.rewards.base import sources_closed_on_failure
from conch.training.setup import check_deadlines, eval_source, watching_sources
from tests.fakes.judge_server import judge_server

GLOO = "[/__w/pytorch/third_party/gloo/gloo/transport/tcp/{}] {}"
# Words of torch 2.13: the first timeout of a group, every later one, and what the other side sees.
FIRST = GLOO.format("unbound_buffer.cc:78", "Timed out waiting 3000ms for recv operation to complete")
LATER = "Application timeout caused pair closure"
GONE = GLOO.format("pair.cc:553", "Connection closed by peer [127.0.0.1]:31897. This is typically")


@pytest.mark.parametrize("text", [FIRST, LATER])
def test_a_timeout_says_who_waited_where_and_how_long(text: str, capfd: pytest.CaptureFixture[str]) -> None:
    ranks = Collectives(Accelerator(cpu=True), 3.0)
    reason = text.rpartition("] ")[2]
    with pytest.raises(DistributedError) as raised, ranks.waiting("all_reduce"):
        raise RuntimeError(text)
    assert str(raised.value) == (
        "rank 0 waited for the other processes of this run, in all_reduce, until the deadline of "
        "`train.collective_timeout_s`=3 s: one of them is stuck or dead; its stacks are above "
        f"({reason})"
    )
    assert "==== " in capfd.readouterr().err  # there is no run's folder yet


def test_other_errors_in_a_collective_stay_what_they_are() -> None:
    ranks = Collectives(Accelerator(cpu=True), 3.0)
    with pytest.raises(RuntimeError, match=r"^shape"), ranks.waiting("all_reduce"):
        raise RuntimeError("shape mismatch")
    with pytest.raises(DistributedError, match="another process of this run is gone"), ranks.explained("x"):
        raise RuntimeError(GONE)


def wait_for_a_report(file: Path) -> None:
    deadline = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collective_watch, "PERIOD_S", 0.05)


@pytest.mark.usefixtures("quick")
def test_each_rank_reports_once_where_one_waits_almost_to_its_deadline(tmp_path: Path) -> None:
    old = file_of(tmp_path, 2)
    old.parent.mkdir()
    old.write_text("==== of an earlier life of this run")
    watches = [CollectiveWatch(rank, 2.0) for rank in range(2)]
    for watch in watches:
        watch.start(tmp_path)
    time.sleep(0.3)
    assert [file.name for file in old.parent.iterdir()] == [old.name]  # which nobody answers
    with watches[0].waiting("a barrier"):
        wait_for_a_report(file_of(tmp_path, 1))
        time.sleep(0.5)
    for watch in watches:
        watch.stop()
    waits, computes = (file_of(tmp_path, rank).read_text() for rank in range(2))
    assert waits.count("====") == computes.count("====") == 1
    assert "rank 0 has waited 2 s for the other processes of this run, in a barrier" in waits
    assert "rank 1 computes or is stuck" in computes
    assert "wait_for_a_report(file_of(tmp_path, 1))" in computes


@pytest.mark.usefixtures("quick")
def test_many_short_waits_are_no_long_one(tmp_path: Path) -> None:
    watch = CollectiveWatch(0, 0.6)
    watch.start(tmp_path)
    for _ in range(150):
        with watch.waiting("all_reduce"):
            time.sleep(0.01)
    watch.stop()
    assert not list(tmp_path.iterdir())


def test_stacks_have_the_names_of_threads_and_the_line_they_wait_at() -> None:
    event = threading.Event()
    thread = threading.Thread(target=event.wait, name="sampler of 127.0.0.1:1")
    thread.start()
    try:
        text = within(thread_stacks, 10.0)
    finally:
        event.set()
        thread.join()
    assert text is not None and text.startswith("Thread MainThread")
    assert "Thread sampler of 127.0.0.1:1" in text and "text = within(thread_stacks, 10.0)" in text


def test_a_report_that_cannot_be_written_goes_to_stderr(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stuck").write_text("a file where the folder should be")
    assert write_report(tmp_path, 3, "nothing moves", ["Thread x"]) == "above"
    said = capfd.readouterr().err
    assert "cannot be written" in said and "rank 3" in said and "Thread x" in said


def test_what_does_not_answer_or_fails_is_left() -> None:
    assert within(lambda: threading.Event().wait(), 0.05) is None
    assert within(lambda: [][0], 10.0) is None
    assert within(lambda: "answer", 10.0) == "answer"


def online(**sections: dict[str, Any]) -> OnlineRunConfig:
    return load(OnlineRunConfig, {"model": {"path": "gpt2"}, **sections})


@pytest.mark.parametrize(
    ("key", "config"),
    [
        ("rollout.deadline_s", online(rollout={"deadline_s": 1800})),
        ("reward.client.deadline_s", online(reward={"client": {"deadline_s": 1800}})),
        ("reference.deadline_s", online(reference={"deadline_s": 1800})),
    ],
)
def test_a_rank_may_not_give_up_the_others_before_they_give_up_what_they_wait_for(
    key: str, config: OnlineRunConfig
) -> None:
    check_deadlines(config, 1)
    with pytest.raises(ConfigError) as refused:
        check_deadlines(config, 4)
    assert str(refused.value) == (
        f"`train.collective_timeout_s` = 1800 must exceed `{key}` = 1800: while one process waits that long, "
        "the 3 others wait for it"
    )
    check_deadlines(online(), 4)


class TwoRanks(Collectives):
    """What one of two processes sees, of which the other does the same."""

    @property
    def num_ranks(self) -> int:
        return 2


def test_ranks_wait_longer_for_each_other_than_for_a_judge_that_watches(tmp_path: Path) -> None:
    ranks, file = TwoRanks(Accelerator(cpu=True), 3.0), tmp_path / "judge.yaml"
    with judge_server() as server:
        file.write_text(f"url: {server.url}\nmodel: judge\ndeadline_s: 1800\n")
        with (
            pytest.raises(
                ConfigError, match=r"must exceed `deadline_s` of the judge in `evaluation.gold` = 1800"
            ),
            sources_closed_on_failure(),
        ):
            watching_sources(ranks, online(), [], f"judge:{file}")
        config = online(reward={"judge": {"file": str(file)}})
        with (
            pytest.raises(ConfigError, match=r"must exceed `reward.judge.deadline_s` = 1800"),
            sources_closed_on_failure(),
        ):
            eval_source(ranks, None, config.reward, [], config.train)
        longer = online(train={"collective_timeout_s": 1801})
        for source in watching_sources(ranks, longer, [], f"judge:{file}").values():
            source.close()
