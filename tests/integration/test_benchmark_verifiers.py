"""The benchmark of verifiers runs small, to its table; it fails where `math` and math-verify judge apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import verifiers

ROWS = [{"answer": f"{n} + {n} = <<{n}+{n}={2 * n}>>{2 * n}.\n#### {2 * n}"} for n in range(20, 40)]


def test_every_way_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, report_file = tmp_path / "rows.jsonl", tmp_path / "report.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    arguments = ["--data", str(data), "--samples", "60", "--rounds", "2", "--json", str(report_file)]
    assert verifiers.main(arguments) == 0
    report = json.loads(report_file.read_text())
    assert list(report["checks_per_s"]) == ["strict", "flexible", "verl", "math", "math-verify"]
    assert all(0 < rates["low"] <= rates["high"] for rates in report["checks_per_s"].values())
    assert "| `math`, in a pool of one process | " in capsys.readouterr().out


def test_data_of_another_form_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verifiers.main(["--data", str(tmp_path / "none.jsonl")]) == 1
    assert "does not hold JSON lines with `answer`" in capsys.readouterr().err
