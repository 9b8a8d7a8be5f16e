#!/usr/bin/env bash
# A frozen deep copy of a language model is not the model, bit for bit.
#
# Seen with torch 2.13.0 and transformers 5.23.0 (Python 3.11, x86-64).
# Guess: under `torch.no_grad()` a model and `copy.deepcopy(model).requires_grad_(False)` run the same kernels on
#   the same input, so their logits are equal bit for bit, and the KL of a reference is exactly 0 at the start.
# Seen: with `logits_to_keep` the rows that reach the head are a strided slice. `at::matmul` folds them into one
#   `mm` if the *weight* requires a gradient (even under no_grad), and takes a `bmm` if it does not. Which operation
#   runs is the same on every processor; whether the results differ in the last bit depends on its kernels (an AMD
#   EPYC with AVX-512: float64 logits off by 2.2e-16).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PY'
import copy

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM


class Products(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=24, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2
)
model = LlamaForCausalLM(config).double().eval()
frozen = copy.deepcopy(model).requires_grad_(False)
ids = torch.randint(0, 24, (2, 10))
last = {}
with torch.no_grad():
    for name, lm in (("model", model), ("frozen copy", frozen)):
        with Products() as products:
            logits = lm(input_ids=ids, logits_to_keep=5).logits
        last[name] = products.names[-1]
        print(f"{name}: the head multiplies by {products.names[-1]}")
    whole = [lm(input_ids=ids).logits for lm in (model, frozen)]
    kept = [lm(input_ids=ids, logits_to_keep=5).logits for lm in (model, frozen)]
print("all logits equal:", torch.equal(*whole), "| kept logits equal here:", torch.equal(*kept))
assert last == {"model": "mm", "frozen copy": "bmm"}, last
assert torch.equal(*whole)
print("as stated")
PY
