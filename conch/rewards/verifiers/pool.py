"""Processes that run a verifier's checks, each check with a deadline at which its process is killed.

    with CheckPool(verifier) as pool:
        future = pool.submit(completion, key)      # from any thread
        verdict = future.result()                  # or TimeoutError, CheckDiedError, or what `verify` raised

A thread for each process hands over one check at a time and waits for the reply, so that a check that hangs
delays no other process's. A process is a fresh interpreter: it holds no copy of the trainer's memory, locks
or GPU, and does not run the trainer's script again. (Only a verifier whose class is defined in that script
needs that, and an `if __name__ == "__main__":` around what the script does.)

A process ends when the pool is closed or collected and when the trainer ends, in whatever way; if a check
then still runs, the kernel ends it soon after its deadline. `concurrent.futures` kills nothing at a deadline;
pebble's pool (5.2.3) is broken for good once an idle process is killed, and takes an exit with code 0 for a
check that is late.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from multiprocessing.spawn import get_preparation_data, prepare
from pathlib import Path
from typing import Any, Generic

from conch.errors import ConfigError, RewardError
from conch.rewards.verifiers.base import KeyT, Verdict, Verifier

_START_TIMEOUT_S = 300.0  # for imports and `warm_up`, also from a slow file system
_GRACE_S = 5.0  # how long after the deadline the kernel ends a check that the pool did not
_LOOK_UP_S = 5.0  # how often an idle process looks whether its parent lives
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from conch.rewards.verifiers.pool import serve_checks; serve_checks(int(sys.argv[2]))"
)


class CheckDiedError(RewardError):
    """The process that was to run a check ended before the check did."""


class CheckPool(Generic[KeyT]):
    """Runs `verifier.verify` in `verifier.processes` processes.

    The processes start at once, in the background, and one that was killed is replaced at once. Neither the
    time until a process has imported the verifier and is through with `warm_up` counts for a check's
    deadline, nor the time that a check waits for a free process.

    Raises:
        ConfigError: the verifier cannot be sent to another process.
    """

    def __init__(self, verifier: Verifier[KeyT]) -> None:
        assert verifier.timeout_s is not None, "a check without a deadline needs no process of its own"
        state = _State(verifier.name, float(verifier.timeout_s), _preparation(verifier))
        self._state = state
        self._threads = [
            threading.Thread(
                target=_run_checks, args=(state,), name=f"checks of {verifier.name}", daemon=True
            )
            for _ in range(verifier.processes)
        ]
        self._close = weakref.finalize(self, state.close, len(self._threads))
        for thread in self._threads:
            thread.start()

    def submit(self, completion: str, key: KeyT) -> Future[Verdict]:
        """Check one completion in the background. A check that still waits can be cancelled.

        The future raises:
            TimeoutError: the check took longer than `verifier.timeout_s` seconds and was killed.
            CheckDiedError: the process ended in the check or could not start, or the pool was closed.
            Exception: whatever `verify` raised.
        """
        job = _Job(completion, key)
        with self._state.lock:
            if self._state.closed:
                raise RuntimeError(f"the pool of checks of {self._state.name} is closed")
            self._state.jobs.put(job)
        return job.future

    def close(self) -> None:
        """Cancel the checks that wait, kill those under way, and end all processes."""
        self._close()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def __enter__(self) -> CheckPool[KeyT]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(slots=True)
class _Job:
    completion: str
    key: Any
    future: Future[Verdict] = field(default_factory=Future)


@dataclass
class _State:
    """What a pool shares with its threads. It does not know the pool, so that the pool can be collected.

    name: the verifier's.
    timeout_s: longest time of a check, in seconds.
    preparation: what a process reads first, see `_preparation`.
    jobs: checks that wait; None ends a thread.
    processes: those that run.
    pid: of the process that made the pool; they are nobody else's to end.
    lock: of `processes` and `closed`. Reentrant, since whatever thread holds it may collect the pool.
    """

    name: str
    timeout_s: float
    preparation: bytes
    jobs: queue.SimpleQueue[_Job | None] = field(default_factory=queue.SimpleQueue)
    processes: set[subprocess.Popen[bytes]] = field(default_factory=set)
    closed: bool = False
    pid: int = field(default_factory=os.getpid)
    lock: contextlib.AbstractContextManager[Any] = field(default_factory=threading.RLock)

    def close(self, threads: int) -> None:
        if os.getpid() != self.pid:
            return  # a copy that came with a fork, whose lock nobody may ever release
        with self.lock:
            self.closed = True
            with contextlib.suppress(queue.Empty):
                while (job := self.jobs.get_nowait()) is not None:
                    job.future.cancel()
            for _ in range(threads):
                self.jobs.put(None)
            for process in self.processes:
                process.kill()


def _run_checks(state: _State) -> None:
    """Hand one check after another to a process, and replace the process where it has ended."""
    checker = _start(state)
    while (job := state.jobs.get()) is not None:
        if not job.future.set_running_or_notify_cancel():
            continue
        try:
            checker = checker or _Checker(state)
            verdict = checker.check(job.completion, job.key)
        except BaseException as error:
            job.future.set_exception(error)
        else:
            job.future.set_result(verdict)
        if checker is None or checker.ended:
            checker = _start(state)
    if checker is not None:
        checker.end()


def _start(state: _State) -> _Checker | None:
    """Start a process; None where there is no room for one now, which the next check finds out anew."""
    try:
        return _Checker(state)
    except OSError:
        return None


class _Checker:
    """One process that checks, seen from its thread."""

    def __init__(self, state: _State) -> None:
        self._state = state
        self._ready = False
        self._connection, theirs = Pipe()
        self._process: subprocess.Popen[bytes] | None = None
        with theirs, contextlib.suppress(OSError), state.lock:
            if not state.closed:
                # '' in sys.path is the folder at the start, not one that the trainer changed into since.
                path = json.dumps(get_preparation_data("checks")["sys_path"])
                command = [sys.executable, "-c", _PROGRAM, path, str(theirs.fileno())]
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
                )
                state.processes.add(self._process)
        with contextlib.suppress(OSError):
            self._connection.send_bytes(state.preparation)

    @property
    def ended(self) -> bool:
        return self._connection.closed

    def check(self, completion: str, key: Any) -> Any:
        """Run one check. After a TimeoutError or CheckDiedError of its own the process has ended."""
        if not self._ready:
            self._receive(_START_TIMEOUT_S, "start")
            self._ready = True
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # which `_receive` explains
            self._connection.send((completion, key))
        return self._receive(self._state.timeout_s, "check")

    def _receive(self, timeout_s: float, task: str) -> Any:
        try:
            in_time = self._connection.poll(timeout_s)
            verdict, error, trace = self._connection.recv() if in_time else (None, None, "")
        except (EOFError, ConnectionError):
            if self._process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout=1.0)  # its end is closed: it has a code of its own to tell
            raise CheckDiedError(f"{self._state.name}: a process {self.end()}, during the {task}") from None
        if not in_time:
            self.end()
            raise TimeoutError(f"{self._state.name}: the {task} took longer than {timeout_s:g} s")
        if error is not None:
            if not self._ready:
                self.end()
            raise error from _RemoteError(trace)
        return verdict

    def end(self) -> str:
        """Kill the process if it runs, and tell how it ended."""
        self._connection.close()
        if self._process is None:
            return "could not be started" if not self._state.closed else "was ended with its pool"
        self._process.kill()
        code = self._process.wait()
        with self._state.lock:
            self._state.processes.discard(self._process)
        if self._state.closed:
            return "was ended with its pool"
        return f"ended with code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"


class _RemoteError(Exception):
    """Traceback in the process that checked, shown as the cause of the error."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _preparation(verifier: Verifier[Any]) -> bytes:
    """Pickle what a process needs: how to find the trainer's script if the verifier's class is defined there,
    the verifier (pickled by itself, since the script comes first), and a check's longest time in seconds.

    Raises:
        ConfigError: the verifier cannot be pickled, or its class is in no file.
    """
    script: dict[str, Any] = {}
    if type(verifier).__module__ == "__main__":
        script = {
            name: value
            for name, value in get_preparation_data("checks").items()
            if name.startswith("init_main")
        }
        if not script:
            raise ConfigError(
                f"{verifier.name}: the verifier's class is defined in no file, and its checks run in other "
                "processes; put it into a module"
            )
    try:
        return pickle.dumps((script, pickle.dumps(verifier), verifier.timeout_s))
    except Exception as error:
        raise ConfigError(
            f"{verifier.name}: the verifier cannot be sent to the processes that check ({error}); define its "
            "class at the top of a module, and keep open files, locks and lambdas out of it"
        ) from error


def serve_checks(descriptor: int) -> None:
    """Run checks in this process until the other end of the connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupted trainer closes the pool
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    with contextlib.suppress(OSError):
        # Where memory runs out, the kernel ends a check and not the trainer.
        Path("/proc/self/oom_score_adj").write_text("1000")
    parent = os.getppid()
    connection = Connection(descriptor)
    with contextlib.suppress(EOFError, ConnectionError):
        verifier, timeout_s = _load(connection)
        while verifier is not None:
            while not connection.poll(_LOOK_UP_S):
                if os.getppid() != parent:
                    os._exit(1)
            message = connection.recv_bytes()
            with _alarm(timeout_s + _GRACE_S):
                try:
                    completion, key = pickle.loads(message)
                    reply = (verifier.verify(completion, key), None, "")
                except Exception as error:
                    reply = _failure(error)
                connection.send_bytes(_pickled(reply))
    os._exit(0)  # threads that a verifier left behind keep nothing alive


def _load(connection: Connection) -> tuple[Verifier[Any] | None, float]:
    """Receive the verifier, warm it up, and tell the other end; None where that failed."""
    with _alarm(_START_TIMEOUT_S + _GRACE_S):
        try:
            script, pickled, timeout_s = pickle.loads(connection.recv_bytes())
            prepare(script)
            verifier = pickle.loads(pickled)
            verifier.warm_up()
        except (EOFError, ConnectionError):
            raise
        except Exception as error:
            connection.send_bytes(_pickled(_failure(error)))
            return None, 0.0
        connection.send_bytes(_pickled((None, None, "")))
        return verifier, timeout_s


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Have the kernel end this process after `seconds`, whatever it does, so that no check outlives a trainer
    that was killed."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)


def _failure(error: Exception) -> tuple[None, Exception, str]:
    """An error as the other end can raise it: one that does not survive pickling becomes a RuntimeError."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return None, error, traceback.format_exc()


def _pickled(reply: tuple[Verdict | None, Exception | None, str]) -> bytes:
    try:
        return pickle.dumps(reply)
    except Exception as error:
        return pickle.dumps(_failure(error))
