"""What a server runs in: the bundled binary, an Apptainer (Singularity) image, or a Docker image.

Each says how to ask for the server's flags and which command starts it; `launcher.py` does the rest. The
commands are made by pure functions.

The tritonserver binary of the PyPI package nvidia-pytriton, and the Python that its models run in.

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
from conch.serving.server.flags import Places, ServerSettings

_HELP_TIMEOUT_S = 120.0
_STORE_INSIDE = "/model_store"
_REPOSITORY = "repository"
_REPOSITORY_INSIDE = f"/{_REPOSITORY}"
_TLS_INSIDE = "/tls"


@dataclass(frozen=True, slots=True)
class Invocation:
    """How to start a server.

    end_command: what removes it if its command was killed; empty where killing is enough.
    """

    command: list[str]
    environment: dict[str, str]
    end_command: list[str] = field(default_factory=list)


@runtime_checkable
class Runtime(Protocol):
    """What a server runs in."""

    def check(self, settings: ServerSettings) -> None:
        """Raise ServerStartError if this runtime is not here or cannot do what is asked."""
        ...

    def help_text(self) -> str:
        """What `tritonserver --help` prints."""
        ...

    def places(self, settings: ServerSettings, scratch: Path, shm_prefix: str) -> Places:
        """Where the server will find things; files that it needs may be laid out in `scratch`."""
        ...

    def invocation(
        self, settings: ServerSettings, scratch: Path, flags: Sequence[str], name: str
    ) -> Invocation:
        """The command. name: unique, for a container."""
        ...


class BundledRuntime:
    """The binary of the PyPI package nvidia-pytriton, on the CPU."""

    @cached_property
    def _bundle(self) -> Bundle:
        return find_bundle()

    def check(self, settings: ServerSettings) -> None:
        """Find the binary, and the Python that models run in; see `find_bundle`."""
        if settings.gpu:
            raise ServerStartError(
                f"the bundled tritonserver serves on the CPU; for GPU {settings.gpu} give a container image: "
                "--runtime apptainer --image FILE.sif, or --runtime docker --image NAME"
            )
        assert self._bundle

    def help_text(self) -> str:
        """What the binary says."""
        return _output([str(self._bundle.server), "--help"], self._bundle.environment(cpu_threads=1))

    def places(self, settings: ServerSettings, scratch: Path, shm_prefix: str) -> Places:
        """Files where they are; the back end's parts are brought together in `scratch`."""
        backends = self._bundle.make_backend_directory(scratch)
        files = {kind: str(path) for kind, path in tls_files(settings).items()}
        repository = str(repository_of(scratch))
        return Places(str(settings.model_store), repository, str(backends), shm_prefix, **files)

    def invocation(
        self, settings: ServerSettings, scratch: Path, flags: Sequence[str], name: str
    ) -> Invocation:
        """The binary itself, in an environment in which it finds its libraries and this Python."""
        environment = self._bundle.environment(cpu_threads=settings.cpu_threads)
        return Invocation([str(self._bundle.server), *flags], environment)


@dataclass(frozen=True)
class ApptainerRuntime:
    """An image file (.sif), or a folder made from one, run by Apptainer or SingularityCE.

    image: its path. An image from a registry is fetched first: `apptainer pull FILE.sif docker://NAME`.
    """

    image: Path

    @cached_property
    def _program(self) -> str:
        return find_program("apptainer", "singularity")

    def check(self, settings: ServerSettings) -> None:
        """The program and the image must be there."""
        assert self._program
        if not self.image.exists():
            raise ServerStartError(f"image {self.image} does not exist; build it with singularity/build.sh")

    def help_text(self) -> str:
        """What the image's tritonserver says."""
        command = [self._program, "exec", "--cleanenv", str(self.image), "tritonserver", "--help"]
        return _output(command, dict(os.environ))

    def places(self, settings: ServerSettings, scratch: Path, shm_prefix: str) -> Places:
        """The paths that `apptainer_command` mounts things at."""
        return _places_inside(settings, shm_prefix)

    def invocation(
        self, settings: ServerSettings, scratch: Path, flags: Sequence[str], name: str
    ) -> Invocation:
        """See `apptainer_command`. Its process is the server, so that killing it is enough."""
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
        """The program, its daemon and the image must be there; nothing is pulled behind the user's back."""
        done = subprocess.run(
            [self._program, "image", "inspect", self.image],
            capture_output=True,
            text=True,
            timeout=_HELP_TIMEOUT_S,
            check=False,
        )
        if done.returncode:
            raise ServerStartError(
                f"docker has no image {self.image} ({_last_line(done.stderr)}); "
                f"docker pull {self.image}, or build it as singularity/README.md says"
            )

    def help_text(self) -> str:
        """What the image's tritonserver says."""
        command = [self._program, "run", "--rm", "--network", "none", self.image, "tritonserver", "--help"]
        return _output(command, dict(os.environ))

    def places(self, settings: ServerSettings, scratch: Path, shm_prefix: str) -> Places:
        """The paths that `docker_command` mounts things at."""
        return _places_inside(settings, shm_prefix)

    def invocation(
        self, settings: ServerSettings, scratch: Path, flags: Sequence[str], name: str
    ) -> Invocation:
        """See `docker_command`. A container outlives its command, so it is removed by name at the end."""
        command = docker_command(self._program, self.image, settings, scratch, flags, name)
        return Invocation(command, dict(os.environ), [self._program, "rm", "--force", name])


def repository_of(scratch: Path) -> Path:
    """Where a server's `Repository` stands, seen from outside."""
    return scratch / _REPOSITORY


def apptainer_command(
    program: str, image: Path, settings: ServerSettings, scratch: Path, flags: Sequence[str]
) -> list[str]:
    """`apptainer exec ... IMAGE tritonserver FLAGS`: mounts read-only, no variables of ours."""
    binds = [f"--bind={outside}:{inside}:ro" for outside, inside in _mounts(settings, scratch)]
    gpu = ["--nv"] if settings.gpu else []
    return [program, "exec", "--cleanenv", *gpu, *binds, str(image), "tritonserver", *flags]


def apptainer_environment(ours: Mapping[str, str], settings: ServerSettings) -> dict[str, str]:
    """Environment of the `apptainer` command: what the container is to see has a prefix, of either name."""
    inside = _container_variables(settings)
    prefixes = ("APPTAINERENV_", "SINGULARITYENV_")
    return {**ours, **{prefix + key: value for prefix in prefixes for key, value in inside.items()}}


def docker_command(
    program: str, image: str, settings: ServerSettings, scratch: Path, flags: Sequence[str], name: str
) -> list[str]:
    """`docker run ...`: as the calling user, on the host's network (so loopback stays loopback), read-only.

    Shared memory: Docker's 64 MB are too few for the back end's tensors.
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
    """`cert`, `key` and `ca` as far as they are given, absolute."""
    tls = settings.tls
    if tls is None:
        return {}
    files = {"cert": tls.cert, "key": tls.key} | ({"ca": tls.ca} if tls.ca is not None else {})
    return {kind: path.resolve() for kind, path in files.items()}


def find_program(*names: str) -> str:
    """Path of the first of `names` that is installed.

    Raises:
        ServerStartError: none is.
    """
    for name in names:
        if found := shutil.which(name):
            return found
    raise ServerStartError(f"{' or '.join(names)} is not installed, or not in PATH")


def _mounts(settings: ServerSettings, scratch: Path) -> list[tuple[str, str]]:
    files = [(str(path), f"{_TLS_INSIDE}/{kind}.pem") for kind, path in tls_files(settings).items()]
    folders = [(settings.model_store, _STORE_INSIDE), (repository_of(scratch), _REPOSITORY_INSIDE)]
    return [*((str(outside), inside) for outside, inside in folders), *files]


def _places_inside(settings: ServerSettings, shm_prefix: str) -> Places:
    inside = {kind: f"{_TLS_INSIDE}/{kind}.pem" for kind in tls_files(settings)}
    return Places(_STORE_INSIDE, _REPOSITORY_INSIDE, None, shm_prefix, **inside)


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
        done = subprocess.run(
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
    return done.stdout.decode("utf-8", errors="replace")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]


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
