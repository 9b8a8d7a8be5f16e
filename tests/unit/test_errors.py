from __future__ import annotations

from pathlib import Path

import pytest

from conch.errors import first_line, missing_path


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("\n one \r\ntwo"), "one"),
        (ValueError(""), "ValueError"),
        (KeyError(), "KeyError"),
        ("one\ntwo", "one"),
        ("", ""),
    ],
)
def test_first_line_is_the_text_s_or_the_type(error: BaseException | str, expected: str) -> None:
    assert first_line(error) == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("data/promts.jsonl", "; did you mean data/prompts.jsonl?"),
        ("dta/prompts.jsonl", "; did you mean data/prompts.jsonl?"),
        ("data/nothing-like-it", " (data/nothing-like-it does not exist in {here})"),
        ("elsewhere/prompts.jsonl", " (elsewhere does not exist in {here})"),
        ("{here}/elsewhere", " ({here}/elsewhere does not exist)"),
        ("data/prompts.jsonl/x", "; data/prompts.jsonl is a file"),
    ],
)
def test_missing_path_names_what_is_near_or_where_it_ends(
    path: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/prompts.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    assert missing_path(Path(path.format(here=tmp_path))) == expected.format(here=tmp_path)
