#!/usr/bin/env bash
# The same weights, in a file of safetensors with a note of another length in its head, give other logits.
#
# Seen with torch 2.13.0 (CPU, x86-64 with AVX2), transformers 5.23.0, safetensors 0.8.0.
# Guess: `from_pretrained` makes tensors of its own, so what stands in the head of the file cannot matter; and a
#   matrix product of equal numbers in one kernel, one thread and one shape gives equal bits.
# Seen: on a CPU the parameters are the mapped file: they begin where the head ends, at 40, 48, 56, 0 or 8 bytes behind
#   a multiple of 64. MKL's product of one row with a matrix, which is each step of sampling one completion, rounds
#   otherwise where a matrix does not begin at a multiple of 16: six of ten lengths of the note changed the last bits.
#   With MKL_CBWR=COMPATIBLE, or once each parameter is cloned, all ten agree.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 safetensors==0.8.0 numpy==1.26.4
cat > "$folder/heads.py" <<'PY'
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()
torch.set_num_threads(1)
torch.manual_seed(0)
folder = sys.argv[1]
shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=331, **shape, **heads)).eval()
model.save_pretrained(folder)
weights = load_file(f"{folder}/model.safetensors")
one_token = torch.tensor([[5]])
same, places, cloned = [], [], []
with torch.no_grad():
    expected = model(one_token).logits
    for length in range(0, 40, 4):
        metadata = {"format": "pt", "note": "x" * length}
        save_file(weights, f"{folder}/model.safetensors", metadata=metadata)
        loaded = LlamaForCausalLM.from_pretrained(folder).eval()
        assert all(torch.equal(*pair) for pair in zip(model.parameters(), loaded.parameters(), strict=True))
        places.append({parameter.data_ptr() % 64 for parameter in loaded.parameters()})
        same.append(torch.equal(loaded(one_token).logits, expected))
        for parameter in loaded.parameters():
            parameter.data = parameter.data.clone()
        cloned.append(torch.equal(loaded(one_token).logits, expected))
print("begin at, modulo 64:", *places)
print("same logits:", *same)
assert all(cloned)
sys.exit(0 if all(same) else 7)
PY
export HF_HUB_OFFLINE=1
code=0
"$folder/venv/bin/python" "$folder/heads.py" "$folder/model" || code=$?
test "$code" -eq 7
MKL_CBWR=COMPATIBLE "$folder/venv/bin/python" "$folder/heads.py" "$folder/model"
echo "as stated"
