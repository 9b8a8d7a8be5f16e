"""The command line of a reward server, its process, and several of them on one port."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from conch.config import load
from conch.errors import ConfigError
from conch.reward_server.__main__ import main
from conch.reward_server.server import _sources, name_of
from conch.reward_server.server_config import RewardServerConfig
from conch.rewards.goals.source import GoalsReward
from conch.servers.command import pairs_of
from conch.servers.settings import load_settings
from tests.footprint import wait_until
from tests.launches import ROOT, free_port

FUNCTION = """
import os

def reward(samples, prompts, outputs, **metadata):
    return [float(len(each)) for each in outputs]

def worker(samples, prompts, outputs, **metadata):
    return [float(os.getpid())] * len(outputs)
"""


def test_options_and_pairs_say_the_same() -> None:
    as_options = ["--reward", "host:8001/model", "--port=9000", "--label-key", "answer", "max_waiting=5"]
    assert pairs_of(as_options) == [
        "reward=host:8001/model",
        "port=9000",
        "label_key=answer",
        "max_waiting=5",
    ]
    assert pairs_of(["--help"]) == ["--help"]
    for argv in (["--reward"], ["--reward", "--port", "1"]):
        with pytest.raises(ConfigError, match="`--reward` has no value"):
            pairs_of(argv)


def test_keys_with_dots_stand_in_sections() -> None:
    config = load_settings(
        RewardServerConfig,
        ["source.members={a: host:1/a, b: host:2/b}", "source.client.batch_rows=7", "source.combine=mean"],
    )
    assert config.source.members == {"a": "host:1/a", "b": "host:2/b"}
    assert (config.source.client.batch_rows, config.source.client.max_in_flight) == (7, 2)
    with pytest.raises(ConfigError, match=r"unknown key `source.client.batch_row`; did you mean"):
        load_settings(RewardServerConfig, ["source.client.batch_row=7"])
    with pytest.raises(ConfigError, match="cannot both be given"):
        load_settings(RewardServerConfig, ["source=1", "source.combine=mean"])


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"reward": "h:1/a", "rewards": {"b": "h:1/b"}}, "both name what gives the rewards"),
        ({"reward": "h:1/a", "source": {"url": "h:1/b"}}, "both name what gives the rewards"),
        ({"reward": "h:1/a", "source": {"judge": {"file": "judge.yaml"}}}, "`source.judge` both name"),
        ({"rewards": {"a/b": "h:1/b"}}, "without /"),
        ({"reward": "h:1/a", "source": {"failure": {"policy": "drop"}}}, "`source.failure.policy` is for a"),
        ({"reward": "h:1/a", "source": {"dense": True}}, "is for a trainer"),
        ({"reward": "h:1/a", "host": "0.0.0.0"}, "has texts scored: name a variable"),
    ],
)
def test_settings_that_contradict_are_refused(values: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load(RewardServerConfig, values)


def test_rewards_are_named_by_their_last_part() -> None:
    words = ("host:8001/walks", "http://h/score", "verifier:gsm8k", "rewards.py:brevity", "goals:a,b")
    assert [name_of(word) for word in words] == ["walks", "score", "gsm8k", "brevity", "goals"]


def test_server_without_a_reward_says_how_to_give_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRITON_HOST", "GOAL_DIMENSIONS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="`reward` is missing: give `reward=host:8001/model`"):
        main(["restart=false"])


def test_environment_names_goals_and_their_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges, others = tmp_path / "ranges.yaml", tmp_path / "others.yaml"
    ranges.write_text("text_length: {min: 0, max: 10}\n")
    others.write_text("text_length: {min: 0, max: 20}\n")

    def lengths(**settings: Any) -> list[float]:
        with ExitStack() as stack:
            (source,) = [
                stack.enter_context(each) for _, each in _sources(load(RewardServerConfig, settings))
            ]
            assert isinstance(source, GoalsReward)
            return source.space.measure(["one two three four five"])["text_length"]

    monkeypatch.setenv("GOAL_DIMENSIONS", "text_length")
    monkeypatch.setenv("NORMALIZATION_PATH", str(ranges))
    assert lengths() == lengths(reward="goals:text_length") == [0.5]
    assert lengths(source={"goals": {"normalization": str(others)}}) == [0.25]
    monkeypatch.setenv("TRITON_HOST", "host:8001/model")
    with pytest.raises(ConfigError, match="GOAL_DIMENSIONS and TRITON_HOST both name"):
        lengths()
    assert lengths(reward="goals:text_length") == [0.5]


@contextmanager
def started(folder: Path, *argv: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server's process and its URL, once it is ready."""
    (folder / "mine.py").write_text(FUNCTION)
    port = free_port()
    command = [sys.executable, "-m", "conch.reward_server", *argv, "--port", str(port)]
    with (folder / "stderr").open("w") as stderr:
        process = subprocess.Popen(command, cwd=ROOT, stderr=stderr, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx2.Client(trust_env=False, verify=False) as client:

            def is_ready() -> bool:
                try:
                    return client.get(f"{url}/ready").is_success
                except httpx2.TransportError:
                    return False

            wait_until(lambda: is_ready() or process.poll() is not None, lambda: "not ready", 120)
        yield process, url
    finally:
        process.kill()
        process.wait()


def test_server_of_a_function_answers_and_leaves_at_sigterm(tmp_path: Path) -> None:
    with started(tmp_path, "--reward", f"{tmp_path / 'mine.py'}:reward") as (process, url):
        reply = httpx2.post(f"{url}/get_reward", json={"query": ["abc"]}, trust_env=False, verify=False)
        assert reply.json()["rewards"] == [3.0]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert "Traceback" not in (tmp_path / "stderr").read_text()


def test_workers_share_a_port_and_one_that_is_killed_comes_back(tmp_path: Path) -> None:
    reward = f"reward={tmp_path / 'mine.py'}:worker"
    with started(tmp_path, reward, "workers=2", "restart=false") as (process, url):

        def ask() -> int:
            with httpx2.Client(trust_env=False, verify=False, timeout=30) as client:  # a connection each
                try:
                    return int(client.post(f"{url}/slime", json={"prompt": "", "response": ""}).json())
                except httpx2.TransportError:
                    return 0

        found: set[int] = set()

        def both_answer() -> bool:
            found.add(ask())
            return len(found - {0}) >= 2

        wait_until(both_answer, lambda: f"only {found} answer")
        first = sorted(found - {0})[0]
        requests = _counted(url)
        assert sum(requests.values()) >= 2
        os.kill(first, signal.SIGKILL)
        time.sleep(0.1)
        found.discard(first)
        wait_until(lambda: len((found.add(ask()), found - {0, first})[1]) >= 2, lambda: "no other came")
        assert _counted(url)["slime"] >= requests["slime"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def _counted(url: str) -> dict[str, float]:
    """Requests by form, as all workers together have counted them."""
    text = httpx2.get(f"{url}/metrics", trust_env=False, verify=False).text
    lines = [line for line in text.splitlines() if line.startswith("conch_reward_requests_total")]
    return {line.partition('form="')[2].partition('"')[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_nothing_stays_of_workers_whose_parent_was_killed(tmp_path: Path) -> None:
    reward = f"reward={tmp_path / 'mine.py'}:worker"
    with started(tmp_path, reward, "workers=2", "restart=false") as (process, url):
        figures = Path(tempfile.gettempdir(), f"conch-reward-metrics-{os.getuid()}-{process.pid}")
        assert _counted(url) == {} and [*figures.glob("*.db")]
        process.kill()
        wait_until(lambda: not figures.exists(), lambda: f"{figures} is still there", 60)


def test_mistake_in_a_worker_ends_all_of_them(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "conch.reward_server", "reward=verifier:nothing", "workers=2"]
    done = subprocess.run(
        [*command, f"port={free_port()}"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1 and "there is no verifier `nothing`" in done.stderr


def test_port_that_another_server_shares_out_is_refused() -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        command = [sys.executable, "-m", "conch.reward_server", "reward=verifier:gsm8k", "workers=2"]
        done = subprocess.run(
            [*command, f"port={port}"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"127.0.0.1:{port} cannot be listened on (Address already in use): stop" in done.stderr


def test_missing_package_is_named() -> None:
    program = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        "from conch.reward_server.__main__ import main\n"
        "main(['reward=verifier:gsm8k', 'restart=false'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert (
        "needs the package prometheus_client: pip install -e '" in done.stderr
        and "[reward-server]'" in done.stderr
    )


def test_verb_and_help_list_the_keys() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "conch", "reward-server", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0 and "source.client.max_in_flight: int, default 2" in done.stdout
