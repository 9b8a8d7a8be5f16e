"""Look whether this machine and this environment can run Conch, and say what to do where they cannot.

    conch doctor

Each line is `ok`, `warn` (something that only some runs need) or `fail`, with what to do about it. Exit
codes: 0 nothing failed, 1 something did.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distributions, metadata, requires, version
from pathlib import Path
from typing import Literal

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet

from conch.cli import CommandParser, run_main, written_with
from conch.config import Section
from conch.errors import ServerStartError, install_extra
from conch.machine.memory import available_memory
from conch.reference.server_config import ReferenceServerConfig
from conch.report.__main__ import ReportOptions
from conch.reward_server.server_config import RewardServerConfig
from conch.rollouts.server_config import ServerConfig as RolloutServerConfig
from conch.service.service_config import ServiceConfig
from conch.serving.deployment.options import NetworkOptions
from conch.serving.server.environment import is_environment_beside_made
from conch.serving.server.runtime import find_bundle

Level = Literal["ok", "warn", "fail"]

_PROGRAM_TIMEOUT_S = 120.0
_SERVER_TIMEOUT_S = 120.0
_GIB = 2**30
_LEAST_DISK, _LEAST_MEMORY, _LEAST_SHARED = 10 * _GIB, 4 * _GIB, _GIB
_TORCH = (
    "import torch; print(torch.__version__, torch.cuda.device_count() if torch.cuda.is_available() else 0)"
)
_SERVERS: tuple[tuple[type[Section], str, str], ...] = (
    (ServiceConfig, "port", "conch service (`port=...`)"),
    (NetworkOptions, "grpc_port", "conch serve up (`--grpc-port`)"),
    (RolloutServerConfig, "port", "conch rollout-server (`port=...`)"),
    (ReferenceServerConfig, "port", "conch reference-server (`port=...`)"),
    (RewardServerConfig, "port", "conch reward-server (`port=...`)"),
    (ReportOptions, "port", "conch report --live (`--port`)"),
)
"""Settings of what listens, the key of its port, and what it is, with how to give it another port."""

_BUNDLE, _BUNDLE_EXTRA = "nvidia-pytriton", "serve"
"""Package that carries the bundled server, and the extra that says which numpy fits to it."""


_PURPOSES = {
    "serve": "the bundled Triton server",
    "deepspeed": "ZeRO",
    "wandb": "Weights & Biases",
    "tensorboard": "TensorBoard",
    "vllm": "sampling with vLLM",
    "liger": "fused kernels on a GPU",
    "onnx": "conversion to ONNX",
    "int8": "eight-bit weights",
    "math": "answers checked as mathematics",
    "ifeval": "instructions of IFEval",
    "goals": "reading difficulty and formality",
    "search": "sweeps that search",
    "report": "conch report",
    "ray": "asynchronous sampling in a cluster",
    "reward-server": "conch reward-server",
    "service": "conch service",
}
"""Extra of the package -> what it is for; those of developers are left out."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of what was seen.

    remedy: what to do about it; "" for what is well.
    """

    level: Level
    subject: str
    text: str
    remedy: str = ""


def main(argv: Sequence[str]) -> None:
    """Command line: see the head of this file."""
    parser = CommandParser(
        prog="conch doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--no-server", action="store_true", help="do not try to start the bundled server")
    arguments = parser.parse_args(written_with("-", argv))
    logging.getLogger("conch").setLevel(logging.WARNING)  # what the server says of itself is told below
    failed = False
    for finding in look(start_server=not arguments.no_server):
        failed |= finding.level == "fail"
        print(f"{finding.level:<5} {finding.subject}: {finding.text}", flush=True)
        if finding.remedy:
            print(f"      -> {finding.remedy}", flush=True)
    if failed:
        raise SystemExit(1)


def look(*, start_server: bool = True) -> Iterator[Finding]:
    """All there is to see, each as it is found; the quickest first."""
    needed = requires("conch") or []
    yield check_python(platform.python_version(), _python_wanted())
    installed = installed_versions(needed)
    yield from check_libraries(needed, installed)
    own_server = is_environment_beside_made()
    yield from check_extras(needed, installed, {_BUNDLE_EXTRA} if own_server else ())
    wanted = numpy_wanted(list(distributions()), needed)
    if own_server:
        wanted.pop(_BUNDLE, None)  # the server has its own numpy
    yield check_numpy(installed.get("numpy"), wanted)
    yield from check_space(Path.cwd(), Path("/dev/shm"))
    yield check_memory(available_memory())
    yield from check_ports(default_ports())
    yield from check_devices(_output(["nvidia-smi", "-L"]), _output([sys.executable, "-c", _TORCH]))
    if start_server:
        yield check_server()


def check_python(found: str, wanted: str) -> Finding:
    """Python's version against what the package asks for: `>=3.10,<3.13`."""
    if SpecifierSet(wanted).contains(found, prereleases=True):
        return Finding("ok", "python", f"{found} ({sys.executable})")
    return Finding(
        "fail", "python", f"{found}, but {wanted} is needed", "make an environment of that version"
    )


def check_libraries(needed: Iterable[str], installed: Mapping[str, str]) -> Iterator[Finding]:
    """Installed versions against requirements: `numpy>=1.26`, `ray>=2.60; extra == "ray"`.

    A version that an extra cannot work with is a warning, since extras may contradict each other; which are
    there at all is for `check_extras`. Of numpy, which is always there, `check_numpy` says what extras want.
    """
    well = []
    for requirement in map(Requirement, needed):
        extra = _extra_of(requirement)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        if extra and requirement.name == "numpy":
            continue
        found, wanted = installed.get(requirement.name), str(requirement.specifier) or "any version"
        if found is None:
            if not extra:
                remedy = f"pip install '{requirement.name}{requirement.specifier}'"
                yield Finding("fail", requirement.name, f"not installed, {wanted} is needed", remedy)
        elif not requirement.specifier.contains(found, prereleases=True):
            remedy = f"pip install '{requirement.name}{requirement.specifier}'"
            whose = f" by conch[{extra}]" if extra else ""
            level: Level = "warn" if extra else "fail"
            yield Finding(level, requirement.name, f"{found}, but {wanted} is wanted{whose}", remedy)
        elif not extra:
            well.append(f"{requirement.name} {found}")
    if well:
        yield Finding("ok", "libraries", ", ".join(well))


def check_extras(
    needed: Iterable[str], installed: Mapping[str, str], beside: Collection[str] = ()
) -> Iterator[Finding]:
    """Which extras are installed, with their versions, and what the others would be for.

    beside: extras that stand in an environment of their own.
    """
    packages: dict[str, list[str]] = {}
    for requirement in map(Requirement, needed):
        extra = _extra_of(requirement)
        if extra in _PURPOSES and requirement.marker and requirement.marker.evaluate({"extra": extra}):
            packages.setdefault(extra, []).append(requirement.name)
    there, absent = [], []
    for extra, names in packages.items():
        missing = [name for name in names if name not in installed]
        if extra in beside and missing:
            there.append(f"{extra} (in an environment of its own)")
        elif missing:
            some = f"; lacks {', '.join(missing)}" if len(missing) < len({*names} - {"numpy"}) else ""
            absent.append(f"{extra} ({_PURPOSES[extra]}{some})")
        else:
            versions = [f"{name} {installed[name]}" for name in names if name != "numpy"]
            there.append(versions[0] if names == [extra] else f"{extra} ({', '.join(versions)})")
    if there:
        yield Finding("ok", "extras", ", ".join(there))
    if absent:
        first = absent[0].partition(" ")[0]
        yield Finding("ok", "not installed", f"{', '.join(absent)}; to add {first}: {install_extra(first)}")


def check_numpy(found: str | None, wanted: Mapping[str, str]) -> Finding:
    """numpy's version against all that is installed and names one; None where there is no numpy.

    wanted: package -> specifier, as of `numpy_wanted`.
    """
    if found is None:
        return Finding("fail", "numpy", "not installed", "pip install numpy")
    unhappy = {who: text for who, text in wanted.items() if not SpecifierSet(text).contains(found)}
    if not unhappy:
        return Finding("ok", "numpy", f"{found} suits all {len(wanted)} packages that ask for a version")
    told = ", ".join(f"{who} wants numpy{text}" for who, text in unhappy.items())
    if _BUNDLE in unhappy:
        remedy = (
            f"conch serve install gives the server its own; or else: pip install 'numpy{wanted[_BUNDLE]}'"
        )
    elif _BUNDLE in wanted:
        remedy = "take numpy 2 here, and give the bundled server one of its own: conch serve install"
    else:
        remedy = f"pip install 'numpy{SpecifierSet(','.join(wanted.values()))}'"
    if _BUNDLE in unhappy:
        told += ", and with numpy 2 its Python models turn tensors into zeros, silently"
    return Finding("fail" if _BUNDLE in unhappy else "warn", "numpy", f"{found}, but {told}", remedy)


def check_space(folder: Path, shared: Path) -> Iterator[Finding]:
    """Free space where runs are written, and in the shared memory of servers."""
    free = shutil.disk_usage(folder).free
    remedy = "a checkpoint takes about 16 bytes for each parameter: free some, or set `train.output_dir`"
    yield _enough(free, _LEAST_DISK, "disk", f"free in {folder}", remedy)
    if shared.is_dir():
        remedy = (
            "Triton's Python models pass tensors there; of a container, raise it: docker run --shm-size=2g"
        )
        yield _enough(
            shutil.disk_usage(shared).free, _LEAST_SHARED, "shared memory", f"free in {shared}", remedy
        )


def check_memory(free: int | None) -> Finding:
    """Memory that a program could still get, in bytes; None where the system does not tell."""
    if free is None:
        return Finding("ok", "memory", "this system does not tell how much is free")
    return _enough(free, _LEAST_MEMORY, "memory", "free", "end what else runs, or take a smaller model")


def check_ports(ports: Mapping[int, str]) -> Iterator[Finding]:
    """Whether somebody listens already where our servers do by default."""
    taken = {port: what for port, what in ports.items() if not _is_free(port)}
    for port, what in taken.items():
        yield Finding("warn", f"port {port}", f"in use; it is the default of {what}", "give it another one")
    if free := [str(port) for port in ports if port not in taken]:
        yield Finding("ok", "ports", f"{', '.join(free)} are free")


def check_devices(listing: str | None, torch: str | None) -> Iterator[Finding]:
    """GPUs that the driver lists, against those that torch can use.

    listing: output of `nvidia-smi -L`; None where it is not there or fails.
    torch: `version count`, as torch itself says; None where it cannot be imported.
    """
    listed = [line.partition(" (")[0] for line in (listing or "").splitlines() if line.startswith("GPU ")]
    if torch is None:
        remedy = f"see what `{sys.executable} -c 'import torch'` says, and install torch again"
        yield Finding("fail", "torch", "cannot be imported", remedy)
        return
    name, _, number = torch.strip().rpartition(" ")
    usable = int(number)
    if not listed and not usable:
        yield Finding("ok", "devices", f"no GPU; torch {name} computes on {os.cpu_count()} CPU cores")
    elif usable:
        yield Finding("ok", "devices", f"torch {name} uses {usable} GPUs: {'; '.join(listed) or 'unnamed'}")
    else:
        remedy = (
            "install a torch made for the driver's CUDA (nvidia-smi shows it); see CUDA_VISIBLE_DEVICES, too"
        )
        yield Finding("warn", "devices", f"torch {name} sees none of {'; '.join(listed)}", remedy)


def check_server() -> Finding:
    """Whether the bundled Triton server starts here and answers."""
    from conch.serving.server.server import TritonServer  # brings tritonclient, which no help needs

    subject = "bundled server"
    try:
        find_bundle()
        with (
            tempfile.TemporaryDirectory() as store,
            TritonServer(store, (), ready_timeout_s=_SERVER_TIMEOUT_S) as server,
        ):
            return Finding("ok", subject, f"started and answered at {server.url}")
    except ServerStartError as error:
        return Finding(
            "warn" if not _has(_BUNDLE) else "fail",
            subject,
            str(error),
            ""
            if _has(_BUNDLE)
            else "or serve from a container, or from another environment: docs/serving.md",
        )


def default_ports() -> dict[int, str]:
    """Port on loopback -> what listens there unless a setting, named in parentheses, says otherwise."""
    return {section.model_fields[key].default: what for section, key, what in _SERVERS}


def installed_versions(needed: Iterable[str]) -> dict[str, str]:
    """Package -> version of those requirements that are installed."""
    versions = {}
    for name in {Requirement(text).name for text in needed}:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def numpy_wanted(installed: Collection[Distribution], needed: Iterable[str]) -> dict[str, str]:
    """Package -> the versions of numpy that it takes, for those of `installed` that name any.

    needed: requirements of Conch itself, which know better what suits the bundled server than its package.
    """
    wanted: dict[str, str] = {}
    for package in installed:
        for requirement in _requirements(package):
            if requirement.name == "numpy" and requirement.specifier and _applies(requirement):
                wanted[package.name] = str(requirement.specifier)
    if any(package.name == _BUNDLE for package in installed):
        of_server = [text for text in map(Requirement, needed) if _extra_of(text) == _BUNDLE_EXTRA]
        wanted[_BUNDLE] = next(str(text.specifier) for text in of_server if text.name == "numpy")
    return wanted


def _requirements(package: Distribution) -> Iterator[Requirement]:
    for text in package.requires or ():
        with contextlib.suppress(InvalidRequirement):  # an old package's; it is not ours to mend
            yield Requirement(text)


def _applies(requirement: Requirement) -> bool:
    """Whether it is asked for here, without any extra."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def _python_wanted() -> str:
    return metadata("conch")["Requires-Python"]


def _extra_of(requirement: Requirement) -> str:
    """Name of the extra that asks for it; "" for what every installation has."""
    text = str(requirement.marker or "")
    _, found, behind = text.partition('extra == "')
    return behind.partition('"')[0] if found else ""


def _enough(free: int, least: int, subject: str, where: str, remedy: str) -> Finding:
    text = f"{free / _GIB:.1f} GiB {where}"
    return Finding("ok", subject, text) if free >= least else Finding("warn", subject, text, remedy)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _has(package: str) -> bool:
    return package in installed_versions([package])


def _output(command: Sequence[str]) -> str | None:
    """What a program writes; None where it is not there, fails, or does not end in time."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROGRAM_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


if __name__ == "__main__":
    run_main(main)
