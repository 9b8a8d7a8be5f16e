from __future__ import annotations

import pytest

from conch.cli import written_with
from conch.converters import ensemble, to_triton
from conch.serving import __main__ as serving


def test_written_with_changes_names_and_leaves_values_alone() -> None:
    given = ["--model-store", "my-store", "--max_queue_delay_us=3", "--name=a-b_c", "up"]

    assert written_with("_", given) == [
        "--model_store",
        "my-store",
        "--max_queue_delay_us=3",
        "--name=a-b_c",
        "up",
    ]
    assert written_with("-", given) == [
        "--model-store",
        "my-store",
        "--max-queue-delay-us=3",
        "--name=a-b_c",
        "up",
    ]


@pytest.mark.parametrize("store", ["--model_store", "--model-store"])
@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (to_triton.main, ["--checkpoint", "./no/such/model", "--name", "walks"]),
        (ensemble.main, ["--members", "a", "b", "--objective", "mean", "--name", "both"]),
        (serving.main, ["up", "--model", "walks"]),
    ],
)
def test_commands_take_dashes_and_underscores(command, arguments, store: str, tmp_path, capsys) -> None:
    assert command([*arguments, f"{store}={tmp_path}/none"]) == 1

    assert "error:" in capsys.readouterr().err  # a sentence of ours; argparse would have left with code 2
