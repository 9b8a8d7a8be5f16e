"""Checks in processes of their own: late, dead and failing ones, and what is left behind (nothing)."""

from __future__ import annotations

import gc
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from conch.config.verifiers import GSM8KConfig
from conch.errors import ConfigError
from conch.rewards.verifiers.base import Verdict, Verifier
from conch.rewards.verifiers.gsm8k import GSM8K
from conch.rewards.verifiers.pool import CheckDiedError, CheckPool

ROOT = Path(__file__).resolve().parents[2]


class OddError(Exception):
    """Cannot be pickled: its constructor wants two arguments and `args` holds one."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{what} in {where}")


class Moody(Verifier[str]):
    """Does what the completion says; the key is given back as the pid's companion."""

    name = "moody"
    columns = ("key",)

    def __init__(self, timeout_s: float = 120.0, processes: int = 1, warm_up_s: float = 0.0) -> None:
        self.timeout_s = timeout_s
        self.processes = processes
        self.warm_up_s = warm_up_s

    def warm_up(self) -> None:
        if self.warm_up_s < 0:
            raise ValueError("no such model")
        time.sleep(self.warm_up_s)

    def read_key(self, row: Mapping[str, Any]) -> str:
        return row["key"]

    def verify(self, completion: str, key: str) -> Verdict:
        word, _, rest = completion.partition(" ")
        if word == "sleep":
            time.sleep(float(rest))
        elif word == "exit":
            os._exit(int(rest))
        elif word == "leave":
            sys.exit(int(rest))
        elif word == "signal":
            os.kill(os.getpid(), int(rest))
        elif word == "raise":
            raise ValueError(rest)
        elif word == "odd":
            raise OddError("a fault", "a place")
        elif word == "lambda":
            return Verdict({"answer": 1.0}, {"correct": lambda: None})  # type: ignore[dict-item]
        return Verdict({"answer": float(len(completion))}, {"pid": float(os.getpid())})


def pid_of(pool: CheckPool[str]) -> int:
    return int(pool.submit("hello", "").result(timeout=60).facts["pid"])


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Zombies count as gone: whoever takes over orphans here may never collect them."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture
def pool() -> Iterator[CheckPool[str]]:
    with CheckPool(Moody()) as pool:
        yield pool


def test_checks_run_in_other_processes(pool: CheckPool[str]) -> None:
    assert pid_of(pool) != os.getpid()
    assert pool.submit("four", "").result(timeout=60).scores == {"answer": 4.0}


def test_late_check_is_killed_and_the_next_one_is_served() -> None:
    with CheckPool(Moody(timeout_s=2.5)) as pool:
        before = pid_of(pool)
        with pytest.raises(TimeoutError, match=r"moody: the check took longer than 2\.5 s"):
            pool.submit("sleep 600", "").result(timeout=60)
        assert not is_running(before)
        assert pid_of(pool) != before


@pytest.mark.parametrize(
    ("completion", "end"),
    [
        ("exit 3", "ended with code 3"),
        ("exit 0", "ended with code 0"),
        ("leave 4", "ended with code 4"),
        (f"signal {int(signal.SIGKILL)}", "was killed by SIGKILL"),
        (f"signal {int(signal.SIGSEGV)}", "was killed by SIGSEGV"),
    ],
)
def test_check_that_ends_its_process_fails_at_once_and_alone(
    pool: CheckPool[str], completion: str, end: str
) -> None:
    with pytest.raises(CheckDiedError, match=f"moody: a process {end}, during the check"):
        pool.submit(completion, "").result(timeout=100)  # less than the deadline of a check
    assert pool.submit("four", "").result(timeout=60).scores == {"answer": 4.0}


def test_errors_of_the_verifier_arrive_with_their_traceback(pool: CheckPool[str]) -> None:
    before = pid_of(pool)
    with pytest.raises(ValueError, match="bad luck") as caught:
        pool.submit("raise bad luck", "").result(timeout=60)
    assert "in verify" in str(caught.value.__cause__)
    with pytest.raises(RuntimeError, match="OddError: a fault in a place"):
        pool.submit("odd", "").result(timeout=60)
    with pytest.raises(Exception, match=r"[Pp]ickle|local object"):
        pool.submit("lambda", "").result(timeout=60)
    with pytest.raises(Exception, match=r"[Pp]ickle|local object"):
        pool.submit("hello", lambda: None).result(timeout=60)  # type: ignore[arg-type]
    assert pid_of(pool) == before


def test_idle_process_that_is_killed_costs_one_check_at_most(pool: CheckPool[str]) -> None:
    os.kill(pid := pid_of(pool), signal.SIGKILL)
    wait_until(lambda: not is_running(pid))
    with pytest.raises(CheckDiedError, match="was killed by SIGKILL"):
        pid_of(pool)
    assert pid_of(pool) != pid


def test_check_without_room_for_its_process_fails_and_a_later_one_is_served() -> None:
    """No file can be opened for a while."""
    with CheckPool(Moody()) as pool:
        pid_of(pool)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            with pytest.raises(CheckDiedError, match="ended with code 3"):
                pool.submit("exit 3", "").result(timeout=60)
            with pytest.raises(OSError, match="Too many open files"):
                pool.submit("four", "").result(timeout=60)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert pool.submit("four", "").result(timeout=60).scores == {"answer": 4.0}


def test_fork_leaves_the_pool_to_its_parent(pool: CheckPool[str]) -> None:
    before = pid_of(pool)
    child = os.fork()
    if child == 0:
        try:
            pool.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert pid_of(pool) == before


def test_start_counts_for_no_deadline() -> None:
    with CheckPool(Moody(timeout_s=2.0, warm_up_s=3.0)) as pool:
        assert pid_of(pool)


def test_failed_start_is_told_by_every_check() -> None:
    with CheckPool(Moody(warm_up_s=-1)) as pool:
        for _ in range(2):
            with pytest.raises(ValueError, match="no such model"):
                pid_of(pool)


def test_checks_from_many_threads_use_all_processes_and_hold_up_nobody() -> None:
    with CheckPool(Moody(processes=2, timeout_s=5)) as pool, ThreadPoolExecutor(8) as threads:
        late = pool.submit("sleep 600", "")
        texts = ["x" * length for length in (0, 1, 70_000, 3_000_000)] * 16
        verdicts = list(threads.map(lambda text: pool.submit(text, "").result(timeout=60), texts))
        assert [verdict.scores["answer"] for verdict in verdicts] == [len(text) for text in texts]
        with pytest.raises(TimeoutError):
            late.result(timeout=60)
        pair = [pool.submit("sleep 1", "") for _ in range(2)]
        assert len({future.result(timeout=60).facts["pid"] for future in pair}) == 2


def test_closing_cancels_what_waits_kills_what_runs_and_leaves_nothing() -> None:
    descriptors, threads = set(os.listdir("/proc/self/fd")), threading.active_count()
    pool = CheckPool(Moody())
    pid = pid_of(pool)
    running, waiting = pool.submit("sleep 600", ""), pool.submit("hello", "")
    wait_until(running.running)
    pool.close()
    with pytest.raises(CheckDiedError, match="was ended with its pool"):
        running.result(timeout=0)
    assert waiting.cancelled()
    assert not is_running(pid)
    assert threading.active_count() == threads
    assert set(os.listdir("/proc/self/fd")) == descriptors
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit("hello", "")
    pool.close()


def test_waiting_check_can_be_cancelled(pool: CheckPool[str]) -> None:
    first, second = pool.submit("sleep 0.5", ""), pool.submit("exit 1", "")
    assert second.cancel()
    first.result(timeout=60)
    assert pid_of(pool)


def test_forgotten_pool_ends_its_processes() -> None:
    pool = CheckPool(Moody())
    pid = pid_of(pool)
    del pool
    gc.collect()
    wait_until(lambda: not is_running(pid))


def test_verifier_that_cannot_be_sent_is_told() -> None:
    verifier = Moody()
    verifier.lock = threading.Lock()  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"moody: .* cannot be sent .* define its class at the top"):
        CheckPool(verifier)


SCRIPT = """
import os, threading, time
from conch.rewards.verifiers.base import Verdict, Verifier
from conch.rewards.verifiers.pool import CheckPool

class Mine(Verifier[str]):
    name, columns, timeout_s, processes = "mine", (), 2.0, 1
    def read_key(self, row): return ""
    def verify(self, completion, key):
        threading.Thread(target=time.sleep, args=(3600,)).start()  # keeps its process, as some libraries do
        print(os.getpid(), flush=True)
        time.sleep(float(completion))
        return Verdict({"answer": 1.0})
"""


def run_script(folder: Path, body: str) -> subprocess.Popen[str]:
    script = folder / "script.py"
    script.write_text(textwrap.dedent(body))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, str(script)],
        env=environment,
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_script_without_a_guard_runs_once(tmp_path: Path) -> None:
    """multiprocessing runs the script again in every process that it starts, and fails there."""
    body = """
        from conch.config.verifiers import GSM8KConfig
        from conch.rewards.verifiers.gsm8k import GSM8K
        from conch.rewards.verifiers.pool import CheckPool
        print("begin")
        pool = CheckPool(GSM8K(GSM8KConfig(extractor="math", processes=1, check_timeout_s=60)))
        print(pool.submit(r"It is \\\\boxed{18}.", "18").result().scores)
    """
    process = run_script(tmp_path, body)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (0, "begin\n{'answer': 1.0}\n", "")


def test_verifier_of_a_script_is_found_there(tmp_path: Path) -> None:
    body = SCRIPT + "\nif __name__ == '__main__':\n    with CheckPool(Mine()) as pool:\n"
    process = run_script(tmp_path, body + "        print(pool.submit('0', '').result().scores)\n")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out.split("\n", 1)[1], err) == (0, "{'answer': 1.0}\n", "")


@pytest.mark.parametrize("completion", ["0", "3600"])
def test_nothing_outlives_a_trainer_that_is_killed(tmp_path: Path, completion: str) -> None:
    body = SCRIPT + (
        "\nif __name__ == '__main__':\n"
        "    pool = CheckPool(Mine())\n"
        f"    pool.submit({completion!r}, '')\n"
        "    time.sleep(3600)\n"
    )
    process = run_script(tmp_path, body)
    assert process.stdout is not None and process.stderr is not None
    pid = int(process.stdout.readline())
    assert is_running(pid)
    process.kill()
    process.wait()
    process.stdout.close()
    process.stderr.close()
    wait_until(lambda: not is_running(pid))


def test_math_verify_that_never_ends_is_killed() -> None:
    """It works the power out, digit by digit."""
    verifier = GSM8K(GSM8KConfig(extractor="math", processes=1, check_timeout_s=2))
    with CheckPool(verifier) as pool:
        with pytest.raises(TimeoutError, match=r"gsm8k: the check took longer than 2 s"):
            pool.submit("The answer is 9^9^9^9.", "18").result(timeout=120)
        assert pool.submit("The answer is 3^2.", "9").result(timeout=120).scores == {"answer": 1.0}


def test_math_verify_checks_in_a_pool_from_any_thread() -> None:
    verifier = GSM8K(GSM8KConfig(extractor="math", processes=1, check_timeout_s=60))
    verdicts = []
    with CheckPool(verifier) as pool:
        thread = threading.Thread(
            target=lambda: verdicts.append(pool.submit(r"So \(\frac{36}{2}\).", "18").result(timeout=120))
        )
        thread.start()
        thread.join()
    assert verdicts[0].scores == {"answer": 1.0}
