"""Tests that need packages of others are left out without them, or fail where they are told to."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.peers import NO_SKIP, install

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def no_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """pip finds packages in an empty folder only."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return tmp_path / "packages"


@pytest.mark.parametrize("value", [None, "", "0"])
def test_test_without_its_packages_is_left_out(
    value: str | None, no_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(NO_SKIP, raising=False)
    if value is not None:
        monkeypatch.setenv(NO_SKIP, value)
    with pytest.raises(pytest.skip.Exception, match="needs no-such-peer==1"):
        install(["no-such-peer==1"], "--no-deps", "--target", no_index)


def test_test_without_its_packages_fails_where_nothing_may_be_left_out(
    no_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NO_SKIP, "1")
    with pytest.raises(pytest.fail.Exception, match=f"(?s)needs no-such-peer==1: .*{NO_SKIP} is set"):
        install(["no-such-peer==1"], "--no-deps", "--target", no_index, python=sys.executable)


def test_tests_that_install_packages_take_the_one_helper() -> None:
    integration = (ROOT / "tests/integration").rglob("test_*.py")
    texts = {path.name: path.read_text(encoding="utf-8") for path in integration}
    installing = {name for name, text in texts.items() if "from tests.peers import" in text}
    assert {"test_front_clients.py", "test_interop_clients.py", "test_interop_trl_peers.py"} <= installing
    own = [name for name, text in texts.items() if '"pip"' in text and "pytest.skip(" in text]
    assert own == []
