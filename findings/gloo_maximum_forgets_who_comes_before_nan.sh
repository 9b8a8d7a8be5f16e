#!/usr/bin/env bash
# The maximum that gloo reduces over processes, where one of them has NaN, may be smaller than a number that another has.
#
# Seen with torch 2.13.0 (gloo, three CPU processes).
# Guess: as in torch.maximum a NaN of any process is NaN on all; or, as in C's fmax, NaN is passed over and the greatest
#   number of the others stays. One of both, wherever the NaN is, in every element.
# Seen: three processes hold 6 elements each of 0, 1 and 2. With NaN on rank 0 two elements are NaN and four are 2. With NaN
#   on rank 1 two are NaN, two are 2, and two are 0: the 2 of rank 2 is lost, too. With NaN on rank 2 two are NaN and four
#   are 1. A single element is NaN, 0 or 1, by the rank that has the NaN. All processes agree on it. Maximum and minimum
#   compare in the order of a ring, which begins at another rank for each part of the tensor, and a comparison with NaN
#   keeps one side. A sum is NaN everywhere, as it should be.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==1.26.4
cat >"$folder/run.py" <<'PY'
import json
import sys
from pathlib import Path

import torch
from torch import distributed

distributed.init_process_group("gloo")
rank, seen = distributed.get_rank(), {}
for operation in ("MAX", "SUM"):
    for size in (1, 6):
        for faulty in range(3):
            values = torch.full((size,), float("nan") if rank == faulty else float(rank))
            distributed.all_reduce(values, op=getattr(distributed.ReduceOp, operation))
            seen[f"{operation} of {size}, NaN on rank {faulty}"] = " ".join(f"{value:g}" for value in values.tolist())
Path(sys.argv[1], f"seen-{rank}").write_text(json.dumps(seen))
distributed.destroy_process_group()
PY
"$folder/venv/bin/python" -m torch.distributed.run --nproc_per_node 3 --rdzv_backend c10d \
    --rdzv_endpoint 127.0.0.1:0 "$folder/run.py" "$folder" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
"$folder/venv/bin/python" - "$folder" <<'PY'
import json
import sys
from pathlib import Path

first, *others = (json.loads(Path(sys.argv[1], f"seen-{rank}").read_text()) for rank in range(3))
assert all(other == first for other in others), "processes differ"
for what, values in first.items():
    print(f"{what}: {values}")
assert [first[f"MAX of 1, NaN on rank {rank}"] for rank in range(3)] == ["nan", "0", "1"]
assert [sorted(first[f"MAX of 6, NaN on rank {rank}"].split()) for rank in range(3)] == [
    ["2", "2", "2", "2", "nan", "nan"],
    ["0", "0", "2", "2", "nan", "nan"],
    ["1", "1", "1", "1", "nan", "nan"],
]
assert all(set(values.split()) == {"nan"} for what, values in first.items() if what.startswith("SUM"))
print("as stated")
PY
