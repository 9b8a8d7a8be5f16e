#!/usr/bin/env bash
# The same seed gives other random weights on another processor, in float32 but not in float64.
#
# Seen with torch 2.13.0 (CPU, x86-64 with AVX2).
# Guess: `torch.manual_seed(0); torch.randn(n)` is a function of seed, version and device type: Philox or Mersenne
#   Twister are integers, so every x86-64 processor gives the same numbers, at most the last kernels round.
# Seen: float32 normals differ between the instruction sets that ATen chooses (AVX2 and up have a
#   vectorised Box-Muller of their own): 385,000 of a million, by up to 2.3e-6. In float64 there is only the plain
#   kernel, and all are equal; so are uniform numbers of both dtypes. Three updates of a tiny GPT-2 with Adam made 4e-6
#   of its gradient norm of it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==1.26.4
draw() {
    ATEN_CPU_CAPABILITY=$1 "$folder/venv/bin/python" - "$folder/$1.pt" <<'PY'
import sys

import torch

torch.set_num_threads(1)
made = {"capability": torch.backends.cpu.get_cpu_capability()}
for name, draw in (("normal", torch.randn), ("uniform", torch.rand)):
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        made[f"{name} {dtype}"] = draw(1_000_000, dtype=dtype)
torch.save(made, sys.argv[1])
PY
}
draw default
draw avx2
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys

import torch

plain, vector = (torch.load(f"{sys.argv[1]}/{name}.pt") for name in ("default", "avx2"))
print("instruction sets:", plain.pop("capability"), vector.pop("capability"))
share = {name: float((plain[name] != vector[name]).double().mean()) for name in plain}
for name, value in share.items():
    print(f"{name:<24}{value:.3f} of the numbers differ, by at most {(plain[name] - vector[name]).abs().max():.1e}")
assert share.pop("normal torch.float32") > 0.01
assert not any(share.values()), share
print("as stated")
PY
