"""A report that follows its runs: what it answers, and to whom."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import conch.report.live
from conch.errors import ConfigError
from conch.report.collect import Collector
from conch.report.live import LiveReport

pytest.importorskip("plotly", reason="the page's charts come with plotly: pip install plotly")


def write_steps(run: Path, steps: int) -> None:
    text = "".join(json.dumps({"step": k, "reward/mean": k / 2}) + "\n" for k in range(1, steps + 1))
    (run / "metrics.jsonl").write_text(text)


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveReport]:
    monkeypatch.setattr(conch.report.live, "_REFRESH_S", 0.0)
    write_steps(tmp_path, 2)
    report = LiveReport(Collector({"a": tmp_path}, 100), title="t")
    thread = threading.Thread(target=report.serve)
    thread.start()
    yield report
    report.close()
    thread.join()


def get(report: LiveReport, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes]:
    address = report.url.removeprefix("http://").rstrip("/")
    connection = http.client.HTTPConnection(address, timeout=30)
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, content


def data(report: LiveReport, query: str = "") -> Any:
    status, content = get(report, f"/data{query}")
    assert status == 200
    return json.loads(content)


def test_page_and_data_follow_the_run(report: LiveReport, tmp_path: Path) -> None:
    status, text = get(report, "/")
    assert status == 200 and b'data-mode="live"' in text

    first = data(report)
    assert first["runs"][0]["step"] == 2
    known = f"?since={first['version']}&strings=0&session={first['session']}"
    assert get(report, f"/data{known}") == (204, b"")
    write_steps(tmp_path, 5)
    assert data(report, known)["runs"][0]["series"]["reward/mean"][1] == [0.5, 1, 1.5, 2, 2.5]


def test_page_of_an_earlier_server_gets_everything(report: LiveReport) -> None:
    first = data(report)
    again = data(report, f"?since={first['version']}&strings=7&session=another")

    assert again["first_string"] == 0 and again["ids"] == first["ids"]


def test_damaged_metrics_are_told_instead_of_failing(report: LiveReport, tmp_path: Path) -> None:
    data(report)
    (tmp_path / "metrics.jsonl").write_text('no JSON\n{"step": 1}\n')

    run = data(report)["runs"][0]
    assert "line 1" in run["error"] and run["step"] == 2


def test_other_names_of_the_host_are_refused(report: LiveReport) -> None:
    assert get(report, "/data", host="evil.example:8900")[0] == 403
    assert get(report, "/data", host="localhost:8900")[0] == 200


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [("/../../etc/passwd", "GET", 404), ("/data?since=x", "GET", 400), ("/data", "POST", 501)],
)
def test_what_there_is_not_is_refused(report: LiveReport, path: str, method: str, status: int) -> None:
    assert get(report, path, method)[0] == status


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "example.com"])
def test_host_beyond_loopback_is_refused(host: str, tmp_path: Path) -> None:
    write_steps(tmp_path, 1)
    with pytest.raises(ConfigError, match=f"--host {host}: a live report is served on loopback alone"):
        LiveReport(Collector({"a": tmp_path}, 1), title="t", host=host)


def test_port_that_is_taken_is_named(report: LiveReport, tmp_path: Path) -> None:
    port = int(report.url.rstrip("/").rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port} .*choose another --port"):
        LiveReport(Collector({"a": tmp_path}, 1), title="t", port=port)
