"""One side of `benchmarks/grpo_step.py` without a model: says that each step took as long as it was told.

python grpo_side.py TOKENS SECONDS...
"""

from __future__ import annotations

import json
import sys

tokens, *seconds = sys.argv[1:]
for step in seconds:
    if not sys.stdin.readline():
        break
    print("{'loss': 0.0}")  # what other libraries say in between
    print("STEP " + json.dumps({"seconds": float(step), "tokens": int(tokens)}), flush=True)
else:
    print("END " + json.dumps({"peak_bytes": 5, "versions": {"trl": "1"}}), flush=True)
