from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from conch.cli.sweeps.launch import (
    Program,
    find_program,
    refuse_launched,
    slot_environment,
    slots_of,
    thread_environment,
    visible_devices,
)
from conch.cli.sweeps.settings import SweepConfig
from conch.errors import ConfigError

WORDS = ["-m", "lr=1,2", "sweep.jobs=2"]


@pytest.mark.parametrize(
    ("original", "interpreter", "target", "words"),
    [
        (["python", "grpo.py"], (), ("grpo.py",), ()),
        (["python", "-m", "examples.ppo"], (), ("-m", "examples.ppo"), ()),
        (["python", "-mexamples.ppo"], (), ("-m", "examples.ppo"), ()),
        (["python", "-u", "-X", "dev", "-Werror", "a.py"], ("-u", "-X", "dev", "-Werror"), ("a.py",), ()),
        (["python", "-um", "examples.ppo"], ("-u",), ("-m", "examples.ppo"), ()),
        (
            ["python", "-W", "error", "-m", "conch", "train", "ppo"],
            ("-W", "error"),
            ("-m", "conch"),
            ("train", "ppo"),
        ),
        (["python", "/venv/bin/conch", "train", "ppo"], (), ("/venv/bin/conch",), ("train", "ppo")),
        (
            ["python", "--check-hash-based-pycs", "never", "a.py"],
            ("--check-hash-based-pycs", "never"),
            ("a.py",),
            (),
        ),
        (["python", "-c", "import x; x.main()"], (), ("-c", "import x; x.main()"), ()),
        (["python", "a.py", "--own", "option"], (), ("a.py",), ("--own", "option")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_program_is_found_on_the_command_line(
    original: list[str], interpreter: tuple[str, ...], target: tuple[str, ...], words: tuple[str, ...]
) -> None:
    program = find_program(WORDS, [*original, *WORDS])
    assert program == Program((sys.executable, *interpreter), target, words)
    assert program.command(None, ["lr=1"]) == [sys.executable, *interpreter, *target, *words, "lr=1"]


def test_own_words_of_a_program_are_kept_wherever_they_stand() -> None:
    program = find_program(WORDS, ["python", "a.py", "first", "-m", "lr=1,2", "between", "sweep.jobs=2"])
    assert program.words == ("first", "between")


@pytest.mark.parametrize("original", [["python"], ["python", "-"], ["python", "a.py", "-m", "lr=1,2"]])
def test_words_that_no_command_line_holds_are_refused(original: list[str]) -> None:
    with pytest.raises(ConfigError, match="--multirun"):
        find_program(WORDS, original)


def test_this_process_is_pytest_and_no_sweep() -> None:
    with pytest.raises(ConfigError, match="must stand on the command line"):
        find_program(["-m", "no.such=word"])


@pytest.mark.parametrize("variable", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_sweep_inside_a_launcher_is_refused(variable: str) -> None:
    with pytest.raises(ConfigError, match=rf"{variable} is set.*sweep\.launcher"):
        refuse_launched({variable: "0"})
    refuse_launched({"HOME": "/"})


def test_launcher_stands_in_place_of_python_and_its_options() -> None:
    program = Program((sys.executable, "-u"), ("-m", "examples.ppo"), ())
    nice = program.command("env A=1 python -X dev", ["lr=1"])
    assert Path(nice[0]).name == "env" and nice[1:] == [
        "A=1",
        "python",
        "-X",
        "dev",
        "-m",
        "examples.ppo",
        "lr=1",
    ]


def test_launcher_is_looked_for_beside_python_first() -> None:
    command = Program((sys.executable,), ("a.py",), ()).command("torchrun --nproc_per_node 2", [])
    assert command == [str(Path(sys.executable).parent / "torchrun"), "--nproc_per_node", "2", "a.py"]


def test_launchers_of_accelerate_get_ports_of_their_own() -> None:
    program = Program((sys.executable,), ("a.py",), ())
    ports = set()
    for _ in range(2):
        command = program.command("accelerate launch --num_processes 2", [])
        assert command[1:3] == ["launch", "--main_process_port"] and command[4:] == [
            "--num_processes",
            "2",
            "a.py",
        ]
        ports.add(command[3])
    assert len(ports) == 2
    named = program.command("accelerate launch --main_process_port=7", [])
    assert named[1:] == ["launch", "--main_process_port=7", "a.py"]


def test_launcher_that_is_not_installed_is_refused() -> None:
    with pytest.raises(ConfigError, match="no program nosuchlauncher"):
        Program((sys.executable,), ("a.py",), ()).command("nosuchlauncher --now", [])


@pytest.mark.parametrize(
    ("settings", "devices", "slots"),
    [
        ({"jobs": 2}, [], [None, None]),
        ({"jobs": 2}, ["0", "1", "2", "3"], [("0", "1"), ("2", "3")]),
        ({"jobs": 3}, ["0", "1", "2", "3"], [("0",), ("1",), ("2",)]),
        ({"jobs": 2, "devices": (5, "GPU-a")}, ["0"], [("5",), ("GPU-a",)]),
        ({"jobs": 2, "devices_per_job": 1}, ["3", "4", "5"], [("3",), ("4",)]),
        ({"jobs": 2, "devices_per_job": 0}, ["0"], [None, None]),
        ({"jobs": 2, "devices_per_job": 0, "devices": (1,)}, ["0"], [("1",), ("1",)]),
        ({"jobs": 1}, ["0", "1"], [("0", "1")]),
    ],
)
def test_devices_are_divided_and_disjoint(
    settings: dict[str, object], devices: list[str], slots: list[tuple[str, ...] | None]
) -> None:
    assert slots_of(SweepConfig.model_validate(settings), devices) == slots


@pytest.mark.parametrize(
    ("settings", "devices", "words"),
    [
        ({"jobs": 3}, ["0", "1"], ("need 3 GPUs", "are 2", "sweep.jobs=2", "devices_per_job=0")),
        ({"jobs": 2, "devices_per_job": 2}, ["0", "1", "2"], ("2 x 2 = 4", "are 3")),
        ({"jobs": 2, "devices_per_job": 1}, [], ("2 x 1 = 2", "are none")),
        ({"jobs": 1, "devices": (0, 0)}, [], ("twice",)),
    ],
)
def test_too_few_devices_are_refused_with_the_arithmetic(
    settings: dict[str, object], devices: list[str], words: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        slots_of(SweepConfig.model_validate(settings), devices)
    assert [word for word in words if word not in str(caught.value)] == []


def test_visible_devices_are_those_of_the_environment() -> None:
    assert visible_devices({"CUDA_VISIBLE_DEVICES": "2, GPU-b,7"}) == ["2", "GPU-b", "7"]
    assert visible_devices({"CUDA_VISIBLE_DEVICES": ""}) == []
    assert visible_devices({"CUDA_VISIBLE_DEVICES": "-1"}) == []


def test_visible_devices_are_asked_of_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_devices({}) == []
    tool.write_text("#!/bin/sh\nprintf '0\\n1\\n'\n")
    tool.chmod(0o755)
    assert visible_devices({}) == ["0", "1"]
    tool.write_text("#!/bin/sh\necho No devices were found\nexit 6\n")
    assert visible_devices({}) == []


def test_slot_says_which_gpus_a_job_has() -> None:
    assert slot_environment(("2", "3")) == {"CUDA_VISIBLE_DEVICES": "2,3"}
    assert slot_environment(None) == {}


def test_threads_are_divided_unless_somebody_decided() -> None:
    processors = len(os.sched_getaffinity(0))
    assert thread_environment(SweepConfig(), {}) == {}
    assert thread_environment(SweepConfig(jobs=2), {}) == {"OMP_NUM_THREADS": str(max(1, processors // 2))}
    assert thread_environment(SweepConfig(jobs=10_000), {}) == {"OMP_NUM_THREADS": "1"}
    assert thread_environment(SweepConfig(jobs=2), {"OMP_NUM_THREADS": "7"}) == {}
    assert thread_environment(SweepConfig(threads=3), {"OMP_NUM_THREADS": "7"}) == {"OMP_NUM_THREADS": "3"}
