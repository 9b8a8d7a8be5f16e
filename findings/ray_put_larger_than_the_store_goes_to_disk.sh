#!/usr/bin/env bash
# ray.put of an array five times as large as the whole object store succeeds, through the disk, and says nothing.
#
# Seen with ray 2.60.0 (Python 3.11), numpy 1.26.4, a cluster with object_store_memory of 80 MiB and a driver that holds
#   no other object.
# Guess: an object that can never fit raises ObjectStoreFullError, which Ray's documentation has for it; spilling is for
#   objects that were in the store and make room for others.
# Seen: the call returns a reference, and the array is read back whole, from a file that Ray made in its own folder: no
#   exception, no warning in the driver. A put of 40 MiB beside it makes no file. Who hands model weights over that way
#   has a transfer at the disk's pace and learns of it from nothing but the clock.
set -euo pipefail
folder=$(mktemp -d /tmp/fXXXX)  # a socket's path has 107 bytes at most
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ray==2.60.0 numpy==1.26.4
cat > "$folder/run.py" <<'PY'
import pathlib
import sys
import warnings

import numpy as np
import ray

MIB = 2**20
folder = pathlib.Path(sys.argv[1])
ray.init(
    num_cpus=1,
    include_dashboard=False,
    log_to_driver=False,
    object_store_memory=80 * MIB,
    _temp_dir=str(folder / "ray"),
)


def mapped() -> int:
    """Bytes of files below Ray's folder that this process has mapped, deleted ones too."""
    total = 0
    for line in pathlib.Path("/proc/self/maps").read_text().splitlines():
        if str(folder / "ray") in line:
            start, _, end = line.split()[0].partition("-")
            total += int(end, 16) - int(start, 16)
    return total


with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    small = ray.put(np.ones(40 * MIB, dtype=np.uint8))
    after_small = mapped()
    large = ray.put(np.full(400 * MIB, 7, dtype=np.uint8))
    after_large = mapped()
    whole = bool((ray.get(large) == 7).all()) and ray.get(large).nbytes == 400 * MIB
print("RESULT", "whole", whole, "warnings", len(warned), "on disk", after_small // MIB < 40, after_large // MIB >= 400)
ray.shutdown()
PY
HOME="$folder" RAY_AUTH_MODE=disabled "$folder/venv/bin/python" "$folder/run.py" "$folder" 2>"$folder/errors" | tee "$folder/seen" \
    || { cat "$folder/errors"; exit 1; }
grep -q "^RESULT whole True warnings 0 on disk True True$" "$folder/seen"
echo "as described"
