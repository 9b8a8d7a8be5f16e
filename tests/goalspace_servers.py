"""Goal-space servers: real uvicorn with several workers, started from the folder of the example."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.launches import free_port

FOLDER = Path(__file__).resolve().parents[1] / "examples/steerability"
START_S = 240.0
GOALS = '''
"""Goals of tests: what they measured is in a file, by process."""

import os
import time
from pathlib import Path

SEEN = Path(os.environ["SEEN"])


def lengths(texts):
    with SEEN.open("a") as file:
        file.writelines(f"{os.getpid()} {text}\\n" for text in texts)
    return [len(text) if "?" not in text else None for text in texts]


def slow(texts):
    for text in texts:
        end = time.perf_counter() + (float(text.split()[1]) if text.startswith("busy ") else 0.0)
        while time.perf_counter() < end:
            pass
        if text == "crash":
            os._exit(7)
    return [0.0 for text in texts]
'''


@dataclass
class GoalspaceServer:
    """`uvicorn goalspace_server:app --workers W`, as a context.

    folder: for its goals, what they saw, its log and its temporary files.
    environment: of the server, beyond this process's own.
    """

    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    workers: int = 2

    def __enter__(self) -> GoalspaceServer:
        (self.folder / "goals_of_a_test.py").write_text(GOALS)
        self.seen, self.log = self.folder / "seen.txt", self.folder / "server.log"
        self.temporary = self.folder / "temporary"
        self.temporary.mkdir(exist_ok=True)
        self.port = free_port()
        own = {"SEEN": str(self.seen), "GOALSPACE_LOG": str(self.log), "TMPDIR": str(self.temporary)}
        command = [sys.executable, "-m", "uvicorn", "goalspace_server:app", "--host", "127.0.0.1"]
        with (self.folder / "stdout.txt").open("wb") as output:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port), "--workers", str(self.workers)],
                cwd=FOLDER,
                env={**os.environ, **own, **self.environment},
                stderr=subprocess.STDOUT,
                stdout=output,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def wait_until_ready(self, headers: Mapping[str, str] | None = None) -> None:
        """Wait until it answers `/health`."""
        end = time.monotonic() + START_S
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if self.ask("/health", headers=headers)[0] == 200:
                    return
            except OSError:
                time.sleep(0.2)
        raise AssertionError(f"the server is not ready: {self.output()}")

    def output(self) -> str:
        """What it wrote to its log and elsewhere."""
        log = self.log.read_text() if self.log.exists() else ""
        return log + (self.folder / "stdout.txt").read_text()

    def ask(
        self, path: str, body: Any = None, headers: Mapping[str, str] | None = None, timeout_s: float = 120.0
    ) -> tuple[int, Any, Mapping[str, str]]:
        """Status, JSON and headers of an answer; a body of bytes is sent as it is."""
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        url = f"http://127.0.0.1:{self.port}{path}"
        request = urllib.request.Request(url, content, dict(headers or {}))
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=timeout_s) as reply:
                return reply.status, json.loads(reply.read()), dict(reply.headers)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read()), {k.lower(): v for k, v in error.headers.items()}

    def end(self) -> int:
        """End it as Ctrl-C and service managers do, and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)
