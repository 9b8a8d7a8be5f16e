from __future__ import annotations

import importlib
import re
import socket
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from conch import doctor
from conch.doctor import (
    Finding,
    check_devices,
    check_extras,
    check_libraries,
    check_memory,
    check_numpy,
    check_ports,
    check_python,
    check_space,
    default_ports,
    main,
    numpy_wanted,
)
from conch.report.__main__ import ReportOptions
from conch.servers.settings import ListenSettings
from conch.serving.deployment.options import NetworkOptions

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ["numpy>=1.26", "torch>=2.8", 'ray>=2.60; extra == "ray"', 'tomli>=2; python_version < "3"']
INSTALLED = {"numpy": "1.26.4", "torch": "2.13.0+cpu"}


@pytest.mark.parametrize(("found", "level"), [("3.9.1", "fail"), ("3.11.7", "ok"), ("3.13.0", "fail")])
def test_python_outside_of_what_the_package_asks_for_fails(found: str, level: str) -> None:
    finding = check_python(found, ">=3.10,<3.13")
    assert finding.level == level and found in finding.text
    assert bool(finding.remedy) == (level == "fail")


def test_libraries_that_fit_are_one_line() -> None:
    (finding,) = check_libraries(NEEDED, INSTALLED)
    assert finding == Finding("ok", "libraries", "numpy 1.26.4, torch 2.13.0+cpu")


EXTRAS = [
    *("torch>=2.8", 'ray>=2.60; extra == "ray"', 'plotly>=6; extra == "report"', 'pytest>=8; extra == "dev"'),
    *('onnx>=1.18; extra == "onnx"', 'onnxruntime>=1.22; extra == "onnx"'),
    *('nvidia-pytriton==0.7.0; extra == "serve"', 'numpy<2; extra == "serve"'),
]


def test_extras_are_told_with_versions_and_absent_ones_with_their_purpose() -> None:
    installed = INSTALLED | {"plotly": "7.1.0", "onnx": "1.22.0"}
    there, absent = check_extras(EXTRAS, installed)
    assert there == Finding("ok", "extras", "report (plotly 7.1.0)")
    assert (absent.level, absent.subject) == ("ok", "not installed")
    names, _, remedy = absent.text.partition("; to add ray: ")
    assert names == (
        "ray (asynchronous sampling in a cluster), onnx (conversion to ONNX; lacks onnxruntime), "
        "serve (the bundled Triton server)"
    )
    assert re.fullmatch(r"pip install -e '.*\[ray\]'", remedy)


def test_extras_that_are_all_there_are_one_line() -> None:
    installed = INSTALLED | {"plotly": "7.1.0", "onnx": "1.22.0", "onnxruntime": "1.23", "ray": "2.60"}
    (there,) = check_extras(EXTRAS, installed, {"serve"})
    assert there.text == (
        "ray 2.60, report (plotly 7.1.0), onnx (onnx 1.22.0, onnxruntime 1.23), "
        "serve (in an environment of its own)"
    )


def test_purpose_of_each_extra_for_users_is_told() -> None:
    _, _, extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("optional-dependencies]")
    named = re.findall(r"^([\w-]+) = \[", extras.partition("\n[")[0], re.MULTILINE)
    assert {*doctor._PURPOSES} == {*named} - {"dev", "docs"}


@pytest.mark.parametrize(
    ("versions", "level", "subject", "words"),
    [
        ({"numpy": "1.21"}, "fail", "numpy", ("1.21", ">=1.26", "pip install 'numpy>=1.26'")),
        ({"torch": None}, "fail", "torch", ("not installed", "pip install 'torch>=2.8'")),
        ({"ray": "2.1"}, "warn", "ray", ("2.1", "conch[ray]")),
    ],
)
def test_library_of_another_version_is_named_with_its_remedy(
    versions: dict[str, str | None], level: str, subject: str, words: tuple[str, ...]
) -> None:
    installed = {name: text for name, text in (INSTALLED | versions).items() if text is not None}
    found = [finding for finding in check_libraries(NEEDED, installed) if finding.level != "ok"]
    assert [(finding.level, finding.subject) for finding in found] == [(level, subject)]
    assert all(word in found[0].text + found[0].remedy for word in words)


def test_port_that_somebody_listens_on_is_named_with_its_setting() -> None:
    with socket.socket() as taken, socket.socket() as other:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        other.bind(("127.0.0.1", 0))
        port, free = taken.getsockname()[1], other.getsockname()[1]
        other.close()
        found = list(check_ports({port: "conch serve up (`--grpc-port`)", free: "the rest"}))
    assert [finding.level for finding in found] == ["warn", "ok"]
    assert found[0].subject == f"port {port}" and "--grpc-port" in found[0].text
    assert str(free) in found[1].text


def subclasses(section: type[ListenSettings]) -> Iterator[type[ListenSettings]]:
    for below in section.__subclasses__():
        yield below
        yield from subclasses(below)


def test_ports_that_are_looked_at_are_the_defaults_of_all_that_listens() -> None:
    root = Path(doctor.__file__).parents[1]
    for file in (root / "conch").rglob("*.py"):
        if "ListenSettings):" in file.read_text(encoding="utf-8"):
            importlib.import_module(".".join(file.relative_to(root).with_suffix("").parts))
    sections = {each for each in subclasses(ListenSettings) if each.__module__.startswith("conch.")}
    of_settings = {each.model_fields["port"].default for each in sections if each.__name__.endswith("Config")}
    assert len(of_settings) == 4
    others = {NetworkOptions().grpc_port, ReportOptions().port}
    assert set(default_ports()) == of_settings | others


BUNDLE = "nvidia-pytriton"


@pytest.mark.parametrize(
    ("found", "wanted", "level", "words"),
    [
        ("1.26.4", {"conch": ">=1.26", BUNDLE: "<2"}, "ok", ("1.26.4 suits all 2 packages",)),
        ("2.2.0", {"conch": ">=1.26", "vllm": ">=2"}, "ok", ("2.2.0",)),
        (
            "2.2.0",
            {BUNDLE: "<2", "vllm": ">=2"},
            "fail",
            (BUNDLE, "zeros", "pip install 'numpy<2'"),
        ),
        ("1.26.4", {BUNDLE: "<2", "vllm": ">=2"}, "warn", ("vllm wants numpy>=2", "conch serve install")),
        ("1.26.4", {"conch": ">=1.26", "numba": ">=2,<3"}, "warn", ("numba", "'numpy<3,>=1.26,>=2'")),
        (None, {}, "fail", ("not installed",)),
    ],
)
def test_numpy_is_held_against_all_that_is_installed(
    found: str | None, wanted: dict[str, str], level: str, words: tuple[str, ...]
) -> None:
    finding = check_numpy(found, wanted)
    assert (finding.level, finding.subject) == (level, "numpy")
    assert all(word in finding.text + finding.remedy for word in words), finding
    assert bool(finding.remedy) == (level != "ok")


def installed(folder: Path, name: str, *needed: str) -> Distribution:
    """A package as pip leaves it."""
    info = folder / f"{name}.dist-info"
    info.mkdir()
    lines = [f"Name: {name}", "Version: 1.0", *(f"Requires-Dist: {text}" for text in needed)]
    (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *lines, ""]))
    return Distribution.at(info)


def test_who_wants_which_numpy_is_read_from_what_is_installed(tmp_path: Path) -> None:
    packages = [
        installed(tmp_path, "vllm", "numpy>=2", "torch>=2"),
        installed(tmp_path, "anything", "numpy", 'numpy<1; extra == "old"', "numpy (broken"),
        installed(tmp_path, "elsewhere", 'numpy<1; python_version < "3"'),
        installed(tmp_path, BUNDLE, "numpy>=1.21"),
    ]
    needed = ["numpy>=1.26", 'numpy<2; extra == "serve"', 'ray>=2; extra == "ray"']
    assert numpy_wanted(packages, needed) == {"vllm": ">=2", BUNDLE: "<2"}
    assert numpy_wanted(packages[:1], needed) == {"vllm": ">=2"}


LISTING = "GPU 0: NVIDIA H200 (UUID: GPU-1)\nGPU 1: NVIDIA H200 (UUID: GPU-2)\n"


@pytest.mark.parametrize(
    ("listing", "torch", "level", "words"),
    [
        (None, "2.13.0+cpu 0\n", "ok", ("no GPU", "2.13.0+cpu")),
        (LISTING, "2.13.0+cu130 2\n", "ok", ("uses 2 GPUs", "GPU 1: NVIDIA H200")),
        (LISTING, "2.13.0+cpu 0\n", "warn", ("sees none of GPU 0: NVIDIA H200",)),
        (LISTING, None, "fail", ("cannot be imported",)),
    ],
)
def test_gpus_of_the_driver_are_held_against_those_of_torch(
    listing: str | None, torch: str | None, level: str, words: tuple[str, ...]
) -> None:
    (finding,) = check_devices(listing, torch)
    assert finding.level == level and all(word in finding.text for word in words)
    assert bool(finding.remedy) == (level != "ok")


def test_little_memory_or_disk_is_a_warning_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check_memory(2**40).level == check_memory(None).level == "ok"
    assert check_memory(2**20).level == "warn" and check_memory(2**20).remedy
    monkeypatch.setattr(doctor, "_LEAST_DISK", 2**80)
    disk, *others = check_space(tmp_path, tmp_path / "nowhere")
    assert (disk.level, disk.subject, others) == ("warn", "disk", []) and disk.remedy


@pytest.mark.parametrize(("level", "code"), [("ok", None), ("warn", None), ("fail", 1)])
def test_only_a_failure_is_an_exit_code(
    level: doctor.Level, code: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def look(*, start_server: bool) -> Iterator[Finding]:
        yield Finding("ok", "python", "3.11")
        yield Finding(level, "torch", "is away", "" if level == "ok" else "install it")

    monkeypatch.setattr(doctor, "look", look)
    if code is None:
        main([])
    else:
        with pytest.raises(SystemExit) as leaving:
            main([])
        assert leaving.value.code == code
    shown = capsys.readouterr().out
    assert f"{level:<5} torch: is away" in shown and ("-> install it" in shown) == (level != "ok")


def test_versions_of_this_environment_are_found() -> None:
    assert doctor.installed_versions(["pytest>=1", "no-such-package-at-all"]) == {
        "pytest": pytest.__version__
    }
    assert sys.executable in check_python("3.11.0", ">=3.10").text
