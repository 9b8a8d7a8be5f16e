#!/usr/bin/env bash
# `model.save_pretrained` loads DeepSpeed where it is installed, and DeepSpeed writes to the program's stdout.
#
# Seen with transformers 5.23.0, accelerate 1.15.0, deepspeed 0.19.8, torch 2.13.0 (CPU).
# Guess: a plain model that no launcher has touched is saved by transformers and safetensors alone; DeepSpeed is
#   loaded where a run asks for it.
# Seen: the first `save_pretrained` of a process unwraps the model by accelerate, which imports DeepSpeed, if it is
#   installed, only to ask whether the model is a `DeepSpeedEngine`: some 400 modules and, without a GPU, a line
#   "Setting accelerator to CPU" on *stdout*, among what the program itself prints there (JSON for the next one, say).
#   Loading and running the model did neither. With `sys.modules["deepspeed"] = None` while it is saved the files are
#   the same, byte for byte.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==1.26.4
DS_BUILD_OPS=0 "$folder/venv/bin/pip" install --quiet setuptools accelerate==1.15.0 transformers==5.23.0 deepspeed==0.19.8
cat >"$folder/run.py" <<'PY'
import pathlib
import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel

folder = pathlib.Path(sys.argv[1])
model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16, n_positions=8))
model(torch.tensor([[1, 2, 3]]))


def loaded():
    return sum(name.partition(".")[0] == "deepspeed" for name in sys.modules)


before = loaded()
sys.modules["deepspeed"] = None
model.save_pretrained(folder / "without")
del sys.modules["deepspeed"]
without = loaded()
model.save_pretrained(folder / "with")
names = sorted(path.name for path in (folder / "with").iterdir())
same = all((folder / "with" / name).read_bytes() == (folder / "without" / name).read_bytes() for name in names)
print(f"RESULT {before} {without} {loaded() > 100} {same}")
PY
"$folder/venv/bin/python" "$folder/run.py" "$folder" >"$folder/stdout" 2>/dev/null
cat "$folder/stdout"
grep -q "^RESULT 0 0 True True$" "$folder/stdout"
[ "$(grep -c "Setting accelerator to CPU" "$folder/stdout")" = 1 ]
echo "as stated"
