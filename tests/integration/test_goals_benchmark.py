"""The benchmark of goals runs small, to its table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import goals

ANSWER = "The committee met on Monday and decided that nobody would have to pay, since it was late. " * 3


def test_every_goal_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, report_file = tmp_path / "rows.jsonl", tmp_path / "report.json"
    rows = [
        {"chosen": f"Human: Hi\n\nAssistant: {ANSWER}{n}", "rejected": "Assistant: No."} for n in range(20)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert goals.main(["--data", str(data), "--rounds", "2", "--json", str(report_file)]) == 0
    report = json.loads(report_file.read_text())
    assert list(report["texts_per_s"]) == [*goals.DEFAULT_GOALS, goals.TOGETHER, goals.KEPT, goals.UNKNOWN]
    assert all(0 < rates["low"] <= rates["high"] for rates in report["texts_per_s"].values())
    assert report["texts"] == 20
    assert "| `formality` | " in capsys.readouterr().out


@pytest.mark.parametrize("content", ['{"prompt": "x"}\n', "no JSON", '{"chosen": "a", "rejected": "b"}\n'])
def test_data_of_another_form_is_told(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    assert goals.main(["--data", str(tmp_path / "rows.jsonl")]) == 1
    assert f"error: {tmp_path}/rows.jsonl" in capsys.readouterr().err
