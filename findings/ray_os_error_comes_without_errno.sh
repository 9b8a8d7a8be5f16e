#!/usr/bin/env bash
# An OSError of a Ray task is caught as one, but its errno, filename and strerror are None.
#
# Seen with ray 2.60.0 (Linux, Python 3.11).
# Guess: `except OSError as error` catches what a task raised, since Ray makes an error of both classes, and what the
#   error says of itself is there, as it is for classes of one's own: they keep a `status` set in `__init__`.
# Seen: Ray copies what lies in the instance's `__dict__`. The attributes of the built-in errors lie elsewhere, in fields
#   of the C structure, and are those of an error made without arguments: `errno` None, so that a handler for
#   "no space left" never matches, and `UnicodeDecodeError.start` even 0, a number that looks right. The message and
#   `error.cause` have the true ones.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ray==2.60.0
export HOME="$folder" RAY_TMPDIR="$folder"
cat >"$folder/errors.py" <<'PY'
import errno
import os

import ray

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)


class Refused(Exception):
    def __init__(self, message, status=0):
        super().__init__(message)
        self.status = status


@ray.remote
def task(fault):
    if fault is OSError:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/checkpoint")
    if fault is UnicodeDecodeError:
        b"caf\xe9 au lait".decode()
    if fault is ModuleNotFoundError:
        import no_such_module  # noqa: F401
    raise Refused("busy", 503)


EXPECTED = {
    OSError: {"errno": (None, 28), "filename": (None, "/data/checkpoint"), "strerror": (None, "No space left on device")},
    UnicodeDecodeError: {"start": (0, 3), "reason": (None, "invalid continuation byte")},
    ModuleNotFoundError: {"name": (None, "no_such_module")},
    Refused: {"status": (503, 503)},
}
seen = {}
for fault, names in EXPECTED.items():
    try:
        ray.get(task.remote(fault))
    except fault as error:
        seen[fault] = {name: (getattr(error, name), getattr(error.cause, name)) for name in names}
        print(f"{type(error).__name__} (of the error, of its cause): {seen[fault]}")
ray.shutdown()
assert seen == EXPECTED
print("as stated")
PY
"$folder/venv/bin/python" "$folder/errors.py"
