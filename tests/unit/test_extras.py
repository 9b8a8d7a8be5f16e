"""What is not installed is told with a command that installs it, one that asks no index for `conch`."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

from conch import errors

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = re.findall(
    r"^([\w-]+) = \[",
    (ROOT / "pyproject.toml")
    .read_text(encoding="utf-8")
    .partition("[project.optional-dependencies]")[2]
    .partition("\n[")[0],
    re.MULTILINE,
)
FROM_AN_INDEX = re.compile(r"pip install[^\n#]*[ '\"]conch(\[|[ `'\",=<>~!]|$)", re.MULTILINE)
"""No index has a `conch` of ours."""


def texts() -> list[Path]:
    code = [path for name in ("conch", "trainers", "converters") for path in (ROOT / name).rglob("*.py")]
    pages = [path for name in ("docs", "examples", "singularity") for path in (ROOT / name).rglob("*.md")]
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *pages, *(ROOT / "examples").rglob("*.py"), *code]


def test_nothing_tells_to_install_conch_from_an_index() -> None:
    assert FROM_AN_INDEX.search("pip install conch trl") and FROM_AN_INDEX.search("pip install 'conch[ray]'")
    assert [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in texts()
        for match in FROM_AN_INDEX.finditer(path.read_text(encoding="utf-8"))
    ] == []


def test_each_extra_that_is_named_is_one() -> None:
    named = {
        extra
        for path in texts()
        for match in re.findall(
            r"install_extra\(['\"]([\w-]+)|pip install -e '[./]+\[([\w,-]+)\]",
            path.read_text(encoding="utf-8"),
        )
        for extra in "".join(match).split(",")
    }
    assert {"serve", "service", "goals"} <= named
    assert named - {*EXTRAS} == set()


def test_page_has_each_extra_and_what_make_install_leaves_out() -> None:
    page = (ROOT / "docs/install.md").read_text(encoding="utf-8")
    listed = [
        name
        for cell in re.findall(r"^\| ((?:`[\w-]+`(?:, )?)+) \|", page, re.MULTILINE)
        for name in cell.split(", ")
    ]
    assert sorted(name.strip("`") for name in listed) == sorted(EXTRAS)
    made = re.search(r"^EXTRAS := (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    sentence = re.search(r"`make install` has all but (.+?)\.", page, re.DOTALL)
    assert made is not None and sentence is not None
    assert {*re.findall(r"`([\w-]+)`", sentence[1])} - {"dev"} == {*EXTRAS} - {*made[1].split(",")}


def test_extra_of_a_checkout_is_installed_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert errors.install_extra("service") == f"pip install -e '{ROOT}[service]'"


def test_extra_of_a_wheel_is_the_packages_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, about = tmp_path / "conch", tmp_path / "conch-0.1.0.dist-info"
    package.mkdir()
    shutil.copy(ROOT / "conch/errors.py", package)
    about.mkdir()
    wants = ["torch>=2.8", "fastapi>=0.115; extra == 'service'", 'uvicorn>=0.30; extra == "service"']
    wants += ['uvloop>=0.21; extra == "reward-server"', 'math-verify[antlr4_9_3]<0.10,>=0.9; extra == "math"']
    lines = [
        "Metadata-Version: 2.4",
        "Name: conch",
        "Version: 0.1.0",
        *(f"Requires-Dist: {each}" for each in wants),
    ]
    (about / "METADATA").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    spec = importlib.util.spec_from_file_location("installed_errors", package / "errors.py")
    assert spec is not None and spec.loader is not None
    installed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(installed)
    assert installed.install_extra("service") == "pip install 'fastapi>=0.115' 'uvicorn>=0.30'"
    assert installed.install_extra("reward-server") == "pip install 'uvloop>=0.21'"
    assert installed.install_extra("math") == "pip install 'math-verify[antlr4_9_3]<0.10,>=0.9'"
    assert installed.install_extra("none") == "pip install -e '.[none]' in a checkout of Conch"
