"""The ledger finds what was lost and what was doubled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conch.training.overlap.ledger import (
    LEDGER_FILE,
    append_to_ledger,
    cut_ledger,
    ledger_faults,
    read_ledger,
)


def line(step: int, position: int, row: int | None = None) -> dict[str, Any]:
    return {"step": step, "position": position, "row": position % 4 if row is None else row}


def test_whole_walk_has_no_fault(tmp_path: Path) -> None:
    for step in range(1, 5):
        append_to_ledger(tmp_path, [line(step, 2 * step - 2), line(step, 2 * step - 1)])
    assert ledger_faults(tmp_path, num_rows=4) == []


@pytest.mark.parametrize(
    ("positions", "fault"),
    [
        ([0, 2], "position 1 was not trained"),
        ([0, 1, 1], "position 1 was trained 2 times"),
    ],
)
def test_lost_and_doubled_prompts_are_named(tmp_path: Path, positions: list[int], fault: str) -> None:
    append_to_ledger(tmp_path, [line(1, position) for position in positions])
    assert fault in ledger_faults(tmp_path, num_rows=4)


def test_row_that_comes_twice_in_an_epoch_is_named(tmp_path: Path) -> None:
    append_to_ledger(tmp_path, [line(1, 0, row=3), line(1, 1, row=3), line(2, 4, row=3)])
    assert "row 3 was trained 2 times in epoch 0" in ledger_faults(tmp_path, num_rows=4)


def test_resumed_run_drops_the_steps_that_it_does_again(tmp_path: Path) -> None:
    append_to_ledger(tmp_path, [line(1, 0), line(2, 1), line(3, 2)])
    with (tmp_path / LEDGER_FILE).open("a") as file:
        file.write('{"step": 4, "posi')  # killed while it wrote
    cut_ledger(tmp_path, 2)
    assert [each["step"] for each in read_ledger(tmp_path)] == [1, 2]
    append_to_ledger(tmp_path, [line(3, 2)])
    assert [each["position"] for each in read_ledger(tmp_path)] == [0, 1, 2]


def test_new_run_has_no_ledger_to_cut(tmp_path: Path) -> None:
    cut_ledger(tmp_path, 0)
    assert not (tmp_path / LEDGER_FILE).exists()
