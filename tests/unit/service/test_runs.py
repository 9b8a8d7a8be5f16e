"""Which run a request is for, and what may change when one goes on; no run is under way."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from conch.errors import ConfigError
from conch.service.leases.journal import Journal
from conch.service.leases.records import Asker, Handout, Post
from conch.service.protocol import TrainingSettings
from conch.service.refusals import RefusedError
from conch.service.runs.exchange import Exchange
from conch.service.runs.run import RUN_FILE, SaidOfRun
from conch.service.runs.runs import Runs
from conch.service.server import _alone_in
from conch.types import Completion, Prompt

SETTINGS = TrainingSettings(model_id="m", num_completions_per_prompt=2, max_steps=3)


def ended_run(folder: Path, name: str, *, state: str = "finished") -> Post:
    """A run that has ended, with a group that was rewarded by the post that is returned."""
    run = folder / "runs" / name
    run.mkdir(parents=True)
    said = {"settings": SETTINGS, "state": state, "reason": "so it is", "version": 3, "time": 1.0}
    (run / RUN_FILE).write_text(SaidOfRun.model_validate(said).model_dump_json())
    journal = Journal(run / "journal")
    exchange = Exchange(name, SETTINGS, journal, idle_s=1.0)
    exchange.open(None)
    completions = [Completion(str(i), (i,), (-1.0,), "eos") for i in range(2)]
    [handout] = exchange._ledger.issue(Prompt("p", (7,)), completions, 0, "", [Asker("a", "", "d", 2)], 0.0)
    assert isinstance(handout, Handout)
    samples = tuple((handout.group.number, place) for place in handout.places)
    post = Post("a", samples, tuple(each.hash for each in handout.group.samples), (1.0, 2.0))
    assert exchange.reward(post).version == 1
    journal.close()
    return post


@contextmanager
def as_ordinary_user() -> Iterator[None]:
    """Inside, root is somebody else: nothing is closed to root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_model_whose_files_may_not_be_read_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        model = Path(name)
        model.chmod(0o755)
        (model / "model.safetensors").touch(0o000)
        with (
            as_ordinary_user(),
            pytest.raises(RefusedError, match=r"model.safetensors cannot be read .*chmod"),
        ):
            runs_in(tmp_path).start(TrainingSettings(model_id=name))
    assert [*tmp_path.iterdir()] == []  # no run was begun


def runs_in(folder: Path) -> Runs:
    return Runs(folder, idle_s=1.0, stop_s=1.0)


def test_post_that_is_repeated_after_its_run_ended_gets_its_answer(tmp_path: Path) -> None:
    older, newer = ended_run(tmp_path, "r1"), ended_run(tmp_path, "r2", state="failed")
    runs = runs_in(tmp_path)
    for run_id, post in (("r1", older), ("r2", newer), (None, newer)):
        answer = runs.rewarded(run_id).reward(post)
        assert (answer.outcome, answer.version) == ("whole", 1)
    with pytest.raises(RefusedError, match="there is no run 'r3'"):
        runs.rewarded("r3")


def test_state_of_the_last_run_is_told_by_a_service_that_was_started_anew(tmp_path: Path) -> None:
    assert runs_in(tmp_path).status().state == "none"
    ended_run(tmp_path, "r1")
    status = runs_in(tmp_path).status()
    assert (status.run_id, status.state, status.model_version) == ("r1", "finished", ("r1", 3))
    assert (status.completion_requests_served, status.reward_requests_served) == (1, 1)
    with pytest.raises(RefusedError, match="run r1 is finished: so it is"):
        runs_in(tmp_path).find(None)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"learning_rate": 0.5}, r"`learning_rate` was 1e-05, is 0\.5"),
        ({"num_completions_per_prompt": 3}, "`num_completions_per_prompt` was 2, is 3"),
        ({"model_id": "other"}, "`model_id` was 'm', is 'other'"),
        ({"max_steps": 2}, "`max_steps` was 3: groups were promised updates up to that"),
        ({}, "run r1 has made all of its updates: resume it with a larger `max_steps`"),
        ({"lease_s": 5.0}, "run r1 has made all of its updates"),
    ],
)
def test_run_that_would_learn_otherwise_does_not_go_on(
    tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    ended_run(tmp_path, "r1")
    with pytest.raises(RefusedError, match=reason) as refused:
        runs_in(tmp_path).resume("r1", SETTINGS.model_copy(update=changes))
    assert refused.value.status == 409


def test_folder_of_one_service_is_no_other_ones(tmp_path: Path) -> None:
    other = pytest.raises(ConfigError, match="another training service runs in `output_dir`")
    with _alone_in(tmp_path / "d"), other, _alone_in(tmp_path / "d"):
        pass
    with _alone_in(tmp_path / "d"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"), _alone_in(tmp_path / "file"):
        pass
