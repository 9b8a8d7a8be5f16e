"""A run that joins a cluster which somebody else started and guards by a token: it trains, and leaves."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import Any

import psutil
import pytest

from conch.errors import ConfigError
from conch.rollouts.ray.access import MODE, TOKEN, check_token
from tests.footprint import wait_until
from tests.launches import ROOT, finish, free_port, kill_all

pytestmark = pytest.mark.slow

_MARK = "CONCH_TEST_HEAD"
START_S = 180.0
"""Of Ray, on a machine that may have much else to do."""

OBSERVER = """
import json, sys, time
import ray
from ray.util import list_named_actors, placement_group_table

ray.init(address=sys.argv[1], log_to_driver=False, configure_logging=False, logging_level="ERROR")
end = time.monotonic() + float(sys.argv[2])
while True:
    free, cpus = ray.available_resources().get("CPU", 0), ray.cluster_resources()["CPU"]
    actors = [each["name"] for each in list_named_actors(all_namespaces=True)]
    groups = sorted({each["state"] for each in placement_group_table().values()})
    if (free == cpus and not actors) or time.monotonic() > end:
        break
    time.sleep(0.5)
print(json.dumps({"free": free, "cpus": cpus, "actors": actors, "groups": groups}))
"""
"""Waits until nothing of anybody's is in the cluster, for so many seconds, and prints what is."""


@dataclass(frozen=True)
class Head:
    """A cluster of one machine.

    environment: of a user who has its token in a file of the home folder, where Ray looks for it.
    """

    address: str
    token: str
    environment: dict[str, str]
    process: subprocess.Popen[bytes]

    def left(self, wait_s: float = 60.0) -> dict[str, Any]:
        """What is in it, once nothing is, or after `wait_s`."""
        command = [sys.executable, "-c", OBSERVER, self.address, str(wait_s)]
        environment = {**self.environment, MODE: "token"}
        shown = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300, check=True
        )
        return json.loads(shown.stdout)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    port, token = free_port(), secrets.token_hex(32)
    with tempfile.TemporaryDirectory(prefix="head-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        home = Path(folder) / "home"
        (home / ".ray").mkdir(parents=True)
        (home / ".ray" / "auth_token").write_text(token)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {"HOME": str(home), "PYTHONPATH": str(ROOT), _MARK: folder}
        options = [f"--port={port}", f"--temp-dir={folder}/ray", "--num-cpus=2", "--include-dashboard=false"]
        sizes = [f"--object-store-memory={80 * 2**20}", "--disable-usage-stats"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        with (Path(folder) / "log.txt").open("w") as log:
            process = subprocess.Popen(
                [*command, *options, *sizes], env=environment, stdout=log, stderr=log, start_new_session=True
            )
        log_file = Path(folder) / "log.txt"
        try:
            wait_until(lambda: "Ray runtime started" in log_file.read_text(), log_file.read_text, START_S)
            yield Head(f"127.0.0.1:{port}", token, environment, process)
            assert process.poll() is None, log_file.read_text()
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            for each in psutil.process_iter():
                with suppress(psutil.Error):
                    if each.environ().get(_MARK) == folder:
                        each.kill()


def test_run_trains_in_the_cluster_and_leaves_it_as_it_was(head: Head, tmp_path: Path) -> None:
    command = [sys.executable, "tests/integration/ray_run.py", str(tmp_path), "3", "train", head.address]
    finish(subprocess.Popen(command, cwd=ROOT, env=head.environment, text=True, stdout=PIPE, stderr=STDOUT))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert head.left() == {"free": 2.0, "cpus": 2.0, "actors": [], "groups": ["REMOVED"]}


def test_run_that_is_killed_leaves_no_actor_in_the_cluster(head: Head, tmp_path: Path) -> None:
    command = [sys.executable, "tests/integration/ray_run.py", str(tmp_path), "1", "stay", head.address]
    with subprocess.Popen(
        command, cwd=ROOT, env=head.environment, stdout=PIPE, text=True, start_new_session=True
    ) as run:
        try:
            assert run.stdout is not None
            output = ""
            while output.count("step") < 2:
                line = run.stdout.readline()
                assert line, output
                output += line
            assert head.left(wait_s=0) | {"groups": []} == {
                "free": 1.0,
                "cpus": 2.0,
                "actors": ["sampler-0"],
                "groups": [],
            }
            run.send_signal(signal.SIGKILL)
            run.wait(60)
        finally:
            kill_all(run)
    assert head.left() == {"free": 2.0, "cpus": 2.0, "actors": [], "groups": ["REMOVED"]}


def test_a_token_that_is_missing_or_another_is_told_before_anything_is_loaded(
    head: Head, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (MODE, TOKEN, "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="asks for a token, and there is none here"):
        check_token(head.address)
    monkeypatch.setenv(TOKEN, "0" * 64)
    with pytest.raises(ConfigError, match=r"and refuses the one in `RAY_AUTH_TOKEN`"):
        check_token(head.address)
    monkeypatch.setenv(TOKEN, head.token)
    check_token(head.address)


STARTER = """
from conch.rollouts.ray.check import LEAST_STORE_BYTES, Share
from conch.rollouts.ray.cluster import Cluster

cluster = Cluster.start(Share(1, 1.0, 0.0), LEAST_STORE_BYTES)
print(f"up at {cluster.address.address}")
cluster.leave()
"""


def test_cluster_whose_first_control_store_dies_is_started_once_more() -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", STARTER], cwd=ROOT, stdout=PIPE, stderr=STDOUT, text=True
    )
    family = psutil.Process(program.pid)

    def control_stores() -> list[psutil.Process]:
        found = []
        for process in family.children(recursive=True):
            with suppress(psutil.Error):  # it has ended
                if any("gcs_server" in word for word in process.cmdline()[:1]):
                    found.append(process)
        return found

    try:
        wait_until(lambda: bool(control_stores()), lambda: "Ray starts no control store", START_S)
        control_stores()[0].kill()
        output, _ = program.communicate(timeout=START_S)
    finally:
        program.kill()
    assert program.returncode == 0, output
    assert "it is started once more" in output and "up at " in output
