"""`conch score` on files, with functions and verifiers for rewards, and an endpoint on a real socket."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

import conch
from conch.errors import ConfigError
from conch.scoring.run import main
from tests.fakes import group_rewards
from tests.fakes.json_rewards import endpoint, goals
from tests.fakes.judge_server import judge_server

ROWS = [{"prompt": "p", "completion": "x" * number, "tag": f"00{number}"} for number in range(10)]
PAIRS = [
    {"prompt": "p", "chosen": "x" * (n % 4), "rejected": "yy", "subset": "ab"[n % 2], "margin": "big"}
    for n in range(8)
]
LENGTHS = """
def lengths(samples, prompts, outputs):
    return [float(len(output)) for output in outputs]

def picky(samples, prompts, outputs):
    return [None if output == "xxx" else float(len(output)) for output in outputs]

def near(samples, prompts, outputs):
    return [len(output) + (0.25 if output == "xx" else 0.0) for output in outputs]

def dense(samples, prompts, outputs, output_ids):
    return [[1.0] * len(ids) for ids in output_ids]

def goals(samples, prompts, outputs):
    return {"a": [None if output == "xx" else 1.0 for output in outputs], "b": [2.0] * len(outputs)}

def moody(samples, prompts, outputs):
    with open(__file__ + ".moods") as file:
        moods = file.read().split()
    with open(__file__ + ".calls", "a") as file:
        file.write(f"{len(samples)} ")
    return [None if str(len(output)) in moods else float(len(output)) for output in outputs]

def calls(samples, prompts, outputs):
    with open(__file__ + ".calls", "a") as file:
        file.write(f"{len(samples)} ")
    return [float(len(output)) for output in outputs]
"""

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    (tmp_path / "own.py").write_text(LENGTHS)

    def to(name: str, rows: list[Any]) -> str:
        path = tmp_path / name
        if name.endswith(".parquet"):
            parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        elif name.endswith(".csv"):
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return to


def score(path: str, function: str = "lengths", *words: str) -> int:
    return main([path, "--reward", f"{Path(path).parent / 'own.py'}:{function}", *words])


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_scores_go_to_standard_output_and_the_report_does_not(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score(write("rows.jsonl", ROWS), "lengths", "--rows-at-once", "3") == 0
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["index"] for line in lines] == list(range(10))
    assert lines[4] == {
        "index": 4, "status": "ok", "scores": {"reward": 4.0}, "model": "lengths", "version": ""
    }  # fmt: skip
    assert "4.5000" in err


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet"])
def test_columns_of_the_input_are_kept_in_every_kind_of_output(
    name: str, write: Write, tmp_path: Path
) -> None:
    path = write(name, ROWS[1:])
    for output in ("out.jsonl", "out.csv", "out.parquet"):
        assert score(path, "lengths", "--keep", "-o", str(tmp_path / output)) == 0
    (first, *_) = lines_of(tmp_path / "out.jsonl")
    assert {**ROWS[1], "index": 0, "status": "ok", "scores": {"reward": 1.0}}.items() <= first.items()
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [*ROWS[0], "index", "status", "reward", "model", "version", "detail"]
    assert (rows[0]["tag"], float(rows[8]["reward"]), rows[0]["detail"]) == ("001", 9.0, "")
    table = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["reward"] for row in table] == [float(number) for number in range(1, 10)]
    assert table[2]["tag"] == "003" and table[2]["status"] == "ok"


def kept_scores(path: Path, column: str) -> list[float]:
    """A column of scores, of an output of any kind."""
    if path.suffix == ".jsonl":
        return [line[column.replace("reward", "scores")]["reward"] for line in lines_of(path)]
    if path.suffix == ".parquet":
        return parquet.read_table(path)[column].to_pylist()
    with path.open(newline="") as file:
        return [float(row[column]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_scores_of_earlier_calls_are_kept_as_well(ending: str, write: Write, tmp_path: Path) -> None:
    path = output = Path(write("rows.jsonl", ROWS[1:4]))
    for number, function in enumerate(("lengths", "near", "lengths")):
        output = tmp_path / f"{number}.{ending}"
        assert score(str(path), function, "--keep", "-o", str(output)) == 0
        path = output
    assert kept_scores(output, "reward") == [1.0, 2.0, 3.0]
    assert kept_scores(output, "conch_reward") == [1.0, 2.25, 3.0]
    assert kept_scores(output, "conch_conch_reward") == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_table_holds_columns_that_it_has_no_type_for_as_text(
    ending: str, write: Write, tmp_path: Path
) -> None:
    odd = {"number": [1 << 70, 1], "note": ["\ud800x", "é"], "empty": [{}, {}], "inner": [[{"a": {}}], []]}
    rows = [
        {"prompt": "p", "completion": "xx", **{name: values[place] for name, values in odd.items()}}
        for place in (0, 1)
    ]
    output = tmp_path / f"out.{ending}"
    assert score(write("rows.jsonl", rows), "lengths", "--keep", "-o", str(output)) == 0
    if ending == "csv":
        with output.open(newline="") as file:
            table = list(csv.DictReader(file))
    else:
        table = parquet.read_table(output).to_pylist()
    assert [row["number"] for row in table] == [str(1 << 70), "1"]
    assert [row["note"] for row in table] == ["\\ud800x", "é"]
    assert [row["empty"] for row in table] == ["{}", "{}"]
    assert [row["inner"] for row in table] == ['[{"a": {}}]', "[]"]
    assert [float(row["reward"]) for row in table] == [2.0, 2.0]


def test_standard_output_is_utf8_whatever_the_locale_says(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("rows.jsonl", [{"prompt": "p", "completion": "\u6f22"}])
    for words in ((), ("-o", str(tmp_path / "out.jsonl"), "--subset", "kind")):
        if words:
            path = write("pairs.jsonl", [{"prompt": "p", "chosen": "xx", "rejected": "x", "kind": "\u6f22"}])
        out = io.BytesIO()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
            assert score(path, "lengths", *(words or ("--keep",))) == 0
            found = out.getvalue()
        assert ("\u6f22".encode() if not words else b"\\u6f22") in found


def test_scores_of_tokens_are_no_scores_of_rows(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (write("rows.jsonl", ROWS[:2]), write("pairs.jsonl", PAIRS[:2])):
        assert score(path, "dense") == 2
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [line["status"] for line in lines] == ["invalid"] * 2
        assert "gives a score for each token" in lines[0]["detail"]


def test_goals_look_at_the_whole_of_a_text(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([write("rows.jsonl", [{"text": "word " * 200}]), "--reward", "goals:text_length"]) == 0
    (line,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert line["scores"]["text_length"] == pytest.approx((200 - 78) / (1509 - 78))


def test_pairs_get_margins_and_a_report_by_subset(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = write("pairs.parquet", PAIRS), tmp_path / "scores.jsonl"
    assert score(path, "lengths", "-o", str(output), "--keep", "--report", str(tmp_path / "r.json")) == 0
    line = lines_of(output)[3]
    # What the input calls margin stays its own.
    assert (line["margin"], line["conch_margin"], line["chosen"]) == ("big", 1.0, "xxx")
    assert (line["chosen_score"], line["rejected_score"], line["correct"]) == (3.0, 2.0, 1.0)
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["pairs"]["accuracy"] == 0.375 and report["pairs"]["ties"] == 2
    assert report["subsets"]["b"]["accuracy"] == 0.5 and report["subsets"]["a"]["accuracy"] == 0.25
    assert "accuracy 0.3750" in capsys.readouterr().out


def test_names_of_columns_that_were_taken_are_told(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question": "q", "response": "xx"}]
    assert score(write("rows.jsonl", rows)) == 0
    assert "prompt from `question`, completion from `response`" in capsys.readouterr().err
    assert (
        score(write("odd.jsonl", [{"a": "q", "b": "xx"}]), "lengths", "--prompt", "a", "--completion", "b")
        == 0
    )


def test_a_bad_row_in_the_midst_is_its_own_status(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(write("rows.jsonl", ROWS[:5]))
    path.write_text(path.read_text() + '{"prompt":\n{"odd": 1}\n')
    output = tmp_path / "out.jsonl"
    assert score(str(path), "picky", "-o", str(output)) == 2
    lines = lines_of(output)
    assert [line["status"] for line in lines] == ["ok"] * 3 + ["invalid", "ok", "invalid", "invalid"]
    assert "is no JSON" in lines[5]["detail"] and "has the keys odd" in lines[6]["detail"]
    assert not any("scores" in lines[place] for place in (3, 5, 6))
    assert "3 of 7 rows have no score; first: row 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--prompt", "p", "--completion", "completion"], "--prompt p: line 1 has no such column"),
        (["--url", "host:1/m"], "give one of them"),
        (["--tolerance", "1"], "give the other one by --against"),
        (["--retry-failed"], "--retry-failed is about rows of an output: name it by --output"),
        (["--retry-failed", "--overwrite", "-o", "s.jsonl"], "give one of them"),
        (["-o", "scores.txt"], "give one of these endings"),
        (["-o", "nowhere/scores.jsonl"], "there is no folder nowhere"),
        (["-o", "rows.jsonl"], "is the input"),
        (["--report", "."], "is a folder"),
        (["--rows-are", "pairs"], 'line 1 has no "chosen" and "rejected"'),
        (["--objective", "style"], "--objective style: lengths gives reward"),
        (["--objective", "style", "--rows-are", "samples"], "--objective style: lengths gives reward"),
    ],
)
def test_mistakes_are_one_sentence_before_anything_is_asked(
    words: list[str],
    sentence: str,
    write: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write("rows.jsonl", PAIRS if words == ["--objective", "style"] else ROWS)
    assert main(["rows.jsonl", "--reward", "own.py:lengths", *words]) == 1
    assert sentence in capsys.readouterr().err


def test_an_input_without_rows_or_without_a_good_one_is_an_error(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score(write("rows.jsonl", [])) == 1
    assert "is empty: give at least one row" in capsys.readouterr().err
    assert score(write("odd.jsonl", [{"odd": 1}, {"odd": 2}])) == 1
    assert "the first 2 rows cannot be scored: line 1 has the keys odd" in capsys.readouterr().err


def test_an_output_is_gone_on_with_and_then_whole(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output, calls = write("rows.jsonl", ROWS), tmp_path / "out.jsonl", tmp_path / "own.py.calls"
    words = ("calls", "-o", str(output), "--rows-at-once", "4")
    assert score(path, *words) == 0
    whole = output.read_bytes()
    assert calls.read_text() == "4 4 2 "
    # Cut in the midst of line 6, as a kill does; the note of a run that has not ended has no report.
    note = tmp_path / "out.jsonl.about.json"
    about = json.loads(note.read_text())
    report = about.pop("report")
    note.write_text(json.dumps(about))
    output.write_bytes(b"".join(whole.splitlines(keepends=True)[:5]) + b'{"index": 5, "sta')
    assert score(path, *words) == 0
    assert output.read_bytes() == whole
    assert calls.read_text() == "4 4 2 4 2 "  # whole parts are asked for again, as they were
    assert "going on behind 4 rows" in capsys.readouterr().err
    assert json.loads(note.read_text())["report"] == report
    assert score(path, *words) == 0
    assert calls.read_text() == "4 4 2 4 2 "
    assert "holds all scores already" in capsys.readouterr().err


def test_an_unknown_objective_is_told_before_a_reward_is_asked_that_tells_its_own(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    with endpoint(goals) as server:
        words = ["--url", server.url, "--dialect", "goals", "--objective", "style"]
        for path in (write("rows.jsonl", ROWS), write("pairs.jsonl", PAIRS)):
            asked = len(server.asked)
            assert main([path, *words]) == 1
            told = capsys.readouterr()
            assert "--objective style: " in told.err and "gives long, one" in told.err and not told.out
            assert not any("xx" in str(body) for body in server.asked[asked:]), "more than what checks ask"


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_rows_without_a_score_are_asked_for_again_and_no_others(
    ending: str, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output, calls = write("rows.jsonl", ROWS), tmp_path / f"out.{ending}", tmp_path / "own.py.calls"
    moods, words = tmp_path / "own.py.moods", ("--keep", "--rows-at-once", "4")
    moods.write_text("")
    assert score(path, "moody", "-o", str(tmp_path / f"good.{ending}"), *words) == 0
    moods.write_text("3 5 9")
    assert score(path, "moody", "-o", str(output), *words) == 2
    moods.write_text("9")
    calls.write_text("")
    assert score(path, "moody", "-o", str(output), *words) == 2, "without the option nothing is asked"
    assert calls.read_text() == ""
    assert score(path, "moody", "-o", str(output), *words, "--retry-failed") == 2
    assert calls.read_text() == "3 "
    told = capsys.readouterr().err
    assert "asked again for 3 rows" in told and "1 of 10 rows have no score; first: row 9" in told
    moods.write_text("")
    for _ in range(2):
        assert score(path, "moody", "-o", str(output), *words, "--retry-failed") == 0
    assert calls.read_text() == "3 1 " and "holds all scores already" in capsys.readouterr().err
    assert output.read_bytes() == (tmp_path / f"good.{ending}").read_bytes()
    notes = [json.loads((tmp_path / f"{name}.{ending}.about.json").read_text()) for name in ("out", "good")]
    assert notes[0] == notes[1]
    own = {"rows.jsonl", "own.py", moods.name, calls.name}
    written = {f"{name}.{ending}{more}" for name in ("out", "good") for more in ("", ".about.json")}
    assert {each.name for each in tmp_path.iterdir() if each.is_file()} == own | written


def test_rows_without_a_score_come_before_those_without_a_line(write: Write, tmp_path: Path) -> None:
    path, output, calls = write("rows.jsonl", ROWS), tmp_path / "out.jsonl", tmp_path / "own.py.calls"
    (tmp_path / "own.py.moods").write_text("1")
    words = ("-o", str(output), "--rows-at-once", "4")
    assert score(path, "moody", *words) == 2
    note = tmp_path / "out.jsonl.about.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), "report": None}))
    output.write_bytes(b"".join(output.read_bytes().splitlines(keepends=True)[:5]))
    (tmp_path / "own.py.moods").write_text("")
    calls.write_text("")
    assert score(path, "moody", *words, "--retry-failed") == 0
    assert calls.read_text() == "1 4 2 "
    assert [line["index"] for line in lines_of(output)] == list(range(10))


def test_rows_that_are_asked_for_again_are_kept_where_the_server_goes_away(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = write("rows.jsonl", ROWS), tmp_path / "out.jsonl"
    # Each row in a request of its own, or all would fail with the one that does.
    words = [path, "-o", str(output), "--rows-at-once", "1", "--batch-rows", "1", "--deadline-s", "1"]
    with endpoint() as server:
        answer = server.answer

        def refuse(samples: list[str], lengths: set[int], status: int) -> tuple[int, bytes]:
            return (status, b"") if {len(each) for each in samples} & lengths else answer(samples)

        words += ["--url", server.url]
        server.answer = lambda samples: refuse(samples, {3, 6, 9}, 422)
        assert main(words) == 2
        server.answer = lambda samples: refuse(samples, {6}, 503)
        assert main([*words, "--retry-failed"]) == 2
        assert "went away" in capsys.readouterr().err
        failed = [line["index"] for line in lines_of(output) if line["status"] != "ok"]
        assert failed[0] == 5 and set(failed) <= {5, 8}
        server.answer = answer
        assert main([*words, "--retry-failed"]) == 0
    assert [line["scores"]["reward"] for line in lines_of(output)] == [float(n + 1) for n in range(10)]


def test_lines_of_a_table_that_are_gone_cannot_be_taken_up(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = write("rows.jsonl", ROWS), tmp_path / "out.csv"
    assert score(path, "picky", "-o", str(output)) == 2
    (tmp_path / "out.csv.partial").unlink()
    assert score(path, "picky", "-o", str(output), "--retry-failed") == 1
    assert "its lines, " in capsys.readouterr().err


def test_an_input_that_has_changed_anywhere_is_another_one(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "p", "completion": "x" * 100_000} for _ in range(31)]
    path, output = Path(write("rows.jsonl", rows)), tmp_path / "out.jsonl"
    assert score(str(path), "lengths", "-o", str(output)) == 0
    content = bytearray(path.read_bytes())
    content[len(content) // 2] = ord("y")
    path.write_bytes(content)
    assert score(str(path), "lengths", "-o", str(output)) == 1
    assert "holds scores of input blake2b" in capsys.readouterr().err


def test_an_output_that_another_process_writes_is_left_alone(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = write("rows.jsonl", ROWS), tmp_path / "out.jsonl"
    assert score(path, "lengths", "-o", str(output)) == 0
    note = tmp_path / "out.jsonl.about.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), "report": None}))
    before = output.read_bytes()
    with output.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for words in ((), ("--overwrite",)):
            assert score(path, "lengths", "-o", str(output), *words) == 1
            assert "another process scores to" in capsys.readouterr().err
            assert output.read_bytes() == before


def test_an_output_of_something_else_is_refused(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = write("rows.jsonl", ROWS), str(tmp_path / "out.csv")
    assert score(path, "lengths", "-o", output) == 0
    before = Path(output).read_bytes()
    assert score(write("other.jsonl", ROWS[:3]), "lengths", "-o", output) == 1
    assert 'input name "rows.jsonl" and not "other.jsonl"' in capsys.readouterr().err
    assert score(path, "near", "-o", output) == 1
    assert "holds scores of reward name" in capsys.readouterr().err
    assert score(path, "lengths", "-o", output, "--keep") == 1
    assert "options keep false and not true" in capsys.readouterr().err
    (tmp_path / "mine.jsonl").write_text("mine\n")
    assert score(path, "lengths", "-o", str(tmp_path / "mine.jsonl")) == 1
    assert "nothing beside it says what of" in capsys.readouterr().err
    assert Path(output).read_bytes() == before and (tmp_path / "mine.jsonl").read_text() == "mine\n"
    assert score(path, "near", "-o", output, "--overwrite") == 0
    assert Path(output).read_bytes() != before


def test_an_output_of_a_judge_that_asked_otherwise_is_refused(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, file = write("rows.jsonl", ROWS[:2]), tmp_path / "judge.yaml"
    with judge_server() as server:
        file.write_text(f"url: {server.url}\nmodel: judge\n")
        words = [path, "--reward", f"judge:{file}", "-o", str(tmp_path / "out.jsonl")]
        assert main(words) == 0 == main(words)
        file.write_text(f"url: {server.url}\nmodel: judge\nsystem: Be strict.\n")
        assert main(words) == 1
    assert "holds scores of reward content" in capsys.readouterr().err


def test_two_rewards_are_compared(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, output = write("rows.jsonl", ROWS), tmp_path / "out.jsonl"
    near = ("--against", f"{tmp_path / 'own.py'}:near", "--report", str(tmp_path / "r.json"))
    assert score(path, "lengths", "-o", str(output), *near, "--tolerance", "0.3") == 0
    line = lines_of(output)[2]
    assert (line["difference"], line["against"]["scores"]) == (-0.25, {"reward": 2.25})
    figures = json.loads((tmp_path / "r.json").read_text())["against"]
    assert (figures["max_difference"], figures["furthest"][0]["index"]) == (0.25, 2)
    assert figures["spearman"] == pytest.approx(1.0) and figures["kendall"] == pytest.approx(1.0)
    assert score(path, "lengths", *near, "--tolerance", "0.2") == 3
    assert "differ by up to 0.25, more than --tolerance 0.2" in capsys.readouterr().err


def test_what_does_not_apply_to_a_row_is_no_difference(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--against", f"{tmp_path / 'own.py'}:goals", "--objective", "a")
    assert score(write("rows.jsonl", ROWS[1:4]), "goals", *words) == 0
    out, err = capsys.readouterr()
    assert [line.get("difference") for line in map(json.loads, out.splitlines())] == [0.0, None, 0.0]
    assert "2 scores of both: largest difference 0" in err


def test_a_verifier_reads_the_answer_of_the_row(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"question": "6 x 7?", "answer": "It is 42.\n#### 42", "mine": "#### 42"},
        {"question": "6 x 7?", "answer": "It is 42.\n#### 42", "mine": "#### 41"},
    ]
    path = write("rows.jsonl", rows)
    assert main([path, "--reward", "verifier:gsm8k", "--completion", "mine"]) == 0
    out = capsys.readouterr().out
    assert [json.loads(line)["scores"]["answer"] for line in out.splitlines()] == [1.0, 0.0]
    no_answer = write("no.jsonl", [{"prompt": "a", "completion": "b"}])
    assert main([no_answer, "--reward", "verifier:gsm8k"]) == 1
    assert "no.jsonl: the row cannot be scored: line 1" in capsys.readouterr().err


def test_goals_of_an_endpoint_become_columns_and_objectives(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.csv"
    with endpoint(goals) as server:
        words = ["--url", server.url, "--dialect", "goals", "-o", str(output)]
        assert main([write("rows.jsonl", ROWS), *words]) == 0
        pairs = write("pairs.jsonl", PAIRS)
        assert main([pairs, *words[:-1], str(tmp_path / "p.jsonl"), "--objective", "one"]) == 0
    assert output.read_text().splitlines()[0] == "index,status,long,one,model,version,detail"
    assert "8 ties" in capsys.readouterr().out


def test_a_server_that_goes_away_leaves_what_was_scored(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = write("rows.jsonl", ROWS), tmp_path / "out.jsonl"
    with endpoint() as server:
        answer = server.answer

        def fail_later(samples: list[str]) -> tuple[int, bytes]:
            # By what they are, since nobody knows in which order requests come; what a check asks is longer.
            return (503, b"") if any(6 < len(each) < 20 for each in samples) else answer(samples)

        server.answer = fail_later
        words = [path, "--url", server.url, "-o", str(output), "--rows-at-once", "2", "--deadline-s", "2"]
        assert main([*words, "--batch-rows", "2"]) == 2
        assert "went away" in capsys.readouterr().err
        kept = lines_of(output)
        assert 2 <= len(kept) < 10 and all(line["status"] == "ok" for line in kept)
        server.answer = answer
        assert main(words) == 0
    assert [line["index"] for line in lines_of(output)] == list(range(10))
    assert all(line["status"] == "ok" for line in lines_of(output))


def test_several_servers_share_the_rows(write: Write, tmp_path: Path) -> None:
    rows = [{"text": f"{number} {'x' * (number % 50)}"} for number in range(600)]
    output = tmp_path / "out.jsonl"
    with endpoint() as one, endpoint() as other:
        words = ["--url", f"{one.url},{other.url}", "--batch-rows", "8", "-o", str(output)]
        assert main([write("rows.jsonl", rows), *words]) == 0
        assert len(one.asked) > 5 and len(other.asked) > 5
    assert [line["scores"]["reward"] for line in lines_of(output)] == [
        float(len(row["text"])) for row in rows
    ]


def test_rows_are_scored_from_python_by_any_reward() -> None:
    rows = [{"prompt": "6 x 7?", "completion": "#### 42", "answer": "It is 42.\n#### 42"}, "no answer"]
    right, wrong = conch.score(rows, "verifier:gsm8k")
    assert right.scores == {"answer": 1.0} and not wrong.ok
    (named,) = conch.score(["abc"], lambda samples, prompts, outputs: [float(len(samples[0]))])
    assert named.scores == {"reward": 3.0}


def test_reward_that_compares_a_group_is_refused(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="conch score has each scored by itself"):
        conch.score(["a"], group_rewards.ranked)
    assert main([write("rows.jsonl", ROWS), "--reward", f"{group_rewards.__file__}:ranked"]) == 1
    assert "conch score has each scored by itself" in capsys.readouterr().err
