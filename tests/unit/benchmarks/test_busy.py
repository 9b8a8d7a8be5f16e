"""What the benchmark of busy machines sets for each way, and how it tells what it found."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.busy import LIBGOMP, environment_of, table


@pytest.mark.parametrize(
    ("way", "told"),
    [
        ("conch", {"OMP_NUM_THREADS": "2"}),
        ("libgomp", {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": LIBGOMP}),
        ("5000", {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "5000"}),
        ("passive", {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}),
        ("one thread", {"OMP_NUM_THREADS": "1"}),
    ],
)
def test_each_way_has_its_own_variables_alone(
    way: str, told: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "1")  # as this process, which has imported conch, hands them on
    monkeypatch.setenv("KMP_BLOCKTIME", "1")
    environment = environment_of(way, 2)
    of_openmp = {"OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}
    assert {name: environment[name] for name in of_openmp & environment.keys()} == told


def test_ratios_are_to_libgomp_alone() -> None:
    report: dict[str, Any] = {
        "machine": {"cpu": "a processor", "cores": 2},
        "versions": {"torch": "2"},
        "date": "2026-11-30",
        "arguments": {"steps": "6", "others": "2"},
        "seconds": {
            "conch": {"alone": [4.2], "busy": [12.0]},
            "libgomp": {"alone": [4.0, 3.0, 5.0], "busy": [40.0, 20.0, 60.0]},
        },
    }
    rows = [line.split("|")[1:-1] for line in table(report).splitlines()[-2:]]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["conch", "4.20 (4.20-4.20)", "1.05", "12.00 (12.00-12.00)", "3.00"],
        ["libgomp", "4.00 (3.00-5.00)", "1.00", "40.00 (20.00-60.00)", "10.00"],
    ]
    report["seconds"]["conch"]["busy"] = []  # with `--others 0`
    assert "| conch | 4.20 (4.20-4.20) | 1.05 | - | - |" in table(report)
