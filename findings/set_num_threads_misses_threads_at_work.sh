#!/usr/bin/env bash
# `torch.set_num_threads` reaches its own thread and those to come, not those that have computed before.
#
# Seen with torch 2.13.0 (CPU, x86-64, OpenMP of the wheel).
# Guess: the number is the process's, as its documentation reads; at worst it is one of each thread alone.
# Seen: neither. A thread that has computed keeps its number for ever and says so by `get_num_threads`; a thread that
#   begins later takes the new one. So a program that lowers the number once its sampler, server or data thread is at
#   work computes with two numbers at the same time.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==1.26.4
"$folder/venv/bin/python" - <<'PY'
from concurrent.futures import ThreadPoolExecutor

import torch

matrix = torch.ones(300, 300)


def number() -> int:
    matrix @ matrix
    return torch.get_num_threads()


torch.set_num_threads(2)
with ThreadPoolExecutor(1) as early, ThreadPoolExecutor(1) as late:
    seen = {"main": number(), "early": early.submit(number).result()}
    print("before:", seen)
    assert set(seen.values()) == {2}
    torch.set_num_threads(1)
    seen = {"main": number(), "early": early.submit(number).result(), "late": late.submit(number).result()}
    print("after set_num_threads(1):", seen)
    assert seen == {"main": 1, "early": 2, "late": 1}
print("as stated")
PY
