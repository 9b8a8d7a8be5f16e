#!/usr/bin/env bash
# `sys.exit(0)` inside an actor of Ray ends it for good whatever `max_restarts` says; in a task it is run four times.
#
# Seen with ray 2.60.0 (Linux, Python 3.11).
# Guess: SystemExit in a method is an exception like others and comes back to the caller; or else it ends the process, and
#   then an actor with restarts left starts again, as after any other end, and the code 0 or 1 does not matter.
# Seen: it ends the process, and the code decides. After `sys.exit(1)`, `os._exit(0)` and SIGKILL the actor starts again.
#   After `sys.exit(0)` it does not: Ray takes it for the wish of the actor to end, like `ray.actor.exit_actor()`, and
#   every later call raises ActorDiedError. A library whose shutdown calls `sys.exit(0)` so takes a sampler out of
#   service for the rest of the run. In a task the same call is a crash: Ray runs it `max_retries` times more and
#   then raises WorkerCrashedError.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ray==2.60.0
export HOME="$folder" RAY_TMPDIR="$folder"
cat >"$folder/exits.py" <<'PY'
import os
import signal
import sys
import time

import ray

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)


def leave(way):
    if way == "sys.exit(0)":
        sys.exit(0)
    if way == "sys.exit(1)":
        sys.exit(1)
    if way == "os._exit(0)":
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


@ray.remote(max_restarts=-1, max_task_retries=0)
class Actor:
    def pid(self):
        return os.getpid()

    def leave(self, way):
        leave(way)


@ray.remote(max_retries=3)
def task(way, note):
    with open(note, "a") as file:
        file.write("begun\n")
    leave(way)


def name_of(ref):
    try:
        ray.get(ref, timeout=60)
    except Exception as error:
        return type(error).__name__
    return "no error"


def after(way):
    """What the caller gets, and whether the actor is there again some seconds later."""
    actor = Actor.remote()
    first = ray.get(actor.pid.remote())
    error = name_of(actor.leave.remote(way))
    for _ in range(24):
        try:
            return error, ray.get(actor.pid.remote(), timeout=15) != first
        except ray.exceptions.RayActorError:
            time.sleep(0.25)
    return error, False


EXPECTED = {
    "sys.exit(1)": ("ActorUnavailableError", True),
    "os._exit(0)": ("ActorUnavailableError", True),
    "SIGKILL": ("ActorUnavailableError", True),
    "sys.exit(0)": ("ActorDiedError", False),
}
seen = {way: after(way) for way in EXPECTED}
for way, (error, is_there) in seen.items():
    print(f"{way} in an actor: {error}, {'started again' if is_there else 'never again'}")
note = os.path.join(sys.argv[1], "begun")
error = name_of(task.remote("sys.exit(0)", note))
with open(note) as file:
    times = len(file.readlines())
print(f"sys.exit(0) in a task: {error} after {times} tries")
ray.shutdown()
assert seen == EXPECTED
assert (error, times) == ("WorkerCrashedError", 4)
print("as stated")
PY
"$folder/venv/bin/python" "$folder/exits.py" "$folder"
