"""Every file and folder that docs/architecture.md names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`((?:conch|trainers|converters|tests|docs)/[\w/.]*)`", PAGE)))


def test_the_page_names_twenty_files_at_least() -> None:
    assert len([name for name in NAMED if name.endswith(".py")]) >= 20


@pytest.mark.parametrize("name", NAMED)
def test_what_the_page_names_exists(name: str) -> None:
    path = ROOT / name
    assert path.is_dir() if name.endswith("/") else path.is_file()
