"""Blocks of the pages of the documentation, what markers say that they need, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = (
    *(ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted((ROOT / "examples").rglob("README.md"))),
    ROOT / "singularity/README.md",
)

_BLOCK = re.compile(
    r"^(?:<!-- needs: (?P<needs>[\w, ]+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
_ENDS_COMMAND = re.compile(r"[|;&()]+")
_HEREDOC = re.compile(r"<<'?(\w+)'?[^\n]*\n.*?^\1$", re.DOTALL | re.MULTILINE)
_FUNCTION = re.compile(r"^\w+\(\) \{.*\}$", re.MULTILINE)
_LOOP = re.compile(r"^for (\w+) in (\S+)[^;\n]*; do$", re.MULTILINE)
_VALUE = re.compile(r"^(\w+)=(\S+)(?: +#.*)?$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """Text between two fences.

    needs: words of the marker `<!-- needs: gpu, hub -->` directly above it.
    language: behind the fence; empty for what is no program.
    """

    needs: frozenset[str]
    language: str
    text: str


def blocks_of(text: str) -> Iterator[Block]:
    """Blocks of a page that begin at the margin, in their order."""
    for match in _BLOCK.finditer(text):
        needs = frozenset(re.findall(r"\w+", match["needs"] or ""))
        yield Block(needs, match["language"], match["text"])


def commands_of(text: str) -> Iterator[list[str]]:
    """Words of each command in a page's shell blocks, see `commands_in`."""
    for block in blocks_of(text):
        if block.language == "bash":
            yield from commands_in(block.text)


def commands_in(script: str) -> Iterator[list[str]]:
    """Words of each command of a shell script.

    A pipe's are two; variables in front, redirections, functions and what a heredoc holds are left out. A
    loop's body comes once, with the first value; a variable that the script itself sets has that value.
    """
    script = _HEREDOC.sub("", _FUNCTION.sub("", script.replace("\\\n", " ")))
    known = {name: value for pattern in (_LOOP, _VALUE) for name, value in pattern.findall(script)}
    for line in _VALUE.sub("", _LOOP.sub("", script)).splitlines():
        for name, value in known.items():
            line = re.sub(rf"\${name}\b|\$\{{{name}\}}", value.strip("\"'"), line)
        lexer = shlex.shlex(re.sub(r"\$\([^()]*\)", "VALUE", line), posix=True, punctuation_chars="|;&()<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, "|"]:
            if _ENDS_COMMAND.fullmatch(word):
                if words and words[0] != "done":
                    yield _without_redirections(words)
                words = []
            elif words or not re.match(r"[A-Z_0-9]+=", word):
                words.append(word)


def _without_redirections(words: list[str]) -> list[str]:
    marks = [place for place, word in enumerate(words) if re.fullmatch(r"[<>]+", word)]
    return words[: marks[0]] if marks else words
