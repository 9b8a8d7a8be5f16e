"""What a server runs in: the bundled binary, an Apptainer (Singularity) image, or a Docker image.

Each says how to ask for the server's flags and which command starts it; `launcher.py` does the rest. The
commands are made by pure functions.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

from conch.errors import ServerStartError
from conch.serving.bundle import HEAP, Bundle, find_bundle, model_variables
from conch.serving.flags import Places, ServerSettings

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
