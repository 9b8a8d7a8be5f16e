"""Runtimes of a server: the bundled binary, an Apptainer (Singularity) image, or a Docker image.

A runtime reads the server's flags and gives the command that starts it; `server.py` starts and stops it. Pure
functions make the commands.

The bundled binary is the tritonserver of the PyPI package nvidia-pytriton. Only the package's files are used,
never its Python layer. Its python back end starts a stub, which runs the first `python3` on PATH: the one
that `environment.py` finds, so models see the torch and transformers of this environment.
"""

from __future__ import annotations

import ctypes.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

from conch.errors import ServerStartError
from conch.machine.processors import waiting_variables
from conch.serving.server.environment import ModelPython, model_python
from conch.serving.server.flags import ServerPaths, ServerSettings

_HELP_TIMEOUT_S = 120.0
_STORE_INSIDE = "/model_store"
_REPOSITORY = "repository"
_REPOSITORY_INSIDE = f"/{_REPOSITORY}"
_TLS_INSIDE = "/tls"
# Bytes; see mallopt(3). By its defaults glibc gives the memory of a forward pass back to the kernel, which
# zeroes every page before the next pass gets it again: 8 % of the time of a model on a CPU.
HEAP = {
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(128 * 2**20),
    "MALLOC_TOP_PAD_": str(8 * 2**20),
}

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
class Invocation:
    """Command that starts a server.

    environment: environment variables of the command.
    end_command: command that removes the server if `command` was killed; empty where killing is enough.
    """

    command: list[str]
    environment: dict[str, str]
    end_command: list[str] = field(default_factory=list)


@runtime_checkable
class Runtime(Protocol):
    """Program or container that runs a server."""

    def check(self, settings: ServerSettings) -> None:
        """Raise ServerStartError if this runtime is not installed or cannot run such a server."""
        ...

    def help_text(self) -> str:
        """Return the output of `tritonserver --help`."""
        ...

    def paths(self, settings: ServerSettings, scratch: Path, shm_prefix: str) -> ServerPaths:
        """Return the paths that the server will see; files that it needs may be written into `scratch`."""
        ...

    def invocation(
        self, settings: ServerSettings, scratch: Path, flags: Sequence[str], name: str
    ) -> Invocation:
        """Return the command. name: unique name for a container."""
        ...


class BundledRuntime:
    """The binary of the PyPI package nvidia-pytriton, on the CPU."""

    @cached_property
    def _bundle(self) -> Bundle:
        return find_bundle()

    def check(self, settings: ServerSettings) -> None:
        """Find the binary, and the Python that models run in, as `find_bundle` does."""
        if settings.gpu:
            raise ServerStartError(
                f"the bundled tritonserver serves on the CPU; for GPU {settings.gpu} give a container image: "
                "--runtime apptainer --image FILE.sif, or --runtime docker --image NAME"
            )
        assert self._bundle

    def help_text(self) -> str:
        """Return the output of the binary."""
        return _output([str(self._bundle.server), "--help"], self._bundle.environment(cpu_threads=1))

    def paths(self, settings: ServerSettings, scratch: Path, shm_prefix: str) -> ServerPaths:
        """Return the files' own paths; the back end's parts are linked together in `scratch`."""
        backends = self._bundle.make_backend_directory(scratch)
        files = {kind: str(path) for kind, path in tls_files(settings).items()}
        repository = str(repository_of(scratch))
        return ServerPaths(str(settings.model_store), repository, str(backends), shm_prefix, **files)

    def invocation(
        self, settings: ServerSettings, scratch: Path, flags: Sequence[str], name: str
    ) -> Invocation:
        """Return the binary's command, in an environment in which it finds its libraries and this Python."""
        environment = self._bundle.environment(cpu_threads=settings.cpu_threads)
        return Invocation([str(self._bundle.server), *flags], environment)


@dataclass(frozen=True)
class ApptainerRuntime:
    """An image file (.sif), or a folder unpacked from one, run by Apptainer or SingularityCE.

    image: path of the image. An image from a registry is fetched first: `apptainer pull FILE.sif docker://NAME`.
    """

    image: Path

    @cached_property
    def _program(self) -> str:
        return find_program("apptainer", "singularity")

    def check(self, settings: ServerSettings) -> None:
        """Check that the program and the image exist."""
        assert self._program
        if not self.image.exists():
            raise ServerStartError(f"image {self.image} does not exist; build it with singularity/build.sh")

    def help_text(self) -> str:
        """Return the output of the image's tritonserver."""
        command = [self._program, "exec", "--cleanenv", str(self.image), "tritonserver", "--help"]
        return _output(command, dict(os.environ))

    def paths(self, settings: ServerSettings, scratch: Path, shm_prefix: str) -> ServerPaths:
        return _paths_inside(settings, shm_prefix)

    def invocation(
        self, settings: ServerSettings, scratch: Path, flags: Sequence[str], name: str
    ) -> Invocation:
        """Return `apptainer_command`. Its process is the server, so that killing it is enough."""
        command = apptainer_command(self._program, self.image, settings, scratch, flags)
        return Invocation(command, apptainer_environment(os.environ, settings))


@dataclass(frozen=True)
class DockerRuntime:
    """An image that `docker run` knows or can pull."""

    image: str

    @cached_property
    def _program(self) -> str:
        return find_program("docker")

    def check(self, settings: ServerSettings) -> None:
        """Check that the program, its daemon and the image exist; no image is pulled unasked."""
        result = subprocess.run(
            [self._program, "image", "inspect", self.image],
            capture_output=True,
            text=True,
            timeout=_HELP_TIMEOUT_S,
            check=False,
        )
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ServerStartError(
                f"docker has no image {self.image} ({reason}); "
                f"docker pull {self.image}, or build it as singularity/README.md says"
            )

    def help_text(self) -> str:
        """Return the output of the image's tritonserver."""
        command = [self._program, "run", "--rm", "--network", "none", self.image, "tritonserver", "--help"]
        return _output(command, dict(os.environ))

    def paths(self, settings: ServerSettings, scratch: Path, shm_prefix: str) -> ServerPaths:
        return _paths_inside(settings, shm_prefix)

    def invocation(
        self, settings: ServerSettings, scratch: Path, flags: Sequence[str], name: str
    ) -> Invocation:
        """Return `docker_command`. A container outlives its command, so it is removed by name at the end."""
        command = docker_command(self._program, self.image, settings, scratch, flags, name)
        return Invocation(command, dict(os.environ), [self._program, "rm", "--force", name])


def repository_of(scratch: Path) -> Path:
    """Return the path of a server's `Repository`, seen from outside of a container."""
    return scratch / _REPOSITORY


def apptainer_command(
    program: str, image: Path, settings: ServerSettings, scratch: Path, flags: Sequence[str]
) -> list[str]:
    """Return `apptainer exec ... IMAGE tritonserver FLAGS`, with read-only mounts and a clean environment."""
    binds = [f"--bind={outside}:{inside}:ro" for outside, inside in _mounts(settings, scratch)]
    gpu = ["--nv"] if settings.gpu else []
    return [program, "exec", "--cleanenv", *gpu, *binds, str(image), "tritonserver", *flags]


def apptainer_environment(inherited: Mapping[str, str], settings: ServerSettings) -> dict[str, str]:
    """Return the environment of the `apptainer` command: variables for the container have either prefix."""
    inside = _container_variables(settings)
    prefixes = ("APPTAINERENV_", "SINGULARITYENV_")
    return {**inherited, **{prefix + key: value for prefix in prefixes for key, value in inside.items()}}


def docker_command(
    program: str, image: str, settings: ServerSettings, scratch: Path, flags: Sequence[str], name: str
) -> list[str]:
    """Return `docker run ...`: read-only, as the calling user, on the host's network.

    The container has 1 GB of shared memory: Docker's 64 MB are too few for the back end's tensors.
    """
    mounts = [f"--volume={outside}:{inside}:ro" for outside, inside in _mounts(settings, scratch)]
    variables = {**_container_variables(settings), "HOME": "/tmp"}
    if settings.gpu:
        del variables["CUDA_VISIBLE_DEVICES"]  # inside, the cards chosen below are numbered from 0
    return [
        program, "run", "--rm", f"--name={name}", "--network=host", "--shm-size=1g", "--read-only",
        "--tmpfs=/tmp", f"--user={os.getuid()}:{os.getgid()}", "--security-opt=no-new-privileges",
        *([f'--gpus="device={settings.gpu}"'] if settings.gpu else []),
        *mounts,
        *(f"--env={key}={value}" for key, value in variables.items()),
        image, "tritonserver", *flags,
    ]  # fmt: skip


def tls_files(settings: ServerSettings) -> dict[str, Path]:
    """Return the absolute paths of `cert`, `key` and `ca`, as far as the settings have them."""
    tls = settings.tls
    if tls is None:
        return {}
    files = {"cert": tls.cert, "key": tls.key} | ({"ca": tls.ca} if tls.ca is not None else {})
    return {kind: path.resolve() for kind, path in files.items()}


def find_program(*names: str) -> str:
    """Return the path of the first of `names` that is installed.

    Raises:
        ServerStartError: none is.
    """
    for name in names:
        if path := shutil.which(name):
            return path
    raise ServerStartError(f"{' or '.join(names)} is not installed, or not in PATH")


def _mounts(settings: ServerSettings, scratch: Path) -> list[tuple[str, str]]:
    files = [(str(path), f"{_TLS_INSIDE}/{kind}.pem") for kind, path in tls_files(settings).items()]
    folders = [(settings.model_store, _STORE_INSIDE), (repository_of(scratch), _REPOSITORY_INSIDE)]
    return [*((str(outside), inside) for outside, inside in folders), *files]


def _paths_inside(settings: ServerSettings, shm_prefix: str) -> ServerPaths:
    inside = {kind: f"{_TLS_INSIDE}/{kind}.pem" for kind in tls_files(settings)}
    return ServerPaths(_STORE_INSIDE, _REPOSITORY_INSIDE, None, shm_prefix, **inside)


def _container_variables(settings: ServerSettings) -> dict[str, str]:
    return {
        **HEAP,
        **model_variables(settings.cpu_threads),
        "CUDA_VISIBLE_DEVICES": settings.gpu,
        "PYTHONNOUSERSITE": "1",  # packages in the user's home are not those of the image
    }


def _output(command: list[str], environment: dict[str, str]) -> str:
    # tritonserver leaves with 1 after its own --help.
    try:
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            timeout=_HELP_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServerStartError(f"`{' '.join(command)}` does not work: {error}") from error
    return result.stdout.decode("utf-8", errors="replace")


@dataclass(frozen=True, slots=True)
class Bundle:
    """Paths in the installed nvidia-pytriton and in this Python.

    server: the tritonserver binary.
    backend: folder of the python back end.
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
        """Return the environment variables of the server process."""
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
        """Link the parts of the back end, which lie apart in the package, into a folder in `scratch`."""
        backends = scratch / "backends"
        target = backends / "python"
        target.mkdir(parents=True)
        for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
            (target / name).symlink_to(self.backend / name)
        (target / self.stub.name).symlink_to(self.stub)
        return backends


def find_bundle() -> Bundle:
    """Find the server and check that its models will run right in the Python that they are given.

    Raises:
        ServerStartError: something is missing or of a wrong version; says what to install.
    """
    check_platform(platform.system(), platform.machine(), sys.version_info[:2])
    where = model_python()
    package = where.packages / "pytriton"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    bundle = Bundle(
        server=package / "tritonserver" / "bin" / "tritonserver",
        backend=package / "tritonserver" / "backends" / "python",
        stub=package / "tritonserver" / "python_backend_stubs" / version / "triton_python_backend_stub",
        library_path=(_libpython_folder(), where.packages / "nvidia_pytriton.libs"),
        python_bin=where.program.parent,
    )
    for path in (bundle.server, bundle.backend, bundle.stub, bundle.library_path[1]):
        if not path.exists():
            raise ServerStartError(f"nvidia-pytriton is installed without {path}: {where.remedy}")
    check_programs(bundle.server, bundle.stub)
    check_model_python(_probe_python(where.program), where)
    return bundle


def check_platform(system: str, machine: str, python: tuple[int, int]) -> None:
    """Check that the bundled server was built for this platform.

    Raises:
        ServerStartError: it was not; names this platform and the one needed.
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
    """Check that this user may run the programs: the server would report it of a model only, if at all.

    Raises:
        ServerStartError: names the program and the remedy.
    """
    for program in programs:
        if not os.access(program, os.R_OK | os.X_OK):
            raise ServerStartError(
                f"this user may not run {program}; whoever installed nvidia-pytriton must allow it: "
                f"chmod 755 {shlex.quote(str(program))}"
            )


def check_model_python(versions: dict[str, str], where: ModelPython) -> None:
    """Check that models will not fail or, worse, score wrong in an environment.

    versions: of `python`, and of `numpy`, `torch` and `transformers` where installed.

    Raises:
        ServerStartError: names the package and what to install.
    """
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    if versions["python"] != running:
        raise ServerStartError(
            f"`python3` in {where.prefix} is Python {versions['python']}, not {running}: "
            "use a virtual environment (python -m venv)"
        )
    # An environment beside has these from this one.
    missing = [name for name in ("numpy", "torch", "transformers") if name not in versions]
    if missing:
        raise ServerStartError(
            f"models need {', '.join(missing)} in {sys.prefix}; pip install {' '.join(missing)}"
        )
    if int(versions["numpy"].split(".")[0]) >= 2:
        raise ServerStartError(
            f"models would run with numpy {versions['numpy']} in {where.prefix}; with numpy 2 the bundled "
            f"tritonserver silently turns tensors into zeros: {where.remedy}"
        )


def _probe_python(python3: Path) -> dict[str, str]:
    try:
        result = subprocess.run(
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
    return json.loads(result.stdout)


def _libpython_folder() -> Path:
    """Return the folder of this Python's shared library; without it the stub takes the system's Python."""
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
    """Return the environment variables that every server process needs, in any runtime."""
    return {
        "OMP_NUM_THREADS": str(cpu_threads),
        "MKL_NUM_THREADS": str(cpu_threads),
        **waiting_variables(),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
