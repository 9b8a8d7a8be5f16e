#!/bin/sh
# What a server image must be able to do, tried at the end of its build: a mistake shows here, not in the first request.
set -eu
tritonserver --help 2>&1 | grep -q -- --model-repository || {
    echo "error: this image has no working tritonserver" >&2
    exit 1
}
python3 - <<'PY'
import sys

import numpy
import safetensors
import tokenizers
import torch
import transformers

if int(numpy.__version__.split(".")[0]) >= 2:
    sys.exit(f"error: this image's models would run with numpy {numpy.__version__}, which they refuse")
print(
    f"models run in Python {sys.version.split()[0]}, numpy {numpy.__version__}, torch {torch.__version__}, "
    f"transformers {transformers.__version__}"
)
PY
