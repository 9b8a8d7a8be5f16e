"""Rows of text files, and what is said about files that hold none."""

from __future__ import annotations

import gzip
import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest

from conch.config import DataConfig, load
from conch.data.files import Rows, evaluation_rows, place_of, read_rows, training_rows
from conch.data.formats import listed
from conch.errors import ConfigError, DataError


def written(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_text_file_gives_its_lines(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.txt", "one \n\n  two\r\nzwölf\n")

    assert read_rows(path) == ["one ", "  two", "zwölf"]


def test_jsonl_file_gives_its_values(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", '{"text": "a", "score": 0.5}\n\n"b"\n')

    assert read_rows(path) == [{"text": "a", "score": 0.5}, "b"]


def test_gzipped_jsonl_file_gives_its_values(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl.gz", gzip.compress(b'{"a": 1}\n{"a": 2}\n'))

    assert read_rows(path) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("rows.xml", "<a/>", "no such file is read as rows; rows are read from .txt, .jsonl, .json, .csv"),
        ("rows.txt", "\n \n", "is empty: give at least one row"),
        ("rows.txt", b"\xff\xfe", "cannot be read"),
        (
            "rows.jsonl",
            'a\n\n{"a": \n',
            "none of the 2 rows .* line 1 is not JSON: .* \\[and 1 more like it: line 3\\]",
        ),
        ("rows.json", '[{"a": 1},', "is not JSON"),
        ("rows.json", "[]", "is empty: give at least one row"),
        ("rows.parquet", "no parquet", "cannot be read"),
        ("rows.jsonl.gz", b"no gzip", "cannot be read"),
        ("rows.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 100)[:-12], "cannot be read"),
    ],
    ids=[
        *("another kind", "empty", "no UTF-8", "no line is JSON", "array cut short", "empty array"),
        *("no Parquet", "no gzip", "gzip cut short"),
    ],
)
def test_bad_file_is_refused_with_its_name(
    name: str, content: str | bytes, wanted: str, tmp_path: Path
) -> None:
    path = written(tmp_path / name, content)

    with pytest.raises(DataError, match=wanted) as caught:
        read_rows(path)
    assert str(path) in str(caught.value)


def test_missing_file_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt cannot be read: there is no such file"):
        read_rows(tmp_path / "nowhere.txt")


@pytest.mark.parametrize("name", ["nowhere.csv", "nowhere.parquet", "nowhere.json"])
def test_missing_table_is_refused_with_its_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{name} cannot be read: "):
        read_rows(tmp_path / name)


@pytest.mark.parametrize("content", ['[{"a": 1}, {"a": 2}]', '{"a": 1}\n{"a": 2}\n'], ids=["array", "lines"])
def test_json_file_gives_the_items_of_its_array_or_its_lines(content: str, tmp_path: Path) -> None:
    assert read_rows(written(tmp_path / "rows.json", content)) == [{"a": 1}, {"a": 2}]


def test_csv_file_gives_text_as_it_stands_and_numbers_as_numbers(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.csv", 'text,score\n"a, ""b""\nc",0.5\nNone,1\n,2\n')

    assert read_rows(path) == [
        {"text": 'a, "b"\nc', "score": 0.5},
        {"text": "None", "score": 1},
        {"text": None, "score": 2},
    ]


def test_parquet_file_gives_its_rows(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [{"messages": [{"role": "user", "content": "a"}], "n": number} for number in range(3)]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))

    assert read_rows(tmp_path / "rows.parquet") == rows


def test_saved_dataset_gives_the_rows_of_its_training_split(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    parts = {name: Dataset.from_list([{"a": name}]) for name in ("test", "train")}
    DatasetDict(parts).save_to_disk(str(tmp_path / "both"))
    parts["test"].save_to_disk(str(tmp_path / "one"))

    assert read_rows(tmp_path / "both") == [{"a": "train"}]
    assert read_rows(tmp_path / "one") == [{"a": "test"}]


def positive(row: Any) -> int:
    """A form: whole numbers above 0, tenfold."""
    if not isinstance(row, int) or row <= 0:
        raise DataError(f"is {row!r}, not above 0")
    return 10 * row


def test_bad_rows_are_left_out_counted_and_named_by_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("conch"), "propagate", True)
    path = written(tmp_path / "rows.jsonl", "1\n-2\n\nx\n3\n" + "-1\n" * 5)

    with caplog.at_level(logging.WARNING, "conch"):
        assert read_rows(path, form=positive) == [10, 30]
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith(
        f"7 of 9 rows of {path} left out: line 2 is -2, not above 0 "
        "[and 5 more like it: line 6, line 7, ...]; line 4 is not JSON"
    )


def test_reasons_are_counted_the_most_frequent_first_and_named_up_to_five(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("conch"), "propagate", True)
    words = ["one", "two", "three", "four", "five", "six", "six", "good"]
    path = written(tmp_path / "rows.txt", "\n".join(words))

    def form(row: Any) -> str:
        if row != "good":
            raise DataError(f"says {row}")
        return row

    with caplog.at_level(logging.WARNING, "conch"):
        assert read_rows(path, form=form) == ["good"]
    (record,) = caplog.records
    assert record.getMessage() == (
        f"7 of 8 rows of {path} left out: line 6 says six [and 1 more like it: line 7]; line 1 says one; "
        "line 2 says two; line 3 says three; line 4 says four; and 1 more, for other reasons"
    )


def test_a_file_without_one_good_row_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", "-1\n-2\n")

    with pytest.raises(DataError, match=r"none of the 2 rows of .*rows\.jsonl can be used: line 1 is -1"):
        read_rows(path, form=positive)


def test_reading_ends_with_the_last_row_that_is_wanted(tmp_path: Path) -> None:
    # What follows would be refused.
    content = gzip.compress(b"-1\n1\n2\n" + b"3\n" * 10_000)[:-12]

    assert read_rows(written(tmp_path / "a.jsonl.gz", content), form=positive, max_rows=2) == [10, 20]


def test_configuration_names_rows_to_train_on_and_to_evaluate_on(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", "1\n2\n3\n")
    config = load(DataConfig, {"train": path, "eval": str(path), "max_rows": 2, "max_eval_rows": 1})

    assert training_rows(config, "numbers", form=positive) == [10, 20]
    assert evaluation_rows(config, form=positive) == [10]
    assert evaluation_rows(DataConfig(), form=positive) is None
    with pytest.raises(ConfigError, match=r"no numbers: set `data\.train`"):
        training_rows(DataConfig(), "numbers", form=positive)


@pytest.mark.parametrize("source", ["./nowhere", "a/b/c", "/nowhere/at/all"])
def test_a_path_to_nothing_is_not_looked_for_on_the_hub(source: str) -> None:
    with pytest.raises(DataError, match=rf"{source}: no such file is there \(.*\); rows are read from"):
        read_rows(source)


@pytest.mark.parametrize(
    ("source", "meant"),
    [
        ("./promts", "prompts.jsonl"),
        ("outputs/promts", "outputs/prompts"),
        ("outputs/runs/one/two", "outputs/run/one/two"),
        ("~/promts.jsonl", "{home}/prompts.jsonl"),
        ("promts", "prompts.jsonl"),
    ],
)
def test_a_path_with_a_slip_names_what_was_meant(
    source: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outputs/prompts").mkdir(parents=True)
    (tmp_path / "outputs/run").mkdir()
    written(tmp_path / "prompts.jsonl", '"a"')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    # What asks the hub would say so; here it may not, and says that at once.
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=re.escape(f"did you mean {meant.format(home=tmp_path)}?")) as error:
        read_rows(source)
    assert ("no such file is there" in str(error.value) or "cannot be read: there" in str(error.value)) == (
        source != "promts"
    )


def test_a_path_below_home_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    written(tmp_path / "rows.jsonl", "1")
    assert read_rows("~/rows.jsonl", form=positive) == [10]


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can write where `datasets` keeps copies."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", "/proc/nowhere/datasets")


@pytest.mark.usefixtures("no_cache")
def test_tables_are_read_without_a_cache(tmp_path: Path) -> None:
    file = written(tmp_path / "rows.csv", "a\n1\n2\n")
    assert read_rows(file) == [{"a": 1}, {"a": 2}]


@pytest.mark.usefixtures("no_cache")
def test_cache_that_cannot_be_written_is_told_with_a_remedy(tmp_path: Path) -> None:
    written(tmp_path / "data/train.jsonl", json.dumps({"a": 1}))
    with pytest.raises(DataError, match=r"data cannot be read: .*/proc/nowhere.*; set HF_HOME to a folder"):
        read_rows(tmp_path / "data")


def test_folder_gives_its_training_split(tmp_path: Path) -> None:
    for split in ("train", "test"):
        written(tmp_path / f"data/{split}.jsonl", json.dumps({"a": split}))

    assert read_rows(tmp_path / "data") == [{"a": "train"}]


@pytest.mark.parametrize("indent", [None, 1])
def test_folder_of_json_arrays_keeps_numbers_as_they_are_written(tmp_path: Path, indent: int | None) -> None:
    scores = [0.12345678901, 0.12345678905]  # equal when rounded to ten decimals
    rows = [{"answers": ["a", "b"], "scores": scores}, {"answers": ["c"], "scores": [math.nan]}]
    (tmp_path / "data").mkdir()
    written(tmp_path / "data/train-1.json", "\n" + json.dumps(rows, indent=indent))
    written(tmp_path / "data/train-2.jsonl", json.dumps({"answers": ["d"], "scores": [1e-11]}))
    written(tmp_path / "data/test.json", json.dumps([{"answers": [], "scores": []}]))

    read = read_rows(tmp_path / "data")

    assert [row["scores"] for row in read] == [scores, pytest.approx([math.nan], nan_ok=True), [1e-11]]
    assert read.places[2] == f"{tmp_path / 'data'} row 3"
    assert read_rows(f"{tmp_path / 'data'}", DataConfig(subset="default")) == read


def test_rows_know_the_places_that_they_were_read_from(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", '{"n": 1}\n\nno json\n{"n": 2}\n')
    rows = read_rows(path, form=lambda row: row["n"])
    assert (rows, rows.places) == ([1, 2], [f"{path} line 1", f"{path} line 4"])
    assert place_of(listed(rows, "rows"), 1, "row") == f"{path} line 4"
    table = written(tmp_path / "rows.csv", "a\n1\n2\n")
    assert read_rows(table).places == [f"{table} row 1", f"{table} row 2"]


def test_rows_that_were_read_nowhere_are_named_by_number() -> None:
    assert place_of(["a", "b"], 1, "prompt") == "prompt 1"
    assert place_of(Rows(["a"], ["a.txt line 3"]), 0, "prompt") == "a.txt line 3"
