"""Commands of `conch` refuse an unknown option by the nearest one."""

from __future__ import annotations

import pytest

from conch.__main__ import main as conch_main


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("runs --jsno", "unknown option --jsno; did you mean --json?"),
        ("runs diff a b --alll", "unknown option --alll; did you mean --all?"),
        ("plot a --hepl", "unknown option --hepl; did you mean --help?"),
        ("doctor --no-sever", "unknown option --no-sever; did you mean --no-server?"),
        ("report a --ouput x", "unknown option --ouput; did you mean --output?"),
    ],
)
def test_commands_name_the_nearest_option(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        conch_main(line.split())
    assert (leaving.value.code, capsys.readouterr().err) == (2, f"error: {said}\n")
