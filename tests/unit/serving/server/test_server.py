from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from conch.errors import ModelStoreError, ServerStartError
from conch.serving.server import server as launcher
from conch.serving.server.environment import ModelPython
from conch.serving.server.runtime import check_model_python, check_platform, check_programs, find_bundle
from conch.serving.server.server import TritonServer, free_port, scratch_folder, wait_until_open
from tests.stores import store_model

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
OWN = ModelPython(Path(sys.prefix), Path(sys.prefix, "lib"), is_beside=False)
BESIDE = ModelPython(Path("/beside"), Path("/beside/lib"), is_beside=True)
GOOD = {"python": PYTHON, "numpy": "1.26.4", "torch": "2.13.0", "transformers": "5.23.0"}


def test_check_model_python_accepts_what_was_tested() -> None:
    check_model_python(GOOD, OWN)


def test_check_model_python_refuses_numpy_2_and_says_why() -> None:
    with pytest.raises(ServerStartError, match=r"numpy 2\.3\.5 .* zeros: pip install"):
        check_model_python({**GOOD, "numpy": "2.3.5"}, OWN)
    with pytest.raises(ServerStartError, match=r"in /beside; .* zeros: conch serve install --anew"):
        check_model_python({**GOOD, "numpy": "2.3.5"}, BESIDE)


def test_check_model_python_names_missing_packages() -> None:
    with pytest.raises(
        ServerStartError, match=r"models need torch, transformers .*pip install torch transformers"
    ):
        check_model_python({"python": PYTHON, "numpy": "1.26.4"}, OWN)


def test_check_model_python_refuses_another_python_in_the_bin_folder() -> None:
    with pytest.raises(ServerStartError, match=r"is Python 3\.9, not"):
        check_model_python({**GOOD, "python": "3.9"}, OWN)


@pytest.mark.parametrize("python", [(3, 10), (3, 11), (3, 12)])
def test_check_platform_accepts_the_pythons_with_a_stub(python: tuple[int, int]) -> None:
    check_platform("Linux", "x86_64", python)


@pytest.mark.parametrize(
    ("platform", "expected"),
    [
        (("Darwin", "arm64", (3, 11)), "this is Darwin arm64; run a server elsewhere and set TRITON_HOST"),
        (("Linux", "aarch64", (3, 11)), "this is Linux aarch64"),
        (("Linux", "x86_64", (3, 13)), r"this is 3\.13"),
        (("Linux", "x86_64", (3, 9)), r"this is 3\.9"),
    ],
)
def test_check_platform_refuses_the_rest(platform: tuple[str, str, tuple[int, int]], expected: str) -> None:
    with pytest.raises(ServerStartError, match=expected):
        check_platform(*platform)


def test_check_programs_refuses_what_this_user_may_not_run(tmp_path: Path) -> None:
    stub = tmp_path / "stub"
    stub.touch(0o600)
    with pytest.raises(ServerStartError, match=f"this user may not run {stub}; .*: chmod 755 .*stub"):
        check_programs(Path(sys.executable), stub)


def test_environment_puts_this_python_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/mine")
    bundle = find_bundle()
    environment = bundle.environment(cpu_threads=3)

    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.prefix) / "bin")
    libraries = environment["LD_LIBRARY_PATH"].split(os.pathsep)
    assert libraries[-1] == "/mine" and libraries[1].endswith("nvidia_pytriton.libs")
    assert environment["OMP_NUM_THREADS"] == "3"


def test_environment_keeps_the_heap_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    monkeypatch.setenv("MALLOC_TOP_PAD_", "0")
    environment = find_bundle().environment(cpu_threads=1)

    assert environment["MALLOC_TRIM_THRESHOLD_"] == str(2**27)
    assert environment["MALLOC_TOP_PAD_"] == "0"


def test_start_refuses_a_model_that_is_not_there(tmp_path: Path) -> None:
    store_model(tmp_path)
    with pytest.raises(ModelStoreError, match="there are: lengths"):
        TritonServer(tmp_path, ["talks"]).start()


def test_start_refuses_damaged_weights(tmp_path: Path) -> None:
    (store_model(tmp_path) / "model.safetensors").write_bytes(b"other")
    with pytest.raises(ModelStoreError, match=r"model\.safetensors is damaged"):
        TritonServer(tmp_path, ["lengths"]).start()


def test_start_refuses_a_port_that_is_taken(tmp_path: Path) -> None:
    store_model(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ServerStartError, match=f"port {port} on 127.0.0.1 is taken; stop what listens there"
        ):
            TritonServer(tmp_path, ["lengths"], grpc_port=port).start()


def test_start_refuses_a_port_that_does_not_exist(tmp_path: Path) -> None:
    store_model(tmp_path)
    with pytest.raises(ServerStartError, match="port 70000 does not exist"):
        TritonServer(tmp_path, ["lengths"], grpc_port=70_000).start()


def test_start_refuses_a_host_that_is_not_this_machine(tmp_path: Path) -> None:
    store_model(tmp_path)
    with pytest.raises(ServerStartError, match=r"cannot listen on 192\.0\.2\.1 .*this machine"):
        TritonServer(tmp_path, ["lengths"], host="192.0.2.1", grpc_port=8001).start()


@pytest.mark.parametrize("host", ["0.0.0.0", ""])
def test_start_refuses_to_listen_for_everybody(tmp_path: Path, host: str) -> None:
    store_model(tmp_path)
    with pytest.raises(ServerStartError, match=r"whoever reaches it may have texts scored: .*--secret-env"):
        TritonServer(tmp_path, ["lengths"], host=host).start()


def test_start_refuses_a_log_file_that_cannot_be_written(tmp_path: Path) -> None:
    store_model(tmp_path)
    with pytest.raises(ServerStartError, match=r"log file .* cannot be written"):
        TritonServer(tmp_path, ["lengths"], log_file=tmp_path).start()


def test_stop_before_start_does_nothing(tmp_path: Path) -> None:
    server = TritonServer(tmp_path, ["lengths"])
    server.stop()
    assert not server.is_running


@pytest.fixture
def spaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder, whose name would be two words to a shell."""
    folder = tmp_path / "some files"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def test_scratch_folder_is_no_two_words_to_a_shell(spaced: Path) -> None:
    folder = scratch_folder()
    folder.rmdir()

    assert spaced not in folder.parents and " " not in str(folder)


def test_scratch_folder_that_cannot_be_is_told_with_a_remedy(
    spaced: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "_OTHER_TEMPORARY_FOLDERS", ("/nowhere",))
    with pytest.raises(ServerStartError, match=r"some files' has a space .* set TMPDIR to one without"):
        scratch_folder()


def test_port_that_opens_late_is_waited_for() -> None:
    port, listeners = free_port("127.0.0.1"), list[socket.socket]()

    def is_alive() -> bool:
        """Asked once the port was found closed."""
        listeners.append(socket.create_server(("127.0.0.1", port)))
        return True

    wait_until_open("127.0.0.1", port, is_alive=is_alive, deadline=float("inf"))
    (listener,) = listeners
    listener.close()


@pytest.mark.parametrize(
    ("is_alive", "expected"), [(False, "died before it opened port"), (True, "was not opened in time")]
)
def test_port_that_never_opens_is_told(is_alive: bool, expected: str) -> None:
    port = free_port("127.0.0.1")
    with pytest.raises(ServerStartError, match=expected):
        wait_until_open("127.0.0.1", port, is_alive=lambda: is_alive, deadline=0.0)
