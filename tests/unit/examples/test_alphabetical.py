"""The task of the example of remote training: what is right is paid for, what is measured was not seen."""

from __future__ import annotations

import subprocess
import sys

from examples.remote.alphabetical import (
    LONGEST,
    SHORTEST,
    answer_of,
    demonstrations,
    lists,
    reward,
    settings_of,
)
from tests.launches import ROOT


def test_right_order_is_paid_most_and_the_reverse_order_least() -> None:
    outputs = ["adfg", "adgf", "adfgk", "adf", "gfda", ""]
    right, swapped, too_long, too_short, reverse, nothing = reward(["fdag>"] * 6, outputs)
    assert right == 1.0 and reverse == nothing == 0.0
    assert right > too_long > swapped > reverse and right > too_short > reverse
    assert (swapped, too_long, too_short) == (0.25, 0.4, 0.375)


def test_letters_of_held_out_lists_are_in_no_list_of_training() -> None:
    held_out = {answer_of(each) for each in lists(held_out=True, seed=1, count=3000)}
    trained = {answer_of(each) for each in lists(held_out=False, seed=0, count=3000)}
    assert held_out and trained and held_out.isdisjoint(trained)
    assert {len(each) for each in held_out} == {*range(SHORTEST, LONGEST + 1)}


def test_one_demonstration_in_four_is_right() -> None:
    rows = demonstrations(4000, 0)
    right = sum(row["completion"] == answer_of(row["prompt"]) for row in rows) / len(rows)
    assert 0.22 < right < 0.28


def test_settings_fill_an_update_with_whole_groups() -> None:
    settings = settings_of(str(ROOT), steps=3, seed=1)
    assert (settings.prompts_per_step, settings.max_steps, settings.seed) == (16, 3, 1)
    assert settings.most_groups >= 2 * settings.prompts_per_step


def test_second_terminal_of_the_first_service_s_example_starts_the_client() -> None:
    result = subprocess.run(
        [sys.executable, "examples/alphabetical.py", "--help"],
        cwd=ROOT / "examples" / "remote",
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "Learn to sort letters" in result.stdout
