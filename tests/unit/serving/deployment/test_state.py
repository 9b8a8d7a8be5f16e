from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from conch.errors import ServingError
from conch.serving.deployment import commands
from conch.serving.deployment import state as deployment
from conch.serving.deployment.state import Deployment, Replica
from conch.serving.deployment.supervisor import RestartPolicy, _pause_s


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


def described(name: str, **changes) -> Deployment:
    values = dict(name=name, machine="here", pid=os.getpid(), model_store=Path("s"), models=("walks",))
    return Deployment(**{**values, **changes})


def test_a_claimed_name_is_found_and_free_again_afterwards() -> None:
    with deployment.claimed(None, "walks") as (name, folder):
        deployment.write(folder, described(name, replicas=(Replica(log=Path("l"), phase="ready"),)))
        assert deployment.names() == ["walks"] and deployment.only_name(None) == "walks"
        assert deployment.read("walks").is_ready
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert deployment.names() == []
    with pytest.raises(ServingError, match=r"no deployment called walks runs on .*; none runs"):
        deployment.read("walks")


def test_a_default_name_in_use_gets_a_number_and_a_given_one_is_refused() -> None:
    with deployment.claimed(None, "walks"), deployment.claimed(None, "walks") as (name, _):
        assert name == "walks-2"
        with (
            pytest.raises(ServingError, match="called walks runs already: stop it"),
            deployment.claimed("walks", "other"),
        ):
            pass
        with pytest.raises(ServingError, match="several deployments run, name one: walks, walks-2"):
            deployment.only_name(None)


def test_what_a_killed_supervisor_left_is_not_taken_for_a_deployment() -> None:
    with deployment.claimed("walks", "walks") as (name, folder):
        text = described(name).model_dump_json()
    (folder / "deployment.json").write_text(text)
    assert deployment.names() == []
    with deployment.claimed("walks", "walks"), pytest.raises(ServingError, match="just starting"):
        deployment.read("walks")


def test_a_deployment_that_starts_is_not_ready() -> None:
    ready = Replica(log=Path("l"), phase="ready")
    assert not described("walks").is_ready
    assert not described("walks", replicas=(ready, Replica(log=Path("l")))).is_ready


@pytest.mark.parametrize("name", ["../walks", "", "a/b", ".hidden"])
def test_a_name_that_is_no_plain_name_is_refused(name: str) -> None:
    with pytest.raises(ServingError, match="is no name for a deployment"):
        deployment.folder_of(name)


def test_pauses_double_up_to_the_longest() -> None:
    policy = RestartPolicy(first_pause_s=1.0, longest_pause_s=10.0)
    for failures, longest in ((1, 1.0), (2, 2.0), (3, 4.0), (4, 8.0), (5, 10.0), (50, 10.0)):
        assert all(0.75 * longest <= _pause_s(policy, failures) <= longest for _ in range(20))


def test_logs_go_on_in_the_next_file_when_one_is_put_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    log = tmp_path / "replica-0.log"
    log.write_bytes(b"old\n1\n")
    looks = iter([True, True, False])

    def rotate(_folder: Path) -> bool:
        alive = next(looks)
        if not (tmp_path / "replica-0.log.1").exists():
            with log.open("ab") as file:
                file.write(b"2\n")
            log.rename(tmp_path / "replica-0.log.1")
            log.write_bytes(b"3\n")
        return alive

    monkeypatch.setattr(deployment, "is_held", rotate)
    commands._follow(log, position=4, name="walks")
    assert capsysbinary.readouterr().out == b"1\n2\n3\n"
