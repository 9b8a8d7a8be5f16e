#!/usr/bin/env bash
# A float64 model with eager attention puts out NaN for every row that has padding on the left; sdpa does not.
#
# Seen with transformers 5.23.0 and torch 2.13.0.
# Guess: more precision is never worse: `model.double()` gives the numbers of the float32 model, to 1e-6.
# Seen: masks hold the least number of the model's dtype, and eager attention takes its softmax in float32, whatever
#   the dtype. The least float64 becomes -inf there, and a position that sees nothing but padding becomes 0/0, where
#   in float32 it is a harmless average. As a value of the next layer it then reaches the real tokens of its row, for
#   0 * NaN is NaN. sdpa has no such position. Families that take the softmax in the
#   query's own dtype (GPT-2) are not hit.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PY'
import torch
from transformers import AutoConfig, AutoModelForCausalLM

size = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32}
shapes = {
    "gpt2": {"n_layer": 2, "n_head": 2, "n_embd": 32},
    "gpt_neox": {**size, "intermediate_size": 48},
    "llama": {**size, "intermediate_size": 48},
    "qwen2": {**size, "intermediate_size": 48, "num_key_value_heads": 1},
    "opt": {**size, "ffn_dim": 48, "word_embed_proj_dim": 32},
}
ids = torch.tensor([[1, 2, 3, 4, 5], [9, 9, 1, 2, 3]])
mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
bad = {}
for family, shape in shapes.items():
    for attention in ("sdpa", "eager"):
        for dtype in (torch.float32, torch.float64):
            torch.manual_seed(0)
            config = AutoConfig.for_model(family, vocab_size=16, **shape)
            lm = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype).eval()
            with torch.no_grad():
                logits = lm(input_ids=ids, attention_mask=mask).logits
            bad[family, attention, str(dtype)] = int(logits.isnan().any(-1).sum())
for key, count in bad.items():
    if count:
        print(*key, "NaN at", count, "positions")
hit = {family for (family, attention, dtype), count in bad.items() if count}
assert hit == {"gpt_neox", "llama", "qwen2", "opt"}, bad
assert all(key[1:] == ("eager", "torch.float64") for key, count in bad.items() if count), bad
print("as stated")
PY
