"""The wheel holds `conch` alone and works without the checkout it was built from."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "conch", "trainers", "converters", "configs")


def run(*command: str | Path, cwd: Path, code: int = 0) -> str:
    """Run a command without this process's import paths, and give what it printed: on stderr, where it is to
    leave with another code than 0."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == code, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result.stderr if code else result.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, and the wheel that was built from it."""
    source = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source / name)
    output = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", output, cwd=source)
    return output


@pytest.fixture(scope="module")
def installed(distributions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment outside the checkout: the wheel, and a view of its dependencies."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    wheel = next(distributions.glob("*.whl"))
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=folder.parent)
    # Only a path: files ending in .pth are not read there, so an editable Conch in it stays out of sight.
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder.parent)
    (Path(packages.strip()) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def source_modules() -> set[str]:
    """Path in the wheel of every Python file of the library, those behind the two links included."""
    own = {file.relative_to(ROOT) for file in (ROOT / "conch").rglob("*.py")}
    linked = {
        Path("conch") / file.relative_to(ROOT)
        for name in ("trainers", "converters")
        for file in (ROOT / name).rglob("*.py")
    }
    return {str(file) for file in own | linked}


def test_wheel_top_level_is_conch_alone(distributions: Path) -> None:
    names = zipfile.ZipFile(next(distributions.glob("*.whl"))).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"conch"}


def test_wheel_holds_every_module_and_the_type_marker(distributions: Path) -> None:
    names = set(zipfile.ZipFile(next(distributions.glob("*.whl"))).namelist())
    assert source_modules() | {"conch/py.typed"} <= names
    assert "conch/converters/triton_models/reward_model.py" in names
    assets = {str(file.relative_to(ROOT)) for file in (ROOT / "conch/report/assets").iterdir()}
    assert len(assets) > 5 and assets <= names
    presets = {f"conch/{file.relative_to(ROOT)}" for file in (ROOT / "configs").rglob("*.yaml")}
    assert len(presets) > 40 and presets <= names


def test_source_distribution_holds_files_where_the_checkout_has_links(distributions: Path) -> None:
    with tarfile.open(next(distributions.glob("*.tar.gz"))) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    assert members["conch/trainers/ppo.py"].isfile()
    assert members["conch/configs/scheduler/cosine.yaml"].isfile()
    assert not any(member.issym() or member.islnk() for member in members.values())


def test_installed_wheel_imports_its_own_trainers(installed: Path) -> None:
    program = "import conch, conch.trainers.ppo as ppo; print(conch.__file__, ppo.__file__, sep='\\n')"
    for file in run(installed, "-c", program, cwd=installed.parent).splitlines():
        assert Path(file).is_relative_to(installed.parents[1])


def test_installed_wheel_has_no_bare_names(installed: Path) -> None:
    program = "from importlib.util import find_spec; print(find_spec('trainers'), find_spec('converters'))"
    assert run(installed, "-c", program, cwd=installed.parent).strip() == "None None"


def test_installed_wheel_has_its_commands(installed: Path) -> None:
    folder = installed.parent
    assert "--checkpoint" in run(folder / "conch-to-triton", "--help", cwd=folder)
    assert "rollout-server" in run(folder / "conch", "--help", cwd=folder)
    assert "reward-model" in run(folder / "conch", "train", "--help", cwd=folder)


@pytest.mark.parametrize(
    ("program", "word", "line"),
    [("ppo", "scheduler=cosine", "  name: cosine"), ("best-of-n", "best_of_n.seed=3", "  seed: 3")],
)
def test_installed_wheel_has_the_presets(installed: Path, program: str, word: str, line: str) -> None:
    conch, folder = installed.parent / "conch", installed.parent
    mistake = run(conch, program, "model.pth=m", cwd=folder, code=1)
    assert "unknown key `model.pth`; did you mean `model.path`?" in mistake
    shown = run(conch, program, "--print-config", "model.path=m", word, cwd=folder).splitlines()
    assert line in shown and "  path: m" in shown
