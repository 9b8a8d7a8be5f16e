"""Which test files run once more as on another processor: those whose results may hang on its kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processors import ELSEWHERE, ROOT, computes, is_numeric, main, numeric_files

LISTED = [file for files in ELSEWHERE.values() for file in files]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import torch\nassert x == pytest.approx(1.0)", True),
        ("from torch import nn\nassert torch.equal(x, y)", True),
        ("def test():\n    import torch.nn.functional as F\n    np.testing.assert_allclose(x, y)", True),
        ("from tests.runs import policy\nassert x == pytest.approx(1.0)", True),
        ("from tests import tiny\nassert_close(x, y)", True),
        ("import torch\nassert x == [1, 2]", False),
        ("import numpy as np\nnp.testing.assert_allclose(x, y)", False),
        ("from tests.clock import CLOCK\nassert x == pytest.approx(1.0)", False),
    ],
)
def test_files_that_compare_what_torch_computed_are_numeric(
    tmp_path: Path, text: str, expected: bool
) -> None:
    file = tmp_path / "test_some.py"
    file.write_text(text)
    assert is_numeric(file) is expected


def test_all_invariance_tests_and_formulas_of_trainers_run_again(tmp_path: Path) -> None:
    (tmp_path / "invariance").mkdir()
    (file := tmp_path / "invariance/test_some.py").write_text("assert x")
    assert is_numeric(file)
    found = numeric_files()
    assert {str(file.relative_to(ROOT)) for file in (ROOT / "tests/invariance").glob("test_*.py")} <= {*found}
    for name in ("trainers/test_ppo_math", "models/test_adapter", "rollouts/test_continuous_batching"):
        assert f"tests/unit/{name}.py" in found
    assert not {*found} & {*LISTED, "tests/unit/test_layout.py"}


@pytest.mark.parametrize("file", LISTED)
def test_an_exception_is_one(file: str) -> None:
    """Else the line can go."""
    assert is_numeric(ROOT / file)


def test_a_helper_of_a_helper_computes() -> None:
    assert computes(ROOT / "tests/numerics.py")  # by tests.tiny as well
    assert not computes(ROOT / "tests/clock.py")


def test_an_unknown_setting_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--numeric", "another"]) == 2
    assert "no setting another; there are native" in capsys.readouterr().err
