"""Every file, folder and function that docs/architecture.md names is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
STEPS = re.findall(r"^\| `([\w/]+\.py)` \| `([\w.]+)` \|", PAGE, flags=re.MULTILINE)
NAMED = sorted(set(re.findall(r"`((?:conch|trainers|converters|tests|docs)/[\w/.]*)`", PAGE)))


def test_the_page_names_twenty_files_at_least() -> None:
    assert len([name for name in NAMED if name.endswith(".py")]) >= 20


@pytest.mark.parametrize("name", NAMED)
def test_what_the_page_names_exists(name: str) -> None:
    path = ROOT / name
    assert path.is_dir() if name.endswith("/") else path.is_file()


def functions_of(path: Path) -> set[str]:
    """Names of functions, and of methods with their class."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    methods = {
        f"{node.name}.{name}"
        for node in body
        if isinstance(node, ast.ClassDef)
        for name in defined(node.body)
    }
    return methods | defined(body)


def defined(body: list[ast.stmt]) -> set[str]:
    return {node.name for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize(("file", "function"), STEPS)
def test_each_step_of_a_reward_is_where_the_page_says(file: str, function: str) -> None:
    assert function in functions_of(ROOT / file)


def test_a_reward_text_crosses_eight_files_at_most() -> None:
    assert 6 <= len(STEPS) == len({file for file, _ in STEPS}) <= 8
