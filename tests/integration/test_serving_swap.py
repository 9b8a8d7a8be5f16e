"""New versions taken up by servers that run, under load: no request is lost or scored by a wrong version."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from conch.serving.deployment import state as deployment
from conch.triton.channel import Access, open_client
from tests.deployments import callers, conch, detach, score, status, stubs, wait_until
from tests.stores import LENGTH_MODEL, store_ensemble, store_model, store_text_graph

MODEL = "lengths"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Path]:
    """A store whose only model loads in a second; what a test deployed from it is stopped."""
    store_model(tmp_path / "store", MODEL)
    yield tmp_path / "store"
    conch("down", "--all")


def times(factor: int) -> str:
    """The model whose score is a text's length times `factor`."""
    return LENGTH_MODEL.replace("len(text)", f"len(text) * {factor}")


def ask(name: str, model: str = MODEL) -> tuple[float, str]:
    """What the first server of a deployment says of `abcd`, and by which version."""
    with open_client(deployment.read(name).replicas[0].url, Access()) as client:
        return score(client, "abcd", model)


def test_swap_under_load_loses_no_request_and_versions_only_move_forward(store: Path) -> None:
    running = detach(store, "mine")
    with callers(running.replicas[0].url) as outcomes:
        for version in (2, 3):
            # Another score per version: a reply that mixed versions would show.
            store_model(store, MODEL, model_py=times(version), golden_score=2.0 * version)
            done = conch("swap", "mine")
            assert done.returncode == 0 and done.stdout == f"{MODEL}: version {version}\n", done.stderr

    for mine in outcomes:
        assert {*mine} == {(4.0, "1"), (8.0, "2"), (12.0, "3")}
        assert [version for _, version in mine] == sorted(version for _, version in mine)
    assert [model["model"] for model in status("mine")[0]["models"]] == [MODEL]  # nothing tried out is left


def test_a_new_version_that_does_not_load_leaves_the_old_one_serving(store: Path) -> None:
    detach(store, "mine")
    store_model(store, MODEL, model_py="raise ImportError('no such luck')")
    done = conch("swap", "mine")
    assert done.returncode == 1 and "version 2 of model lengths did not load" in done.stderr
    assert "no such luck" in done.stderr and "version 1 of lengths goes on serving" in done.stderr
    assert ask("mine") == (4.0, "1")


def test_a_version_that_scores_wrong_answers_nobody_and_is_not_taken_up_by_a_restart(store: Path) -> None:
    running = detach(store, "mine", "--watch-interval", "0.2")
    with callers(running.replicas[0].url) as outcomes:
        store_model(store, MODEL, model_py=times(2))  # its golden sample says times 1
        done = conch("swap", "mine")
        (stub,) = stubs(running.replicas[0].pid)
        stub.kill()
        wait_until(lambda: deployment.read("mine").replicas[0].heals >= 1, "the stub was not healed")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        "model lengths version 2" in done.stderr
        and "golden sample 0 scores [4.0], expected [2.0]" in done.stderr
    )
    assert done.stderr.rstrip().endswith("version 1 of lengths goes on serving")
    replies = [outcome for mine in outcomes for outcome in mine if isinstance(outcome, tuple)]
    assert {*replies} == {(4.0, "1")}

    os.kill(running.replicas[0].pid, signal.SIGKILL)
    wait_until(lambda: deployment.read("mine").replicas[0].restarts == 1, "it was not restarted")
    wait_until(lambda: deployment.read("mine").is_ready, "it did not become ready again")
    assert ask("mine") == (4.0, "1") and deployment.read("mine").replicas[0].versions == {MODEL: 1}

    store_model(store, MODEL, model_py=times(3), golden_score=6.0)
    assert conch("swap", "mine").returncode == 0 and ask("mine") == (12.0, "3")


def test_a_version_that_turns_wrong_once_taken_up_is_taken_back(store: Path) -> None:
    detach(store, "mine")
    two_faced = LENGTH_MODEL.replace("len(text)", "len(text) * self.factor").replace(
        "    def execute",
        "    def initialize(self, args):\n"
        "        self.factor = 1 if args['model_name'].startswith('_') else 2\n\n"
        "    def execute",
    )
    store_model(store, MODEL, model_py=two_faced)
    done = conch("swap", "mine")
    assert done.returncode == 1 and "version 2 is not ready: golden sample 0 scores [4.0]" in done.stderr
    assert ask("mine") == (4.0, "1") and deployment.read("mine").replicas[0].versions == {MODEL: 1}


def test_a_restart_takes_the_latest_where_the_served_version_was_deleted(store: Path) -> None:
    running = detach(store, "mine")
    store_model(store, MODEL, model_py=times(2), golden_score=4.0)
    shutil.rmtree(store / MODEL / "1")
    os.kill(running.replicas[0].pid, signal.SIGKILL)
    wait_until(lambda: deployment.read("mine").replicas[0].restarts == 1, "it was not restarted")
    wait_until(lambda: deployment.read("mine").is_ready, "it did not become ready again")
    assert ask("mine") == (8.0, "2")
    assert "version 1 of lengths is gone from the store" in conch("logs", "mine", "--supervisor").stdout


def test_a_followed_store_is_taken_up_by_itself(store: Path) -> None:
    detach(store, "mine", "--follow-store")
    store_model(store, MODEL)
    wait_until(lambda: deployment.read("mine").replicas[0].versions == {MODEL: 2}, "no swap")


def test_a_store_that_went_back_is_refused_and_the_newer_version_serves_on(store: Path) -> None:
    store_model(store, MODEL, weights=b"second")
    detach(store, "mine")
    older = store.parent / "older"
    store_model(older, MODEL)
    shutil.rmtree(store / MODEL)
    (older / MODEL).rename(store / MODEL)
    done = conch("swap", "mine")
    assert done.returncode == 1 and "version 2 is served and versions only move forward" in done.stderr
    assert ask("mine") == (4.0, "2")


def test_an_ensemble_and_its_members_are_swapped_without_mixing_their_versions(store: Path) -> None:
    store_model(store, "tens", model_py=times(10), golden_score=20.0)
    store_ensemble(store, "both", [MODEL, "tens"])
    running = detach(store, "mine", model="both")
    with callers(running.replicas[0].url, "both") as outcomes:
        store_model(store, MODEL, model_py=times(3), golden_score=6.0)
        store_model(store, "tens", model_py=times(30), golden_score=60.0)
        too_early = conch("swap", "mine")
        assert too_early.returncode == 1 and ask("mine") == (4.0, "1")
        assert "was made with version 1 of its member lengths" in too_early.stderr
        assert "make the ensemble again" in too_early.stderr

        store_ensemble(store, "both", [MODEL, "tens"])
        done = conch("swap", "mine")
        assert done.returncode == 0 and ask("mine") == (12.0, "2"), done.stderr

    for mine in outcomes:  # 22 = (4 + 40) / 2; a mixture would be 26 or 62
        assert {*mine} == {(22.0, "1"), (66.0, "2")}
    assert {model["model"] for model in status("mine")[0]["models"]} == {MODEL, "tens", "both"}


def test_a_restart_of_an_ensemble_goes_on_with_the_members_that_it_was_made_with(store: Path) -> None:
    store_model(store, "tens", model_py=times(10), golden_score=20.0)
    store_ensemble(store, "both", [MODEL, "tens"])
    running = detach(store, "mine", model="both")
    store_model(store, MODEL, model_py=times(3), golden_score=6.0)
    os.kill(running.replicas[0].pid, signal.SIGKILL)
    wait_until(lambda: deployment.read("mine").replicas[0].restarts == 1, "it was not restarted")
    wait_until(lambda: deployment.read("mine").is_ready, "it did not become ready again")
    assert ask("mine", "both") == (22.0, "1")


def test_an_ensemble_that_scores_wrong_is_refused_with_its_members(store: Path) -> None:
    store_model(store, "tens", model_py=times(10), golden_score=20.0)
    store_ensemble(store, "both", [MODEL, "tens"])
    running = detach(store, "mine", model="both")
    store_model(store, MODEL, model_py=times(3), golden_score=6.0)
    store_model(store, "tens", model_py=times(31), golden_score=60.0)
    store_ensemble(store, "both", [MODEL, "tens"])
    with callers(running.replicas[0].url, "both", threads=2) as outcomes:
        done = conch("swap", "mine")
    assert done.returncode == 1 and "model tens version 2" in done.stderr
    assert {outcome for mine in outcomes for outcome in mine} == {(22.0, "1")}
    assert ask("mine") == (4.0, "1") and ask("mine", "tens") == (40.0, "1")


def test_the_parts_of_a_text_form_graph_are_swapped_without_mixing_their_versions(store: Path) -> None:
    store_text_graph(store, "graph", repeats=1, factor=1)
    running = detach(store, "mine", model="graph")
    with callers(running.replicas[0].url, "graph") as outcomes:
        store_text_graph(store, "graph", repeats=2, factor=10)
        assert conch("swap", "mine").returncode == 0
    for mine in outcomes:  # new ids for the old graph would give 8, old ids for the new one 40
        assert {*mine} == {(4.0, "1"), (80.0, "2")}
