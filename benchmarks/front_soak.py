"""Does a reward server that lives long grow? Memory and processor time over 200,000 requests.

    python -m benchmarks.front_soak

The server is a process of its own, with a Python function behind it that takes no time; `--callers`
connections that stay open send OpenRLHF's body, one sample a POST, all of them different, and every tenth
request is one that the server refuses. USS is what its process alone holds in memory. `--warm-up` requests go
before. The second half of the requests is held against the first: Python takes memory a MiB at a time, which
is more than the growth that is looked for, but happens once; what leaks goes on.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import psutil

from conch.errors import ConchError, ServerStartError
from conch.serving.server.server import free_port

_FUNCTION = """
def reward(samples, prompts, outputs, **metadata):
    return [float(len(each)) for each in outputs]
"""
_START_S = 60.0
_MOST_GROWTH = 0.01


@dataclass(frozen=True, slots=True)
class Look:
    """What the server held after so many requests. uss: bytes. cpu_s: seconds of processor time so far."""

    requests: int
    uss: int
    files: int
    cpu_s: float

    @classmethod
    def at(cls, process: psutil.Process, requests: int) -> Look:
        """Of a process now."""
        times = process.cpu_times()
        return cls(requests, process.memory_full_info().uss, process.num_fds(), times.user + times.system)


@contextmanager
def _server(folder: Path) -> Iterator[tuple[int, psutil.Process]]:
    """Port and process of a server, once it is ready."""
    (folder / "nothing.py").write_text(_FUNCTION, encoding="utf-8")
    port = free_port("127.0.0.1")
    settings = [f"reward={folder / 'nothing.py'}:reward", f"port={port}", "restart=false"]
    process = subprocess.Popen([sys.executable, "-m", "conch.reward_server", *settings])
    try:
        deadline = time.monotonic() + _START_S
        while not _is_ready(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise ServerStartError("the reward server did not start; its own words stand above")
            time.sleep(0.2)
        yield port, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def _is_ready(port: int) -> bool:
    try:
        return httpx2.get(f"http://127.0.0.1:{port}/ready", timeout=5.0, trust_env=False).is_success
    except httpx2.TransportError:
        return False


async def _ask(port: int, numbers: Iterator[int], last: int) -> None:
    """One connection: a request after the other until the numbers are used up; each answer is checked."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for number in numbers:
        text = f"{number} " * (1 + number % 50)
        body = {"query": [text], "prompts": [""], "labels": [""]} if number % 10 else {"wrong": text}
        content = json.dumps(body).encode()
        head = f"POST /get_reward HTTP/1.1\r\nhost: a\r\ncontent-length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        headers = await reader.readuntil(b"\r\n\r\n")
        length = headers.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        answer = json.loads(await reader.readexactly(int(length)))
        if number % 10 and answer["rewards"] != [float(len(text))]:
            raise ConchError(f"request {number} was answered by {answer}")
        if number >= last:
            break
    writer.close()


async def _ask_all(port: int, callers: int, first: int, last: int) -> None:
    numbers = iter(range(first, last + 1))
    await asyncio.gather(*(_ask(port, numbers, last) for _ in range(callers)))


def measure(requests: int, warm_up: int, callers: int, looks: int) -> list[Look]:
    """What the server held after the warm-up, and after each part of the requests."""
    with (
        tempfile.TemporaryDirectory(prefix="conch-soak-") as folder,
        _server(Path(folder)) as (port, process),
    ):
        asyncio.run(_ask_all(port, callers, 1, warm_up))
        found = [Look.at(process, 0)]
        bounds = [requests * part // looks for part in range(looks + 1)]
        for before, after in itertools.pairwise(bounds):
            asyncio.run(_ask_all(port, callers, warm_up + before + 1, warm_up + after))
            found.append(Look.at(process, after))
            print(_line(found[-1], found[-2]), file=sys.stderr)
        return found


def _line(look: Look, before: Look) -> str:
    each_us = (look.cpu_s - before.cpu_s) / max(1, look.requests - before.requests) * 1e6
    return f"| {look.requests} | {look.uss / 2**20:.2f} | {look.files} | {each_us:.0f} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 where the memory did not grow, with a table on stdout."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.front_soak", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--requests", type=int, default=200_000, help="default: %(default)s")
    parser.add_argument("--warm-up", type=int, default=20_000, help="default: %(default)s")
    parser.add_argument("--callers", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--looks", type=int, default=10, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    try:
        found = measure(arguments.requests, arguments.warm_up, arguments.callers, arguments.looks)
    except (ConchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    lines = [_line(look, before) for before, look in itertools.pairwise(found)]
    head = ["| requests | USS, MiB | files | processor time of a request, us |", "|---|---|---|---|"]
    print("\n".join([*head, *lines]))
    since = found[len(found) // 2]
    whole, growth = (found[-1].uss / each.uss - 1 for each in (found[0], since))
    print(
        f"\nmemory grew by {whole:.2%} since the warm-up, by {growth:.2%} since request {since.requests}; "
        f"of that at most {_MOST_GROWTH:.0%} is let pass"
    )
    return int(growth > _MOST_GROWTH)


if __name__ == "__main__":
    sys.exit(main())
