"""What Python 3.10 cannot run and a checker of types does not see: classes that became generic later."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("conch", "converters", "trainers", "examples", "benchmarks", "singularity", "tests")
GENERIC_LATER = {
    *("logging.StreamHandler", "logging.LoggerAdapter", "csv.DictReader", "csv.DictWriter"),
}
"""As typeshed has them for all releases, so that pyright is content."""


def subscripted_bases(tree: ast.AST) -> Iterator[str]:
    """`logging.StreamHandler`, where a class has it with a type in brackets for its base."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield from (ast.unparse(base.value) for base in node.bases if isinstance(base, ast.Subscript))


def test_classes_have_no_bases_that_python_3_10_cannot_subscript() -> None:
    code = "import logging\nclass A(logging.StreamHandler[str]): ...\nclass B(dict[str, int]): ..."
    assert list(subscripted_bases(ast.parse(code))) == ["logging.StreamHandler", "dict"]
    found = [
        f"{path.relative_to(ROOT)}: {base}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        for base in subscripted_bases(ast.parse(path.read_text(encoding="utf-8")))
        if base in GENERIC_LATER
    ]
    assert found == []
