"""The environment that the bundled server's models run in: this one, or one that `conch serve install` makes
beside it.

The python back end of nvidia-pytriton 0.7.0 was built for numpy 1 and, with numpy 2, turns tensors into zeros
without a word; vLLM needs numpy 2. The environment beside is a venv that has nvidia-pytriton and numpy 1 of
its own. All else, torch and transformers above all, it takes from the environment that it was made for,
by a .pth file: a served model computes with the libraries that it was converted with, and nothing large is
installed twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from conch.errors import ServerStartError, install_extra

_EXTRA = "serve"
_PACKAGES = ("nvidia-pytriton", "numpy")
"""What an environment beside has of its own; the others of the extra are for training."""

_PACKAGE_FOLDERS = ("site-packages", "dist-packages")
_STAMP = "made_for.json"
_PARENTS = "made_for.pth"
_INSTALL_TIMEOUT_S = 1800.0
_ERROR_LINES = 4


@dataclass(frozen=True, slots=True)
class ModelPython:
    """An environment that models can run in.

    prefix: its folder.
    packages: its folder of Python packages, which nvidia-pytriton lies in.
    """

    prefix: Path
    packages: Path

    @property
    def program(self) -> Path:
        """Its Python."""
        return self.prefix / "bin" / "python3"


def model_python() -> ModelPython:
    """Return the environment that the bundled server's models run in.

    This one, if it has nvidia-pytriton and numpy 1, else the one beside it.

    Raises:
        ServerStartError: neither is there; says what to install.
    """
    problem = _problem_of_this()
    if problem is None:
        spec = importlib.util.find_spec("pytriton")
        assert spec is not None and spec.origin is not None  # the package is installed
        return ModelPython(Path(sys.prefix), Path(spec.origin).parents[1])
    if not is_environment_beside_made():
        raise ServerStartError(problem)
    return _described(environment_beside())


def is_own_python_fit() -> bool:
    """Whether models can run in this environment itself."""
    return _problem_of_this() is None


def environment_beside() -> Path:
    """Return the folder of the environment that belongs to this one, whether it is there or not.

    Below $XDG_DATA_HOME, by default ~/.local/share; another Python, another environment or another Conch that
    wants other packages has another one.
    """
    home = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    made_for = hashlib.sha256(json.dumps(_made_for(), sort_keys=True).encode()).hexdigest()
    name = f"cp{sys.version_info.major}{sys.version_info.minor}-{made_for[:8]}"
    return Path(home) / "conch" / "server-environments" / name


def is_environment_beside_made() -> bool:
    """Whether `make_environment_beside` has come to its end."""
    return (environment_beside() / _STAMP).is_file()


def make_environment_beside(*, anew: bool = False) -> ModelPython:
    """Make the environment beside this one, if it is not there yet.

    What was interrupted is made anew by the next call; of two at once the second waits for the first.

    anew: make it in any case.

    Raises:
        ServerStartError: the folder cannot be written, or pip fails; says with which words.
    """
    folder = environment_beside()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock")):
            if anew or not is_environment_beside_made():
                _make(folder)
    except OSError as error:
        raise ServerStartError(
            f"the environment {folder} cannot be made ({error.strerror or error}); "
            "set XDG_DATA_HOME to a folder that can be written"
        ) from error
    return _described(folder)


def requirements() -> list[str]:
    """Return what pip is asked for: those of the extra `serve` that models need."""
    try:
        listed = [each.partition(";") for each in requires("conch") or ()]
    except PackageNotFoundError:
        listed = []
    of_extra = re.compile(rf"extra == ['\"]{_EXTRA}['\"]")
    wanted = [name.strip() for name, _, marker in listed if of_extra.search(marker)]
    return [each for each in wanted if re.split(r"[^\w-]", each, maxsplit=1)[0] in _PACKAGES]


def _make(folder: Path) -> None:
    if not requirements():
        raise ServerStartError(
            "which packages a server needs stands in Conch's own metadata: pip install -e ."
        )
    shutil.rmtree(folder, ignore_errors=True)
    has_pip = importlib.util.find_spec("pip") is not None  # which uv leaves out
    try:
        venv.create(folder, with_pip=not has_pip)
    except subprocess.CalledProcessError as error:  # Debian keeps ensurepip in a package of its own
        raise ServerStartError(
            f"{sys.executable} cannot make an environment with pip ({error}); "
            "Debian: apt install python3-venv"
        ) from error
    made = _described(folder)
    pip = [sys.executable, "-m", "pip", "--python", str(made.program)]
    command = [*(pip if has_pip else [str(made.program), "-m", "pip"]), "--disable-pip-version-check"]
    # Without dependencies: pytriton's own are for its Python layer, which nobody uses here.
    try:
        done = subprocess.run(
            [*command, "install", "--no-deps", *requirements()],
            capture_output=True,
            text=True,
            timeout=_INSTALL_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ServerStartError(f"pip did not end within {_INSTALL_TIMEOUT_S:.0f} s") from error
    if done.returncode != 0:
        told = " ".join((done.stderr or done.stdout).strip().splitlines()[-_ERROR_LINES:])
        raise ServerStartError(f"pip could not install {' '.join(requirements())} into {folder}: {told}")
    # Only now: pip would take the other numpy for one that it has to replace. Folders of a .pth file are
    # searched after the environment's own.
    parents = [each for each in sys.path if Path(each).name in _PACKAGE_FOLDERS]
    (made.packages / _PARENTS).write_text("".join(f"{each}\n" for each in parents), encoding="utf-8")
    (folder / _STAMP).write_text(json.dumps(_made_for(), indent=2) + "\n", encoding="utf-8")


def _described(folder: Path) -> ModelPython:
    return ModelPython(folder, Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)})))


def _made_for() -> dict[str, object]:
    return {"prefix": sys.prefix, "python": sys.version.split()[0], "packages": requirements()}


def _problem_of_this() -> str | None:
    """Return why models cannot run in this environment, and the remedy; None where they can."""
    beside = "`conch serve install` makes an environment with it beside this one, once"
    try:
        version("nvidia-pytriton")
    except PackageNotFoundError:
        return (
            "the package nvidia-pytriton, which carries tritonserver, is not installed: "
            f"{install_extra(_EXTRA)}; where numpy 2 is needed too (vLLM), {beside}"
        )
    with contextlib.suppress(PackageNotFoundError):  # no numpy at all is told of the Python that is asked
        if int(version("numpy").split(".")[0]) >= 2:
            return (
                f"numpy {version('numpy')} is installed in {sys.prefix}; with numpy 2 the bundled "
                f"tritonserver silently turns tensors into zeros: pip install 'numpy<2', or keep it: {beside}"
            )
    return None


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
