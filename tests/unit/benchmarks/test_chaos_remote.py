"""The benchmark of chaos in remote runs: what it draws and prints, and what its bad client does not take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chaos_remote import FAULTS, Outcome, drawn_faults, main, table
from benchmarks.chaos_remote_clients import BadClient, Notes, UnexpectedError
from conch.service.protocol import KEY_VARIABLE, token_hash
from tests.fakes.training_service import Answer, fake_service

OVER: Answer = (409, {"detail": "run run is finished"})
GROUP: Answer = (
    200,
    {
        "prompt": "a",
        "completions": ["b", "a"],
        "completion_tokens": [[0, 1], [0, 0]],
        "model_version": ["run", 0],
        "sample_ids": ["run.3.0", "run.3.1"],
        "token_hashes": [token_hash([0, 1]), token_hash([0, 0])],
        "lease_s": 0.0,
    },
)


def test_each_kind_is_certain_in_its_turn_and_each_other_one_drawn_now_and_then() -> None:
    drawn = [drawn_faults(seed) for seed in range(400)]
    assert drawn == [drawn_faults(seed) for seed in range(400)]
    for place, kind in enumerate(FAULTS):
        assert all(kind in kinds for kinds in drawn[place::4])
        others = [kind in kinds for number, kinds in enumerate(drawn) if number % 4 != place]
        assert 0.25 < sum(others) / len(others) < 0.42


def outcome(name: str, *kinds: str, reward: float | None = 1.0, faults: tuple[str, ...] = ()) -> Outcome:
    return Outcome(name, kinds, 10.0, reward, faults, 3)


def test_table_has_a_line_for_each_kind_of_fault_and_the_distance() -> None:
    calm = [outcome("calm_0"), outcome("calm_1", reward=3.0)]
    others = [
        outcome("run_0", "client"),
        outcome("run_1", "client", reward=None, faults=("it hangs",)),
        outcome("run_2", "client", "network", reward=5.0),
    ]
    lines = table([*calm, *others]).splitlines()
    assert lines[2] == "| nothing | 2 | 2 | 10-10 | 2.000 (sd 1.414) |"
    assert "| client | 3 | 2 | 10-10 | 3.000 (sd 2.828) |" in lines
    assert "| network | 1 | 1 | 10-10 | 5.000 |" in lines and "service" not in "".join(lines)
    assert "| two or more of these | 1 | 1 | 10-10 | 5.000 |" in lines
    assert lines[-1].startswith("Difference of the mean rewards: 0.4 standard errors; 15 requests")


@pytest.mark.parametrize(
    ("last", "code"),
    [
        (outcome("run_1", "service", reward=1.05), 0),
        (outcome("run_1", "service", reward=1.05, faults=("it hangs",)), 1),
        (outcome("run_1", "service", reward=9.0), 1),
    ],
)
def test_code_says_whether_all_passed_and_learned_the_same(tmp_path: Path, last: Outcome, code: int) -> None:
    # All have been made before.
    rewards = (1.0, 1.1)
    made = [outcome(f"calm_{number}", reward=reward) for number, reward in enumerate(rewards)]
    made += [outcome("run_0", "client", "bad client", reward=last.reward and last.reward + 0.01), last]
    lines = [json.dumps({**each.__dict__, "disturbed": each.disturbed}) for each in made]
    (tmp_path / "model").mkdir()
    (tmp_path / "outcomes.jsonl").write_text("\n".join(lines) + "\n")
    assert main(["--runs", "2", "--calm", "2", "--keep", str(tmp_path)]) == code
    assert main(["--runs", "3", "--calm", "2", "--keep", str(tmp_path), "--minutes", "-1"]) == 2


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "key")
    monkeypatch.setattr("benchmarks.chaos_remote_clients._THINKS_S", 0.0)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((200, {"model_version": ["run", 1], "outcome": "whole"}), ": 200 "),
        ((500, {"detail": "a bug"}), ": 500 "),
        ((422, {"detail": ""}), ": 422 "),
    ],
)
def test_bad_client_does_not_have_nonsense_taken_or_refused_without_words(
    tmp_path: Path, answer: Answer, words: str
) -> None:
    for seed in range(3):
        with (
            fake_service(completions=[GROUP] * 12 + [OVER], rewards=[answer]) as fake,
            pytest.raises(UnexpectedError, match=words),
        ):
            BadClient(fake.url, "bad", seed, Notes(tmp_path / "notes")).run()


def test_bad_client_whose_every_deed_is_refused_in_words_ends_with_the_run(tmp_path: Path) -> None:
    refused: Answer = (409, {"detail": "no"})
    with fake_service(completions=[GROUP] * 30 + [OVER], rewards=[refused]) as fake:
        BadClient(fake.url, "bad", 0, Notes(tmp_path / "notes")).run()
        sent: list[Any] = fake.sent_to("/rewards")
    notes = [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]
    deeds = {note["deed"] for note in notes}
    assert {"late", "too few", "nan", "inf", "10000000000.0", "other tokens"} <= deeds
    assert {"other hashes", "another's group", "guessed ids"} <= deeds and len(sent) == len(notes)
