"""`conch score` with models of a real tritonserver: killed, compared with the original, on real data."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from conch.scoring.run import main
from conch.serving.server.server import TritonServer
from tests.faults import MODEL as HASH
from tests.integration.conftest import TEXT_MODEL, RewardModel
from tests.stores import hash_score

HH = Path(__file__).resolve().parents[2].parent / "shared/data/hh/harmless-base.jsonl.gz"
LETTERS = "abcdefghijklmnopqrstu"
DEADLINE_S = 120.0


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_killed_scoring_goes_on_to_the_same_bytes(
    ending: str, hash_server: TritonServer, tmp_path: Path
) -> None:
    rows = [{"prompt": f"p{number}", "completion": "x" * (number % 40)} for number in range(3_000)]
    path, cut, whole = (
        write(tmp_path / "rows.jsonl", rows),
        tmp_path / f"a.{ending}",
        tmp_path / f"b.{ending}",
    )
    journal = cut if ending == "jsonl" else tmp_path / "a.parquet.partial"
    words = [path, "--url", hash_server.endpoint(HASH), "--rows-at-once", "50", "--keep"]
    words += ["--deadline-s", "100"]
    command = [sys.executable, "-m", "conch", "score", *words, "-o", str(cut)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        started = time.monotonic()
        while not (journal.exists() and journal.stat().st_size):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() - started < DEADLINE_S
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    done = journal.read_bytes().count(b"\n")
    assert 0 < done < len(rows) and not (ending == "parquet" and cut.exists())

    resumed = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert f"going on behind {done - done % 50:,} rows" in resumed.stderr
    assert main([*words, "-o", str(whole)]) == 0
    assert cut.read_bytes() == whole.read_bytes()
    if ending == "jsonl":
        first, last = lines_of(cut)[0], lines_of(cut)[-1]
        assert (first["prompt"], last["index"]) == ("p0", 2_999)
        assert last["scores"]["reward"] == hash_score(rows[-1]["prompt"] + rows[-1]["completion"])


def test_served_scores_are_those_of_the_original(
    reward_model: RewardModel, reward_server: TritonServer, tmp_path: Path
) -> None:
    rows = [{"prompt": LETTERS[start], "completion": LETTERS[:end]} for start in (0, 5) for end in range(11)]
    path, report = write(tmp_path / "rows.jsonl", rows), tmp_path / "report.json"
    words = ["--url", reward_server.endpoint(TEXT_MODEL), "--against", str(reward_model.checkpoint)]
    words += ["--report", str(report), "--tolerance", "1e-4", "-o"]
    assert main([path, *words, str(tmp_path / "out.jsonl")]) == 0
    figures = json.loads(report.read_text())["against"]
    assert figures["count"] == 22 and figures["max_difference"] < 1e-5
    assert figures["spearman"] == pytest.approx(1.0) and figures["kendall"] == pytest.approx(1.0)
    pairs = [{"prompt": "a", "chosen": LETTERS[:end], "rejected": LETTERS[end:][:10]} for end in range(1, 9)]
    assert main([write(tmp_path / "pairs.jsonl", pairs), *words, str(tmp_path / "pairs.csv")]) == 0
    figures = json.loads(report.read_text())
    assert figures["against"]["agreement"] == 1.0 and figures["pairs"]["count"] == 8


def test_another_model_is_told_from_the_first_by_its_content(
    reward_server: TritonServer, hash_server: TritonServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = write(tmp_path / "rows.jsonl", ["ab", "ba"]), str(tmp_path / "out.jsonl")
    assert main([path, "--url", reward_server.endpoint(TEXT_MODEL), "-o", output]) == 0
    assert main([path, "--url", hash_server.endpoint(HASH), "-o", output]) == 1
    assert f'reward name "{TEXT_MODEL}" and not "{HASH}"' in capsys.readouterr().err


@pytest.mark.skipif(not HH.is_file(), reason=f"{HH} is not there: real data of the project's machines")
def test_real_pairs_are_scored_and_reported(hash_server: TritonServer, tmp_path: Path) -> None:
    output, report = tmp_path / "out.csv", tmp_path / "report.json"
    words = [str(HH), "--url", hash_server.endpoint(HASH), "-o", str(output), "--report", str(report)]
    assert main(words) == 0
    figures = json.loads(report.read_text())
    # A hash prefers nothing.
    assert figures["pairs"]["count"] == 2000 and abs(figures["pairs"]["accuracy"] - 0.5) < 0.05
    assert output.read_text().splitlines()[0].startswith("index,status,chosen_score,rejected_score,margin")
