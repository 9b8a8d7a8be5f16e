#!/usr/bin/env bash
# A call that waits in the queue of a Ray actor and is cancelled raises TaskCancelledError, and is run all the same.
#
# Seen with ray 2.60.0 (Linux, Python 3.11).
# Guess: `ray.cancel` takes a call that has not begun off the queue: its caller gets TaskCancelledError at once, and the
#   actor never sees it. It is that way for plain tasks, for asyncio actors and for those with threads
#   (`max_concurrency=2`).
# Seen: in an ordinary actor, one call at a time, the cancelled call keeps its turn and is run to its end, with all that it
#   does to the actor. The caller gets TaskCancelledError nonetheless, and not at once but when the call before has
#   ended. Who cancels an update of weights and sends the next one has sent both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ray==2.60.0
export HOME="$folder" RAY_TMPDIR="$folder"
cat >"$folder/cancel.py" <<'PY'
import asyncio
import os
import sys
import time

import ray

ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)


class Actor:
    def __init__(self):
        self.seen = []

    def work(self, name, seconds):
        time.sleep(seconds)
        self.seen.append(name)

    def all_seen(self):
        return sorted(self.seen)


class AsyncioActor(Actor):
    async def work(self, name, seconds):
        await asyncio.sleep(seconds)
        self.seen.append(name)

    async def all_seen(self):
        return sorted(self.seen)


@ray.remote
def task(note, name, seconds):
    time.sleep(seconds)
    with open(note, "a") as file:
        file.write(name)


def name_of(ref):
    try:
        ray.get(ref, timeout=30)
    except Exception as error:
        return type(error).__name__
    return "no error"


def cancelled_in(kind, threads=1):
    """What the caller of a cancelled call gets, and which calls the actor has run."""
    actor = ray.remote(kind).options(num_cpus=0, max_concurrency=threads).remote()
    ray.get(actor.all_seen.remote())
    under_way = [actor.work.remote(f"under way {number}", 2) for number in range(threads)]
    time.sleep(0.5)
    waiting = actor.work.remote("cancelled", 0)
    time.sleep(0.3)
    ray.cancel(waiting)
    error = name_of(waiting)
    ray.get(under_way)
    return error, "cancelled" in ray.get(actor.all_seen.remote())


def cancelled_task(note):
    under_way = task.remote(note, "under way", 3)
    time.sleep(1)
    waiting = task.remote(note, "cancelled", 0)
    time.sleep(0.3)
    ray.cancel(waiting)
    error = name_of(waiting)
    ray.get(under_way)
    time.sleep(1)
    with open(note) as file:
        return error, "cancelled" in file.read()


seen = {
    "task": cancelled_task(os.path.join(sys.argv[1], "note")),
    "asyncio actor": cancelled_in(AsyncioActor),
    "actor with two threads": cancelled_in(Actor, threads=2),
    "actor": cancelled_in(Actor),
}
for name, (error, is_run) in seen.items():
    print(f"cancelled in the queue, {name}: {error}, {'run' if is_run else 'not run'}")
ray.shutdown()
assert seen == {name: ("TaskCancelledError", name == "actor") for name in seen}
print("as stated")
PY
"$folder/venv/bin/python" "$folder/cancel.py" "$folder"
