#!/usr/bin/env bash
# `os.fork` ends the threads of numpy's OpenBLAS in the process that forks.
#
# Seen with numpy 1.26.4 and numpy 2.4.2 (wheels for x86-64 Linux, OpenBLAS), two processors or more.
# Guess: a fork copies the thread that calls into the child and leaves the parent as it is; with the threads that numpy's
#   import started it is never safe to call, and a count of threads says the same before and after it.
# Seen: OpenBLAS has a handler that runs before each fork and ends its workers, so the parent has one thread afterwards,
#   the child begins without locks that nobody holds, and the next product of the parent starts the workers again. A
#   program that counts its threads to see whether it may fork finds "no" before the fork and "yes" right after it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
for version in 1.26.4 2.4.2; do
    "$folder/venv/bin/pip" install --quiet "numpy==$version"
    "$folder/venv/bin/python" - <<'PY'
import os

import numpy


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


counts = [threads()]
child = os.fork()
if child == 0:
    os._exit(0 if threads() == 1 else 1)
counts.append(threads())
assert os.waitpid(child, 0)[1] == 0
matrix = numpy.ones((500, 500))
matrix @ matrix
counts.append(threads())
print(f"numpy {numpy.__version__}: threads after the import {counts[0]}, after a fork {counts[1]}, after a product {counts[2]}")
assert counts[0] > 1 and counts[1] == 1 and counts[2] == counts[0], counts
PY
done
echo "as stated"
