from __future__ import annotations

import pytest

from conch.errors import first_line


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
