"""The code of an ensemble that runs inside the server, without a server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conch.converters.triton_models import ensemble_model as served
from conch.converters.triton_models.ensemble_model import MemberFailure, combine, read_scores

NAN = float("nan")
MEMBER = {"name": "a", "column": 1, "columns": 2}


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        # Rows 1, 2, 6 (mean 3, population variance 14/3) and 1, -, 6 (mean 3.5, population variance 6.25).
        ("mean", [3.0, 3.5]),
        ("wco", [1.0, 1.0]),
        ("uwo", [3 - 0.3 * 14 / 3, 3.5 - 0.3 * 6.25]),
    ],
)
def test_combine_equals_the_formula_by_hand(objective: str, expected: list[float]) -> None:
    rewards, variance, used = combine(np.array([[1.0, 2.0, 6.0], [1.0, NAN, 6.0]]), objective, 0.3)

    np.testing.assert_allclose(rewards, expected)
    np.testing.assert_allclose(variance, [14 / 3, 6.25])
    assert used.tolist() == [3, 2]


def test_combine_divides_by_one_less_for_the_variance_of_a_sample() -> None:
    rewards, variance, _ = combine(np.array([[1.0, 2.0, 6.0], [1.0, NAN, 6.0]]), "uwo", 0.3, "sample")

    np.testing.assert_allclose(variance, [7.0, 12.5])
    np.testing.assert_allclose(rewards, [3 - 0.3 * 7.0, 3.5 - 0.3 * 12.5])


@pytest.mark.parametrize("kind", ["population", "sample"])
def test_combine_of_one_member_left_has_no_variance(kind: str) -> None:
    rewards, variance, used = combine(np.array([[NAN, 2.0]]), "uwo", 0.3, kind)
    assert (rewards.tolist(), variance.tolist(), used.tolist()) == ([2.0], [0.0], [1])


def test_read_scores_takes_the_members_column_and_no_score_that_is_not_finite() -> None:
    scores = np.array([[9.0, 1.5], [9.0, np.inf]], dtype=np.float32)
    first, second = read_scores(MEMBER, scores, 2)

    assert first == 1.5
    assert second == MemberFailure("a", "scoring failed: the score is inf")


@pytest.mark.parametrize("shape", [(3, 2), (2, 1), (2,)])
def test_read_scores_refuses_another_shape(shape: tuple[int, ...]) -> None:
    outcome = read_scores(MEMBER, np.zeros(shape, dtype=np.float32), 2)
    assert isinstance(outcome, MemberFailure) and "expected (2, 2)" in outcome.message


@pytest.mark.parametrize(
    ("message", "gone", "members_fault"),
    [
        ("Model a - Error when running inference: ... Model 'a' is not ready.", True, True),
        ("Stub process 'a_0_0' is not healthy.", True, True),
        ("scoring failed: RuntimeError: out of memory", False, True),
        ("row 0: text is not UTF-8 (invalid start byte at byte 0)", False, False),
    ],
)
def test_member_failure_knows_whose_fault_it_is(message: str, gone: bool, members_fault: bool) -> None:
    failure = MemberFailure("a", message)
    assert (failure.is_unavailable, failure.is_members_fault) == (gone, members_fault)


def test_joined_pads_shorter_rows_of_ids_and_masks_them() -> None:
    requests = [
        {"input_ids": np.array([[5, 6, 7]]), "attention_mask": np.array([[1, 1, 1]])},
        {"input_ids": np.array([[8], [9]]), "attention_mask": np.array([[1], [1]])},
    ]
    joined = served._joined(requests)

    assert joined["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0], [9, 0, 0]]
    assert joined["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 0, 0]]


def test_the_file_combines_by_hand_without_this_package(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(Path(served.__file__).read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({"objective": "wco", "uwo_weight": 0.1}))
    asked = {"requests": [{"member_rewards": [[1.0, -2.0], [None, 4.0]]}]}

    done = subprocess.run(
        [sys.executable, "-I", str(tmp_path / "model.py")],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert json.loads(done.stdout) == [{"scores": [[-2.0], [4.0]]}]
