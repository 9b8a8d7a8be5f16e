#!/usr/bin/env bash
# After ray.shutdown every program that the driver starts still loses its breakpoints, where Ray is not installed for it.
#
# Seen with ray 2.60.0 (Python 3.11): ray.init and ray.shutdown in a driver, then a program of another environment, without
#   Ray, that calls breakpoint() with a debugger's command on its stdin.
# Guess: ray.shutdown puts the environment back, or Ray's hook is set for its workers alone; the program stops in pdb.
# Seen: ray.init writes PYTHONBREAKPOINT=ray.util.rpdb._driver_set_trace into the driver's own environment, and
#   ray.shutdown leaves it there. The program says "RuntimeWarning: Ignoring unimportable $PYTHONBREAKPOINT" and runs on.
#   What compares environments to tell whether a process can be used again, as a pool of prepared interpreters does,
#   finds that none can, from the first ray.init on.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python="${PYTHON:-python3}"
"$python" -m venv "$folder/with_ray"
"$python" -m venv --without-pip "$folder/without"
"$folder/with_ray/bin/pip" install --quiet ray==2.60.0
cat > "$folder/program.py" <<'PY'
value = 1
breakpoint()
print("value", value)
PY
cat > "$folder/driver.py" <<'PY'
import os
import subprocess
import sys

import ray


def said() -> str:
    """What the program prints whose debugger is told to change a value and to go on."""
    command = [sys.argv[1], sys.argv[2]]
    done = subprocess.run(command, input="value = 2\ncontinue\n", capture_output=True, text=True, timeout=60)
    return " ".join((done.stdout + done.stderr).split())


os.environ.pop("PYTHONBREAKPOINT", None)
before = said()
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
ray.shutdown()
print("before:", before)
print("left behind:", os.environ.get("PYTHONBREAKPOINT"))
print("after:", said())
PY
HOME="$folder" RAY_AUTH_MODE=disabled "$folder/with_ray/bin/python" "$folder/driver.py" "$folder/without/bin/python" "$folder/program.py" \
    2> "$folder/errors" | tee "$folder/seen" || { cat "$folder/errors"; exit 1; }
grep -q "^before: .*value 2" "$folder/seen"
grep -q "^left behind: ray.util.rpdb._driver_set_trace$" "$folder/seen"
grep -q "^after: value 1 .*Ignoring unimportable" "$folder/seen"
echo "as described"
