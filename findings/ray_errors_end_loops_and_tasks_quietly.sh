#!/usr/bin/env bash
# A StopIteration of a Ray task ends the driver's loop without an error, a CancelledError its asyncio task.
#
# Seen with ray 2.60.0 (Linux, Python 3.11).
# Guess: whatever a task raises comes out of `ray.get` as a RayTaskError, which nothing but `except` takes notice of; of
#   three results whose second failed one gets that error.
# Seen: the error is of a class made for the occasion that derives from RayTaskError and from the task's own exception,
#   and so means to Python what that one means. `next` on an exhausted iterator in a worker makes `list(map(ray.get,
#   refs))` end as if it were complete: ['a'] of three, the third result lost as well, and no error. A coroutine that
#   awaits a result whose task raised CancelledError (by an aborted request, say) counts as cancelled itself, though
#   nobody cancelled it, and an `asyncio.TaskGroup`, which overlooks cancelled children, ends well: ['a', 'c'].
#   A list comprehension over the same results raises. With another exception all three ways raise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ray==2.60.0
export HOME="$folder" RAY_TMPDIR="$folder"
cat >"$folder/errors.py" <<'PY'
import asyncio

import ray

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)


@ray.remote(max_retries=0)
def task(name, fault=None):
    if fault == "StopIteration":
        next(iter([]))
    if fault == "CancelledError":
        raise asyncio.CancelledError
    if fault == "ValueError":
        raise ValueError
    return name


def refs(fault):
    return [task.remote("a"), task.remote("b", fault), task.remote("c")]


def in_map(fault):
    return list(map(ray.get, refs(fault)))


def in_comprehension(fault):
    return [ray.get(ref) for ref in refs(fault)]


def in_task_group(fault):
    results = []

    async def take(ref):
        results.append(await ref)

    async def take_all():
        async with asyncio.TaskGroup() as group:
            for ref in refs(fault):
                group.create_task(take(ref))

    asyncio.run(take_all())
    return sorted(results)


def outcome(way, fault):
    try:
        return way(fault)
    except BaseException as error:
        errors = error.exceptions if isinstance(error, BaseExceptionGroup) else [error]
        return type(errors[0]).__name__


EXPECTED = {
    (in_map, "ValueError"): "RayTaskError(ValueError)",
    (in_comprehension, "ValueError"): "RayTaskError(ValueError)",
    (in_task_group, "ValueError"): "RayTaskError(ValueError)",
    (in_map, "StopIteration"): ["a"],
    (in_comprehension, "StopIteration"): "RayTaskError(StopIteration)",
    (in_map, "CancelledError"): "RayTaskError(CancelledError)",
    (in_task_group, "CancelledError"): ["a", "c"],
}
seen = {(way, fault): outcome(way, fault) for way, fault in EXPECTED}
for (way, fault), result in seen.items():
    print(f"{fault}, {way.__name__}: {result}")
ray.shutdown()
assert seen == EXPECTED
print("as stated")
PY
"$folder/venv/bin/python" "$folder/errors.py"
