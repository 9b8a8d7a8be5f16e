from __future__ import annotations

import logging
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from conch.errors import ConfigError
from conch.servers.shared_folder import SharedFolder
from conch.servers.shared_log import WholeLines, share_log

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_the_last_one_removes_the_folder(temporary: Path) -> None:
    first, second = SharedFolder("kind", "7"), SharedFolder("kind", "7")
    (first.path / "file").write_text("x")
    assert first.path == second.path
    assert first.path.stat().st_mode & 0o077 == 0
    first.close()
    assert (second.path / "file").exists()
    second.close()
    second.close()
    assert list(temporary.iterdir()) == []
    with SharedFolder("kind", "7") as again:
        assert not (again.path / "file").exists()


def test_a_folder_of_a_killed_server_is_removed_and_of_a_running_one_kept(temporary: Path) -> None:
    program = (
        "import sys, tempfile, time; tempfile.tempdir = sys.argv[1]\n"
        "from conch.servers.shared_folder import SharedFolder\n"
        "folder = SharedFolder('kind', sys.argv[2]); print('ready', flush=True); time.sleep(600)\n"
    )
    command = [sys.executable, "-c", program, str(temporary)]
    servers = [
        subprocess.Popen([*command, key], cwd=ROOT, stdout=subprocess.PIPE, text=True) for key in ("a", "b")
    ]
    for server in servers:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        server.stdout.close()
    servers[0].kill()
    servers[0].wait()
    with SharedFolder("kind", "c") as mine:
        names = {each.name.rpartition("-")[2] for each in temporary.iterdir()}
        assert names == {"b", "c"}
        assert mine.path.exists()
    servers[1].kill()
    servers[1].wait()


def test_a_folder_of_somebody_elses_is_refused(temporary: Path) -> None:
    with SharedFolder("kind", "7") as folder:
        path = folder.path
    path.mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="not this user's alone"):
        SharedFolder("kind", "7")


def test_each_record_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    share_log("conch.of_a_test", path=path)
    logger = logging.getLogger("conch.of_a_test")
    logger.info("two\nlines")
    try:
        raise ValueError("broken")
    except ValueError:
        logger.exception("it failed")
    logger.info("x" * 10_000)
    logger.debug("not shown")
    lines = path.read_text().splitlines()
    assert len(lines) == 3
    assert re.fullmatch(r"\S+ \S+ \d+ I conch\.of_a_test: two\\nlines", lines[0])
    assert lines[1].endswith("ValueError: broken")
    assert len(lines[2]) < 4096
    logger.handlers[0].close()
    logger.handlers[:] = []


def test_a_log_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        WholeLines(tmp_path / "absent" / "log")


def test_lines_of_several_processes_do_not_mix(tmp_path: Path) -> None:
    program = (
        "import logging, sys; from pathlib import Path; from conch.servers.shared_log import share_log\n"
        "share_log('conch', path=Path(sys.argv[1]))\n"
        "for n in range(300): logging.getLogger('conch.x').info('%s', sys.argv[2] * 300)\n"
    )
    path = tmp_path / "log"
    command = [sys.executable, "-c", program, str(path)]
    writers = [subprocess.Popen([*command, letter], cwd=ROOT) for letter in "abc"]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    lines = path.read_text().splitlines()
    assert len(lines) == 900
    assert all(re.fullmatch(r"\S+ \S+ \d+ I conch\.x: (a{300}|b{300}|c{300})", line) for line in lines)
