"""Each message that docs/troubleshooting.md quotes stands in the code."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from conch.config import OnlineRunConfig, load
from conch.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"^### `(.+)`$", PAGE, re.MULTILINE)
GAP = "…"
SOURCES = ("conch", "trainers", "converters")


@functools.cache
def messages() -> list[str]:
    """Every text of the sources, with `…` for what is put into it."""
    found: list[str] = []
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found += [text for node in ast.walk(tree) if (text := text_of(node))]
    return found


def text_of(node: ast.AST) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[sd]|%\.\df", GAP, node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else GAP for part in node.values)
    return ""


def test_the_page_quotes_thirty_messages_at_least() -> None:
    assert len(QUOTED) >= 30 and len(set(QUOTED)) == len(QUOTED)


@pytest.mark.parametrize("quoted", QUOTED)
def test_message_of_the_page_stands_in_the_code(quoted: str) -> None:
    words = [re.escape(part) for part in re.split(r"\s*…\s*", quoted) if part.strip()]
    assert sum(len(part) for part in words) >= 12, "too little is quoted to be found"
    # A heading is code, so what is put in between backticks is left out with them.
    pattern = re.compile(r"[\s\S]{0,200}?".join(words))
    assert any(pattern.search(text) for text in messages())


def test_every_message_of_a_heading_has_its_answer() -> None:
    parts = re.split(r"^### `.+`$", PAGE, flags=re.MULTILINE)[1:]
    assert [len(part.strip()) > 40 for part in parts] == [True] * len(QUOTED)


def test_an_unknown_key_is_answered_as_the_page_says() -> None:
    with pytest.raises(ConfigError, match=r"unknown key `train\.lr`; did you mean `optimizer"):
        load(OnlineRunConfig, {"model": {"path": "m"}, "train": {"lr": 1e-5}})
