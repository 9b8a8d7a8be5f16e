#!/usr/bin/env bash
# A module that is cast after DistributedDataParallel wrapped it trains on, but each process alone.
#
# Seen with torch 2.13.0 (gloo, two CPU processes).
# Guess: parameters keep their identity in `module.double()` (only `.data` is replaced), so DDP's hooks stay; or, if
#   its buckets are of another dtype, the first backward pass raises.
# Seen: no error and no warning. The gradients are float64 and are no longer averaged: with inputs 1 and 2 the
#   processes hold 3.0 and 6.0, where the uncast module has 4.5 on both; so in every later step. The same holds for
#   any cast of dtype. Cast before wrapping.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==1.26.4
cat >"$folder/run.py" <<'PY'
import sys
from pathlib import Path

import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
for cast in (False, True):
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 2)
    wrapped = DistributedDataParallel(module)
    if cast:
        module.double()
    inputs = torch.full((3, 4), rank + 1.0, dtype=module.weight.dtype)
    for step in range(2):
        wrapped.zero_grad()
        wrapped(inputs).sum().backward()
        Path(sys.argv[1], f"{cast}-{step}-{rank}").write_text(str(module.weight.grad[0, 0].item()))
torch.distributed.destroy_process_group()
PY
"$folder/venv/bin/python" -m torch.distributed.run --nproc_per_node 2 --rdzv_backend c10d \
    --rdzv_endpoint 127.0.0.1:0 "$folder/run.py" "$folder" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys
from pathlib import Path

seen = {
    cast: [[float(Path(sys.argv[1], f"{cast}-{step}-{rank}").read_text()) for rank in (0, 1)] for step in (0, 1)]
    for cast in (False, True)
}
print("gradient of ranks 0 and 1, step by step: as wrapped", seen[False], "| cast afterwards", seen[True])
assert seen == {False: [[4.5, 4.5]] * 2, True: [[3.0, 6.0]] * 2}, seen
print("as stated")
PY
