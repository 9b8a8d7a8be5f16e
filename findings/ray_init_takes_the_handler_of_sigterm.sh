#!/usr/bin/env bash
# `ray.init` replaces the driver's handler of SIGTERM: what was to be saved at the end of a job's time is not.
#
# Seen with ray 2.60.0 (Linux, Python 3.11).
# Guess: a handler that the program set before (a trainer's, which saves when a batch system ends its time) stays, or is
#   called by Ray's after its own work; a library leaves alone what it did not set.
# Seen: after `ray.init` the handler is Ray's; SIGTERM ends the program by SystemExit(15) in the main thread, the
#   program's handler is never called, and exit code 15 takes the place of its own. SIGINT's handler stays. Set after
#   `ray.init`, the same handler is called.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ray==2.60.0
export HOME="$folder" RAY_TMPDIR="$folder"
cat >"$folder/signals.py" <<'PY'
import os
import signal
import subprocess
import sys
import time


def work(order):
    import ray

    is_over = []

    def handler(number, frame):
        is_over.append(number)

    def set_handlers():
        signal.signal(signal.SIGTERM, handler)
        signal.signal(signal.SIGINT, handler)

    if order == "before":
        set_handlers()
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    if order == "after":
        set_handlers()
    kept = signal.getsignal(signal.SIGTERM) is handler, signal.getsignal(signal.SIGINT) is handler
    print(f"handler set {order} ray.init: SIGTERM's kept {kept[0]}, SIGINT's kept {kept[1]}", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    deadline = time.monotonic() + 20
    while not is_over and time.monotonic() < deadline:
        time.sleep(0.05)
    print("saved", flush=True)
    ray.shutdown()
    sys.exit(77)


if len(sys.argv) > 1:
    work(sys.argv[1])
seen = {}
for order in ("before", "after"):
    done = subprocess.run([sys.executable, __file__, order], stdout=subprocess.PIPE, text=True, timeout=100)
    print(done.stdout, end="")
    print(f"exit code {done.returncode}")
    seen[order] = done.returncode, "saved" in done.stdout, "SIGTERM's kept True" in done.stdout
    assert "SIGINT's kept True" in done.stdout
assert seen == {"before": (15, False, False), "after": (77, True, True)}, seen
print("as stated")
PY
"$folder/venv/bin/python" "$folder/signals.py"
