"""The HTML file: it holds all it needs, and no text of a sample can leave its place."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from conch.errors import ConfigError
from conch.report.__main__ import main
from conch.report.page import page, write_page
from conch.runs.listing import labelled_runs

pytest.importorskip("plotly", reason="the page's charts come with plotly: pip install plotly")

DATA = {"runs": [], "text": "</script><script>alert(1)</script>"}


def embedded(text: str) -> Any:
    match = re.search(r'<script id="data"[^>]*>([^<]*)</script>', text)
    assert match is not None
    return json.loads(gzip.decompress(base64.b64decode(match[1])))


def test_data_cannot_end_its_script() -> None:
    text = page(DATA, title="</title><script>alert(1)</script>")

    assert embedded(text) == DATA
    assert "<title>&lt;/title&gt;&lt;script&gt;alert(1)" in text and text.count("alert(1)") == 1


def test_page_names_no_other_place_and_runs_only_its_own_scripts() -> None:
    text = page(DATA, title="t")
    match = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert match is not None
    policy = html.unescape(match[1])

    assert policy.startswith("default-src 'none'; ") and "connect-src 'none'" in policy
    script_rule = policy.partition("script-src")[2].partition(";")[0]
    assert "unsafe" not in script_rule
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert len(hashes) == 2 and all(f"'sha256-{each}'" in script_rule for each in hashes)
    assert not re.findall(r"<(?:script|img|link|iframe)[^>]*(?:src|href)=\"(?!data:)", text)


def test_live_page_asks_its_own_server_only() -> None:
    text = page(None, title="t")

    assert "connect-src &#x27;self&#x27;" in text and 'data-mode="live"' in text


def test_file_that_cannot_be_written_names_the_option(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot be written .*choose another --output"):
        write_page(tmp_path / "file/report.html", DATA, title="t")


def test_labels_are_as_much_of_the_folders_as_tells_them_apart(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("x/1/run", "x/2/run", "other")]
    for folder in folders:
        folder.mkdir(parents=True)

    assert [*labelled_runs([str(folders[0])])] == ["run"]
    assert [*labelled_runs([str(folder) for folder in folders])] == ["1/run", "2/run", other_label(tmp_path)]
    assert labelled_runs([f"mine={folders[0]}"]) == {"mine": folders[0]}
    (tmp_path / "lr=3").mkdir()
    assert labelled_runs([str(tmp_path / "lr=3")]) == {"lr=3": tmp_path / "lr=3"}


def other_label(tmp_path: Path) -> str:
    return f"{tmp_path.name}/other"


@pytest.mark.parametrize("words", [["a=x", "a=y"], ["x", "x"]])
def test_label_that_stands_twice_is_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="two runs are called"):
        labelled_runs(words)


def test_command_writes_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n')
    output = tmp_path / "new/report.html"
    main([f"mine={run}", "--output", str(output), "--max_samples=5"])

    assert capsys.readouterr().out == f"{output}\n"
    data = embedded(output.read_text(encoding="utf-8"))
    assert data["runs"][0]["series"] == {"train/loss": [0, [2]]} and data["runs"][0]["label"] == "mine"
