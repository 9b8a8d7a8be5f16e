"""An environment for served models beside this one: what it has of its own, and what of this one."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
import threading
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from conch.errors import ServerStartError
from conch.serving import __main__ as serving
from conch.serving.server import environment
from conch.serving.server.environment import (
    environment_beside,
    is_environment_beside_made,
    make_environment_beside,
    model_python,
    requirements,
)


def write_wheel(folder: Path, name: str, release: str) -> None:
    """A package that holds its version in a variable, and no more."""
    module, head = name.replace("-", "_"), f"{name.replace('-', '_')}-{release}.dist-info"
    if name == "nvidia-pytriton":
        module = "pytriton"
    files = {
        f"{module}/__init__.py": f"own = {release!r}\n",
        f"{head}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n",
        f"{head}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = [
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip('=')},"
        f"{len(text)}"
        for path, text in files.items()
    ]
    files[f"{head}/RECORD"] = "\n".join([*lines, f"{head}/RECORD,,"]) + "\n"
    with zipfile.ZipFile(folder / f"{head.removesuffix('.dist-info')}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where pip finds packages, instead of in an index; environments are made below `tmp_path`."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    write_wheel(folder, "nvidia-pytriton", "0.7.0")
    write_wheel(folder, "numpy", "1.26.4")
    write_wheel(folder, "numpy", "2.3.5")
    return folder


@pytest.fixture
def with_numpy_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy 2, as far as the metadata of this environment tell."""
    told = tmp_path / "packages" / "numpy-2.3.5.dist-info"
    told.mkdir(parents=True)
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 2.3.5\n")
    monkeypatch.syspath_prepend(str(told.parent))


def test_requirements_are_those_of_the_extra_that_models_need() -> None:
    assert sorted(requirements()) == ["numpy<2", "nvidia-pytriton==0.7.0"]


def test_environment_with_numpy_1_needs_no_other(index: Path) -> None:
    assert model_python().prefix == Path(sys.prefix)
    assert not is_environment_beside_made()


@pytest.mark.usefixtures("with_numpy_2")
def test_environment_with_numpy_2_is_refused_until_there_is_one_beside(index: Path) -> None:
    with pytest.raises(ServerStartError, match=r"numpy 2\.3\.5 .* zeros: .*`conch serve install`"):
        model_python()
    made = make_environment_beside()
    assert model_python() == made and made.prefix == environment_beside()


def test_own_packages_come_first_and_all_else_is_of_this_environment(index: Path) -> None:
    made = make_environment_beside()
    # Without torch's own start, which takes seconds and wants a real numpy.
    probe = (
        "import json, numpy, pytriton, importlib.metadata as m; "
        "print(json.dumps([numpy.own, pytriton.own, m.version('numpy'), m.version('torch')]))"
    )
    answer = subprocess.run([made.program, "-I", "-c", probe], capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout) == ["1.26.4", "0.7.0", "1.26.4", version("torch")]
    assert made.program.is_symlink()


def test_what_is_installed_editable_here_is_found_by_models(index: Path, tmp_path: Path) -> None:
    package = tmp_path / "here/site-packages"
    package.mkdir(parents=True)
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout/being_written.py").touch()
    (package / "editable.pth").write_text(f"{tmp_path / 'checkout'}\n")
    sys.path.append(str(package))
    try:
        made = make_environment_beside()
    finally:
        sys.path.remove(str(package))
    subprocess.run([made.program, "-I", "-c", "import being_written"], check=True)


def test_environment_without_a_pip_that_will_do_brings_its_own(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "packages" / "pip-22.2.dist-info"
    told.mkdir(parents=True)
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: pip\nVersion: 22.2\n")
    monkeypatch.syspath_prepend(str(told.parent))
    made = make_environment_beside()
    assert (made.packages / "pip").is_dir() and is_environment_beside_made()


@pytest.mark.parametrize("variable", ["PIP_TARGET", "PYTHONPATH"])
def test_variables_that_lead_pip_elsewhere_do_not(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    there = tmp_path / "numpy-1.26.4.dist-info"
    there.mkdir()
    (there / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.26.4\n")
    monkeypatch.setenv(variable, str(tmp_path))
    made = make_environment_beside()
    assert (made.packages / "numpy").is_dir()


def test_folder_is_below_the_home_where_the_variable_is_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert environment_beside().is_relative_to("/home/somebody/.local/share/conch")


def test_what_is_there_is_kept_and_what_was_interrupted_made_anew(index: Path) -> None:
    made = make_environment_beside()
    mark = made.prefix / "mark"
    mark.touch()
    make_environment_beside()
    assert mark.is_file()
    (made.prefix / environment._STAMP).unlink()  # as a kill leaves it
    make_environment_beside()
    assert not mark.exists() and is_environment_beside_made()


def test_environment_is_not_taken_for_whole_while_it_is_made_anew(index: Path) -> None:
    made = make_environment_beside()
    mark = made.prefix / "mark"
    mark.touch()
    make_environment_beside(anew=True)
    assert not mark.exists()
    for wheel in index.glob("nvidia*"):
        wheel.unlink()
    with pytest.raises(ServerStartError, match="pip could not install"):
        make_environment_beside(anew=True)
    assert not is_environment_beside_made()


def test_second_of_two_at_once_waits_and_takes_what_the_first_made(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []
    make = environment._make
    monkeypatch.setattr(environment, "_make", lambda folder, lock: (made.append(folder), make(folder, lock)))
    threads = [threading.Thread(target=make_environment_beside) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert made == [environment_beside()] and is_environment_beside_made()


def test_failure_of_pip_is_told_in_its_words_and_leaves_nothing_to_use(index: Path) -> None:
    for wheel in index.glob("nvidia*"):
        wheel.unlink()
    with pytest.raises(ServerStartError, match=r"pip could not install .* No matching distribution"):
        make_environment_beside()
    assert not is_environment_beside_made()


def test_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    with pytest.raises(ServerStartError, match=r"cannot be made \(Not a directory\); set XDG_DATA_HOME"):
        make_environment_beside()


def test_command_makes_nothing_where_models_run_in_this_environment(
    index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serving.main(["install"]) == 0
    assert capsys.readouterr().out.startswith("nothing to do: ") and not is_environment_beside_made()


@pytest.mark.usefixtures("with_numpy_2")
def test_command_looks_at_what_it_has_made(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serving.main(["install"]) == 1  # these packages carry no server
    written = capsys.readouterr()
    assert f"into {environment_beside()}" in written.out and is_environment_beside_made()
    assert "nvidia-pytriton is installed without " in written.err
    assert written.err.endswith(": conch serve install --anew\n")
