"""The tritonserver binary of the PyPI package nvidia-pytriton, and the Python that its models run in.

Only the package's files are used, never its Python layer. Its python back end starts a stub, which runs the
first `python3` on PATH: ours, so models see this environment's torch and transformers.
"""

from __future__ import annotations

import ctypes.util
import importlib.util
import json
import os
import platform
import shlex
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from conch.errors import ServerStartError

# Bytes; see mallopt(3). By its defaults glibc gives the memory of a forward pass back to the kernel, which
# zeroes every page before the next pass gets it again: 8 % of the time of a model on a CPU.
HEAP = {
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(128 * 2**20),
    "MALLOC_TOP_PAD_": str(8 * 2**20),
}

_INSTALL = "install the serving extra: pip install 'conch[serve]'"
_PROBE_TIMEOUT_S = 60.0
_PROBE = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
found = {"python": "%d.%d" % sys.version_info[:2]}
for name in ("numpy", "torch", "transformers"):
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""


@dataclass(frozen=True, slots=True)
class Bundle:
    """Where things are, in the installed nvidia-pytriton and in this Python.

    stub: the back end's Python host, for this Python's version.
    library_path: folders that the dynamic linker must search, in order.
    python_bin: folder of the `python3` that models run in.
    """

    server: Path
    backend: Path
    stub: Path
    library_path: tuple[Path, ...]
    python_bin: Path

    def environment(self, *, cpu_threads: int) -> dict[str, str]:
        """Environment variables of the server process."""
        inherited = os.environ.get("LD_LIBRARY_PATH", "")
        libraries = [str(folder) for folder in self.library_path] + ([inherited] if inherited else [])
        return {
            **HEAP,
            **os.environ,
            "LD_LIBRARY_PATH": os.pathsep.join(libraries),
            "PATH": os.pathsep.join([str(self.python_bin), os.environ.get("PATH", "")]),
            **model_variables(cpu_threads),
        }

    def make_backend_directory(self, scratch: Path) -> Path:
        """Lay out in `scratch` what `--backend-directory` wants; the package keeps the parts apart."""
        backends = scratch / "backends"
        target = backends / "python"
        target.mkdir(parents=True)
        for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
            (target / name).symlink_to(self.backend / name)
        (target / self.stub.name).symlink_to(self.stub)
        return backends


def find_bundle() -> Bundle:
    """Locate the server and check that its models will run right in this Python.

    Raises:
        ServerStartError: what is missing or of a wrong version, and what to install.
    """
    check_platform(platform.system(), platform.machine(), sys.version_info[:2])
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise ServerStartError(
            f"the package nvidia-pytriton, which carries tritonserver, is not installed; {_INSTALL}"
        )
    package = Path(spec.origin).parent
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    bundle = Bundle(
        server=package / "tritonserver" / "bin" / "tritonserver",
        backend=package / "tritonserver" / "backends" / "python",
        stub=package / "tritonserver" / "python_backend_stubs" / version / "triton_python_backend_stub",
        library_path=(_libpython_folder(), package.parent / "nvidia_pytriton.libs"),
        python_bin=Path(sys.prefix) / "bin",
    )
    for path in (bundle.server, bundle.backend, bundle.stub, bundle.library_path[1]):
        if not path.exists():
            raise ServerStartError(f"nvidia-pytriton is installed without {path}; {_INSTALL}")
    check_programs(bundle.server, bundle.stub)
    check_model_python(_probe_python(bundle.python_bin / "python3"))
    return bundle


def check_platform(system: str, machine: str, python: tuple[int, int]) -> None:
    """Refuse platforms that the bundled server was not built for.

    Raises:
        ServerStartError: names what this is and what is needed.
    """
    if (system, machine) != ("Linux", "x86_64"):
        raise ServerStartError(
            f"the bundled tritonserver runs on Linux x86_64, this is {system} {machine}; "
            "run a server elsewhere and set TRITON_HOST=host:port/model"
        )
    if not (3, 10) <= python <= (3, 12):
        raise ServerStartError(
            f"the bundled tritonserver needs Python 3.10, 3.11 or 3.12 and this is {python[0]}.{python[1]}; "
            "make the environment with one of those"
        )


def check_programs(*programs: Path) -> None:
    """Refuse programs that this user may not run: the server would only say so of a model, if at all.

    Raises:
        ServerStartError: names the program and what its owner can do.
    """
    for program in programs:
        if not os.access(program, os.R_OK | os.X_OK):
            raise ServerStartError(
                f"this user may not run {program}; whoever installed nvidia-pytriton must allow it: "
                f"chmod 755 {shlex.quote(str(program))}"
            )


def check_model_python(found: dict[str, str]) -> None:
    """Refuse an environment in which models would fail or, worse, score wrong.

    found: `python` and versions of the packages `numpy`, `torch` and `transformers` where installed.

    Raises:
        ServerStartError: names the package and what to install.
    """
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    if found["python"] != running:
        raise ServerStartError(
            f"`python3` beside {sys.executable} is Python {found['python']}, not {running}: "
            "use a virtual environment (python -m venv)"
        )
    missing = [name for name in ("numpy", "torch", "transformers") if name not in found]
    if missing:
        raise ServerStartError(
            f"models need {', '.join(missing)} in {sys.prefix}; pip install {' '.join(missing)}"
        )
    if int(found["numpy"].split(".")[0]) >= 2:
        raise ServerStartError(
            f"numpy {found['numpy']} is installed in {sys.prefix}; with numpy 2 the bundled tritonserver "
            "silently turns tensors into zeros: pip install 'numpy<2'"
        )


def _probe_python(python3: Path) -> dict[str, str]:
    try:
        done = subprocess.run(
            [python3, "-I", "-c", _PROBE],
            capture_output=True,
            text=True,
            timeout=_PROBE_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ServerStartError(
            f"{python3}, in which the server would run models, does not work ({error}); "
            "use a virtual environment (python -m venv)"
        ) from error
    return json.loads(done.stdout)


def _libpython_folder() -> Path:
    """Folder of this Python's shared library; it goes first, or the stub takes the system's Python."""
    name = str(sysconfig.get_config_var("INSTSONAME") or "")
    folder = Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib")
    for candidate in (folder, folder / (sysconfig.get_config_var("MULTIARCH") or "")):
        if ".so" in name and (candidate / name).exists():
            return candidate
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if ctypes.util.find_library(f"python{version}") is None:
        raise ServerStartError(
            f"the bundled tritonserver needs libpython{version}.so, which this Python ({sys.executable}) "
            "was built without; use a Python with a shared library (Debian: apt install libpython3-dev)"
        )
    return folder


def model_variables(cpu_threads: int) -> dict[str, str]:
    """Environment variables that every server process needs, wherever it runs."""
    return {
        "OMP_NUM_THREADS": str(cpu_threads),
        "MKL_NUM_THREADS": str(cpu_threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
