"""What tests need from outside: packages of others from an index, and what becomes of a test without them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import pytest

NO_SKIP = "CONCH_TESTS_NO_SKIP"
"""Environment variable: what would be left out for want of something outside fails instead."""


def leave_out(reason: str) -> NoReturn:
    """Skip the test, or fail where nothing may be left out."""
    if os.environ.get(NO_SKIP, "") not in ("", "0"):
        pytest.fail(f"{reason} ({NO_SKIP} is set: nothing is left out)", pytrace=False)
    pytest.skip(reason)


def install(
    packages: Sequence[str], *more: str | Path, python: str | Path = sys.executable, timeout_s: float = 900
) -> None:
    """Install packages of others by pip; a test without them is left out.

    more: words of pip's: `--no-deps`, `--target`, a folder.
    python: of the environment that gets them.
    """
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *more, *packages]
    try:
        done = subprocess.run(pip, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        leave_out(f"needs {' '.join(packages)}: pip has not got them within {timeout_s:.0f} s")
    if done.returncode:
        leave_out(f"needs {' '.join(packages)}: {done.stderr.strip()[-500:]}")
