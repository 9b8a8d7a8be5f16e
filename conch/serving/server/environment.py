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
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from conch.errors import ServerStartError, install_extra, requirements_of

_EXTRA = "serve"
_OWN = {"nvidia-pytriton": "pytriton", "numpy": "numpy"}
"""What an environment beside has of its own: package -> its folder. The rest of the extra is for training."""

_PACKAGE_FOLDERS = ("site-packages", "dist-packages")
_STAMP = "made_for.json"
_PARENTS = "made_for.pth"
_PIP_WITH_PYTHON = (22, 3)
"""The first pip that installs into another environment (`--python`)."""

_ELSEWHERE = ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_USER")
"""Variables that have pip see packages of, or install into, another place than the environment."""

_INSTALL_TIMEOUT_S = 1800.0
_ERROR_LINES = 4


@dataclass(frozen=True, slots=True)
class ModelPython:
    """An environment that models can run in.

    prefix: its folder.
    packages: its folder of Python packages, which nvidia-pytriton lies in.
    is_beside: whether it was made beside this one.
    """

    prefix: Path
    packages: Path
    is_beside: bool

    @property
    def program(self) -> Path:
        """Its Python."""
        return self.prefix / "bin" / "python3"

    @property
    def remedy(self) -> str:
        """What to do where it is damaged."""
        return "conch serve install --anew" if self.is_beside else install_extra("serve")


def model_python() -> ModelPython:
    """Return the environment that the bundled server's models run in.

    This one, if it has nvidia-pytriton and numpy 1, else the one beside it.

    Raises:
        ServerStartError: neither is there; says what to install.
    """
    problem = _problem_of_this()
    if problem is None:
        spec = importlib.util.find_spec("pytriton")
        if spec is None or spec.origin is None:
            raise ServerStartError(
                f"nvidia-pytriton is installed without its files in {sys.prefix}: {install_extra('serve')}"
            )
        return ModelPython(Path(sys.prefix), Path(spec.origin).parents[1], is_beside=False)
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
    home = os.environ.get("XDG_DATA_HOME", "")
    if not os.path.isabs(home):  # which the XDG specification has ignored
        home = os.path.expanduser("~/.local/share")
    made_for = hashlib.sha256(json.dumps(_made_for(), sort_keys=True).encode()).hexdigest()
    name = f"cp{sys.version_info.major}{sys.version_info.minor}-{made_for[:8]}"
    return Path(home) / "conch" / "server-environments" / name


def is_environment_beside_made() -> bool:
    """Whether `make_environment_beside` has come to its end."""
    return (environment_beside() / _STAMP).is_file()


def make_environment_beside(*, anew: bool = False) -> ModelPython:
    """Make the environment beside this one, if it is not there yet.

    What was interrupted is made anew by the next call; of two at once the second waits for the first.

    anew: make it again though it is there.

    Raises:
        ServerStartError: the folder cannot be written, or pip fails, in pip's own words.
    """
    folder = environment_beside()
    if anew or not is_environment_beside_made():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise ServerStartError(
                f"the environment {folder} cannot be made ({error.strerror}); "
                "set XDG_DATA_HOME to a folder that can be written"
            ) from error
        with _locked(lock):
            if anew or not is_environment_beside_made():
                _make(folder, lock)
    return _described(folder)


def requirements() -> list[str]:
    """Return what pip is asked for: those of the extra `serve` that models need."""
    return [each for each in requirements_of(_EXTRA) if re.split(r"[^\w-]", each, maxsplit=1)[0] in _OWN]


def _make(folder: Path, lock: int) -> None:
    """lock: the descriptor of the lock, which pip holds as well, should it outlive this process."""
    if not requirements():
        raise ServerStartError(
            "what to install for the server is read from the metadata of Conch, which is not installed: "
            "pip install -e ."
        )
    (folder / _STAMP).unlink(missing_ok=True)  # first: what is there from now on is not whole
    shutil.rmtree(folder, ignore_errors=True)
    has_pip = _pip_version() >= _PIP_WITH_PYTHON
    try:
        # Links, as `python -m venv` makes them: a copied Python may not find its own library.
        venv.EnvBuilder(symlinks=True, with_pip=not has_pip).create(folder)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ServerStartError(
            f"{sys.executable} cannot make an environment in {folder} ({error}): it needs pip "
            f"{'.'.join(map(str, _PIP_WITH_PYTHON))}, or ensurepip (Debian: apt install python3-venv)"
        ) from error
    made = _described(folder)
    pip = [sys.executable, "-m", "pip", "--python", str(made.program)]
    _install(pip if has_pip else [str(made.program), "-m", "pip"], folder, lock)
    if missing := [name for name, place in _OWN.items() if not (made.packages / place).is_dir()]:
        raise ServerStartError(
            f"pip installed {' and '.join(missing)} elsewhere than into {folder}: see `pip config list`"
        )
    # Only now: pip would take the other numpy for one that it has to replace. Such folders are searched after
    # the environment's own, with what is installed editable in them.
    parents = [each for each in sys.path if Path(each).name in _PACKAGE_FOLDERS]
    lines = "".join(f"import site; site.addsitedir({each!r})\n" for each in parents)
    (made.packages / _PARENTS).write_text(lines, encoding="utf-8")
    (folder / _STAMP).write_text(json.dumps(_made_for(), indent=2) + "\n", encoding="utf-8")


def _install(pip: list[str], folder: Path, lock: int) -> None:
    # Without dependencies: pytriton's own are for its Python layer, which nobody uses here.
    command = [*pip, "--disable-pip-version-check", "install", "--no-deps", *requirements()]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_INSTALL_TIMEOUT_S,
            env={name: value for name, value in os.environ.items() if name not in _ELSEWHERE},
            pass_fds=(lock,),
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServerStartError(f"`{' '.join(command)}` does not come to its end: {error}") from error
    if done.returncode != 0:
        told = " ".join((done.stderr or done.stdout).strip().splitlines()[-_ERROR_LINES:])
        raise ServerStartError(f"pip could not install {' '.join(requirements())} into {folder}: {told}")


def _pip_version() -> tuple[int, ...]:
    """(22, 3); (0,) where there is no pip, as in an environment of uv."""
    with contextlib.suppress(PackageNotFoundError, ValueError):
        return tuple(int(part) for part in version("pip").split(".")[:2])
    return (0,)


def _described(folder: Path) -> ModelPython:
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return ModelPython(folder, folder / "lib" / python / "site-packages", is_beside=True)


def _made_for() -> dict[str, object]:
    return {"prefix": sys.prefix, "python": sys.version.split()[0], "packages": requirements()}


def _problem_of_this() -> str | None:
    """Return why models cannot run in this environment, and the remedy; None where they can."""
    beside = "`conch serve install` makes an environment with numpy 1 beside this one, once"
    try:
        numpy = version("numpy")
    except PackageNotFoundError:
        numpy = "0"  # told of the Python that models run in
    has_numpy_2 = int(numpy.split(".")[0]) >= 2
    try:
        version("nvidia-pytriton")
    except PackageNotFoundError:
        remedy = f"it needs numpy 1, and {numpy} is here: {beside}" if has_numpy_2 else install_extra("serve")
        return f"the package nvidia-pytriton, which carries tritonserver, is not installed: {remedy}"
    if has_numpy_2:
        return (
            f"numpy {numpy} is installed in {sys.prefix}; with numpy 2 the bundled tritonserver "
            f"silently turns tensors into zeros: {beside}; or pip install 'numpy<2'"
        )
    return None


@contextlib.contextmanager
def _locked(descriptor: int) -> Iterator[None]:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
