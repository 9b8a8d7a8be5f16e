#!/usr/bin/env bash
# A pebble pool with four workers that rest ends for good if one of them is killed; while they work it does not.
#
# Seen with pebble 5.2.3 (Linux, Python 3.11).
# Guess: a worker that ends in its task costs that task (`ProcessExpired`) and is replaced; one that ends between tasks,
#   by the kernel when memory is short, costs nothing at all and is replaced as well.
# Seen: the first half holds. But where no worker has a task, the pool takes the end of any one of them for "All
#   workers expired", though three live: it turns to an error state, nothing is raised then, and each later `schedule`
#   raises RuntimeError("Unexpected error within the Pool"). A new pool has to be made. While another worker has a task,
#   the end of an idle one is repaired as guessed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pebble==5.2.3
cat >"$folder/pool.py" <<'PY'
import multiprocessing
import os
import signal
import sys
import time

import pebble

WORKERS = 4


def pid_after(seconds, note=os.devnull):
    with open(note, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(seconds)
    return os.getpid()


def end():
    os.kill(os.getpid(), signal.SIGKILL)


def workers():
    return {process.pid for process in multiprocessing.active_children()}


def new_pool():
    pool = pebble.ProcessPool(max_workers=WORKERS, context=multiprocessing.get_context("spawn"))
    for future in [pool.schedule(pid_after, args=(0.2,)) for _ in range(2 * WORKERS)]:
        future.result(timeout=60)
    assert len(workers()) == WORKERS
    return pool


def outcome(pool, function, *args):
    try:
        return type(pool.schedule(function, args=args, timeout=60).result()).__name__
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def kill_idle_one(but=None):
    ended = next(iter(workers() - {but}))
    os.kill(ended, signal.SIGKILL)
    time.sleep(3)
    return ended


if __name__ == "__main__":
    with new_pool() as pool:
        seen = [outcome(pool, end), outcome(pool, pid_after, 0)]
        print("one ends in its task:", seen)
        assert seen == ["ProcessExpired: Abnormal termination", "int"]
    with new_pool() as pool:
        note = f"{sys.argv[1]}/at_work"
        future = pool.schedule(pid_after, args=(8, note))
        time.sleep(2)
        with open(note) as file:
            kill_idle_one(but=int(file.read()))
        seen = [len(workers()), outcome(pool, pid_after, 0), type(future.result()).__name__]
        print("an idle one ends while another works: workers, next task, the other's:", seen)
        assert seen == [WORKERS, "int", "int"]
    pool = new_pool()
    ended = kill_idle_one()
    alive, active = len(workers() - {ended}), pool.active
    seen = [outcome(pool, pid_after, 0) for _ in range(2)]
    print(f"an idle one ends while all rest: {alive} workers, active {active}, next tasks: {seen}")
    assert alive >= WORKERS - 1 and not active
    assert seen == ["RuntimeError: Unexpected error within the Pool"] * 2
    pool.stop()
    pool.join()
    print("as stated")
PY
"$folder/venv/bin/python" "$folder/pool.py" "$folder"
