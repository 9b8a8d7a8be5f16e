"""What benchmarks of disturbed runs share: the processes of a run, and what must hold at its end."""

from __future__ import annotations

import json
import math
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LEFT_S = 20.0
"""Time for what a run has started to end by itself."""

_ROUNDING = 1e-4


@dataclass(frozen=True, slots=True)
class Process:
    """A process of a run. started: clock ticks, so that its number used again is another process."""

    pid: int
    started: int
    command: str

    @property
    def is_alive(self) -> bool:
        return any(process == self for process in running({self.pid}))


def running(pids: Iterable[int] | None = None) -> list[Process]:
    """Processes of this machine, or those of `pids` that live."""
    return [process for process, _ in _with_parents(pids)]


def _with_parents(pids: Iterable[int] | None = None) -> list[tuple[Process, int]]:
    numbers = [int(path.name) for path in Path("/proc").glob("[0-9]*")] if pids is None else pids
    found = []
    for pid in numbers:
        with suppress(OSError):  # it has ended
            state, parent, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if state != "Z":
                found.append((Process(pid, int(rest[17]), command.strip()), int(parent)))
    return found


class Watch:
    """Knows all processes that a run has started, also those whose parent is gone, in a thread of its own."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, int], Process] = {}
        self._roots: set[int] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="watch")
        self._thread.start()

    def add(self, pid: int) -> None:
        """A process whose descendants are the run's, and itself."""
        self._roots.add(pid)

    def living(self) -> list[Process]:
        """Those that live now."""
        now = {(process.pid, process.started): process for process in running({pid for pid, _ in self.seen})}
        return [now[key] for key in self.seen if key in now]

    def look(self) -> None:
        """Note what was started since."""
        everything = _with_parents()
        ours = {process.pid for process in self.living()} | self._roots
        while further := {process.pid for process, parent in everything if parent in ours} - ours:
            ours |= further
        for process, _ in everything:
            if process.pid in ours:
                self.seen[process.pid, process.started] = process

    def left(self, kind_of: Callable[[Process], str]) -> list[str]:
        """Those that do not end by themselves, in words."""
        deadline = time.monotonic() + LEFT_S
        while (left := self.living()) and time.monotonic() < deadline:
            time.sleep(0.5)
        return [f"{kind_of(each)} {each.command[:60]!r} is left" for each in left]

    def stop(self) -> None:
        """No more."""
        self._over.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._over.wait(0.3):
            self.look()


def distance(calm: Sequence[float | None], disturbed: Sequence[float | None]) -> float:
    """Difference of the mean rewards of runs, in standard errors (Welch); None had none."""
    mine, others = ([each for each in side if each is not None] for side in (disturbed, calm))
    if len(mine) < 2 or len(others) < 2:
        return math.inf
    error = math.sqrt(statistics.variance(mine) / len(mine) + statistics.variance(others) / len(others))
    difference = statistics.mean(mine) - statistics.mean(others)
    return difference / error if error else (0.0 if difference == 0 else math.inf)


# ---------------------------------------------------------------------------- the ledger of a remote run


def remote_ledger_faults(
    run: Path, steps: int, groups_per_step: int, told: Iterable[Mapping[str, Any]] = ()
) -> list[str]:
    """What is wrong in the ledger of a remote run that has made its last update, in words.

    Each update must have as many whole groups as it should, no group may have been promised to two, what
    each update says of its rewards must be of just its groups', and every answer that a client has noted
    must stand there as it was given. Of a run of at most 1024 groups: the ledger remembers no more.

    run: folder of the run.
    told: `samples` (ids), `rewards` and `version` of posts that clients were told are learned from.
    """
    train = run / "train"
    try:
        state = train / "checkpoints" / f"step_{steps}" / "state" / "rank_0.json"
        ledger = json.loads(state.read_text(encoding="utf-8"))
        metrics = (train / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        return [f"there is no ledger of step {steps} ({error})"]
    rows = [json.loads(line) for line in metrics]
    faults = []
    if [row["step"] for row in rows] != [*range(1, steps + 1)]:
        faults.append(f"metrics are of steps {[row['step'] for row in rows]}")
    if waiting := [group["number"] for group in ledger["groups"] if group["place"] is not None]:
        faults.append(f"groups {waiting} are whole and not learned from")
    learned: dict[int, list[float]] = {}
    rewards_of: dict[str, tuple[int, float | None]] = {}
    counts: Counter[int] = Counter()
    for number, reason, _, samples in ledger["ended"]:
        versions = {each[-1][1] for each in samples if each[-1] is not None and each[-1][0] == "whole"}
        if len(versions) != (not reason):
            became = f"dropped ({reason})" if reason else "learned from"
            faults.append(f"group {number} was promised to updates {sorted(versions)}, and {became}")
        if reason or len(versions) != 1:
            continue
        [version] = versions
        counts[version] += 1
        learned.setdefault(version, []).extend(each[-2] for each in samples if each[-2] is not None)
        rewards_of |= {f"{run.name}.{number}.{i}": (version, each[-2]) for i, each in enumerate(samples)}
    if counts != Counter(dict.fromkeys(range(1, steps + 1), groups_per_step)):
        faults.append(f"updates have learned from {dict(counts)} groups instead of {groups_per_step} each")
    if ledger["counts"]["groups_learned"] != groups_per_step * steps:
        faults.append(f"{ledger['counts']['groups_learned']} groups are counted as learned from")
    return faults + _metric_faults(rows, learned) + _broken_promises(told, rewards_of)


def _metric_faults(rows: Sequence[Mapping[str, Any]], learned: Mapping[int, Sequence[float]]) -> list[str]:
    """Updates that have learned from other rewards than their groups in the ledger have."""
    faults = []
    for row in rows:
        expected = statistics.mean(learned.get(row["step"], [math.nan]))
        if not abs(row["reward/mean"] - expected) <= _ROUNDING * max(1.0, abs(expected)):
            faults.append(
                f"update {row['step']} learned from a mean reward of {row['reward/mean']}, its groups have "
                f"{expected}"
            )
    return faults


def _broken_promises(
    told: Iterable[Mapping[str, Any]], kept: Mapping[str, tuple[int, float | None]]
) -> list[str]:
    return [
        f"a client was told that version {post['version']} has learned {reward} of sample {sample}, the "
        f"ledger has {kept.get(sample, 'no such sample')}"
        for post in told
        for sample, reward in zip(post["samples"], post["rewards"], strict=True)
        if kept.get(sample) != (post["version"], reward)
    ]
