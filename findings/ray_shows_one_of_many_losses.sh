#!/usr/bin/env bash
# Of nine lines with nine different losses that three actors of Ray print, the driver shows two.
#
# Seen with ray 2.60.0 (Linux, Python 3.11).
# Guess: the driver prints what workers print; a line that several print alike, such as a warning, is shown once with
#   "repeated Nx".
# Seen: lines are alike for Ray if they agree but for their digits, whoever prints them: "step 0 loss 0.1" of one actor
#   and "step 2 loss 2.3" of another. The first is shown at once, then nothing for five seconds, then the latest with
#   "[repeated 8x across cluster]", which counts itself; the other seven are nowhere in the output, also those of the
#   actor whose line was shown. Lines that differ by a letter are all shown, and with RAY_DEDUP_LOGS=0 all nine are.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ray==2.60.0
export HOME="$folder" RAY_TMPDIR="$folder"
cat >"$folder/logs.py" <<'PY'
import os
import re
import subprocess
import sys
import time


def work():
    import ray

    ray.init(num_cpus=3, include_dashboard=False)

    @ray.remote
    class Actor:
        def tell(self, text):
            print(text, flush=True)

    actors = [Actor.remote() for _ in range(3)]
    for step in range(3):
        texts = [f"step {step} loss {rank}.{step + 1}" for rank in range(3)]
        ray.get([actor.tell.remote(text) for actor, text in zip(actors, texts)])
        time.sleep(0.2)
    time.sleep(8)
    ray.get([actor.tell.remote(f"sampler {name} is ready") for actor, name in zip(actors, "abc")])
    time.sleep(8)
    ray.shutdown()


if len(sys.argv) > 1:
    work()
    sys.exit()
seen = {}
for dedup in ("1", "0"):
    environment = {**os.environ, "RAY_DEDUP_LOGS": dedup}
    command = [sys.executable, __file__, "work"]
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=100
    )
    losses = re.findall(r"step \d loss [\d.]+", done.stdout)
    names = re.findall(r"sampler . is ready", done.stdout)
    repeated = re.findall(r"repeated (\d+)x", done.stdout)
    print(f"RAY_DEDUP_LOGS={dedup}: {losses}, repeated {repeated}; {sorted(names)}")
    seen[dedup] = len(set(losses)), repeated, len(set(names))
assert seen == {"1": (2, ["8"], 3), "0": (9, [], 3)}, seen
print("as stated")
PY
"$folder/venv/bin/python" "$folder/logs.py"
