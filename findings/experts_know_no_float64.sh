#!/usr/bin/env bash
# A mixture of experts raises in float64 at its first forward pass, unless told to multiply its experts another way.
#
# Seen with transformers 5.23.0 and torch 2.13.0 (CPU).
# Guess: `model.double()` works for any architecture, only slower, as it does for dense models of the same kin: a
#   float64 copy is the usual reference for what float32 and bfloat16 round. Where a fast kernel lacks a dtype,
#   transformers takes its own fallback, which it has.
# Seen: experts are multiplied by torch's `grouped_mm` by default, which takes float32, bfloat16 and float16 alone:
#   "Expected mat_a to be Float32, BFloat16 or Float16 matrix, got Double". transformers' fallback is chosen by device,
#   version and alignment, not by dtype. `experts_implementation="eager"` (or "batched_mm") runs, and gives what
#   float32 gives, to 1e-7.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PY'
import torch
from transformers import AutoConfig, AutoModelForCausalLM

size = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 32}
shape = {**size, "intermediate_size": 48, "num_experts_per_tok": 2}
experts = {"num_experts": 4, "moe_intermediate_size": 32}
shapes = {
    "qwen2": {**size, "intermediate_size": 48},
    "mixtral": {**shape, "num_local_experts": 4},
    "phimoe": {**shape, "num_local_experts": 4},
    "qwen2_moe": {**shape, **experts, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**shape, **experts, "head_dim": 16},
    "olmoe": {**shape, "num_experts": 4},
}
WORDS = "Expected mat_a to be Float32, BFloat16 or Float16 matrix, got Double"
ids = torch.arange(16).view(2, 8)


def logits_of(family, dtype, **settings):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=32, pad_token_id=None, eos_token_id=None, **shapes[family])
    lm = AutoModelForCausalLM.from_config(config, **settings).to(dtype).eval()
    with torch.no_grad():
        return lm(input_ids=ids).logits


for family in shapes:
    single = logits_of(family, torch.float32)
    try:
        double = logits_of(family, torch.float64)
    except RuntimeError as error:
        assert family != "qwen2" and WORDS in str(error), (family, error)
        gaps = {}
        for implementation in ("eager", "batched_mm"):
            double = logits_of(family, torch.float64, experts_implementation=implementation)
            gaps[implementation] = float((double - single).abs().max())
        print(f"{family}: {type(error).__name__}: {error};", end=" ")
        print(*(f"{name} off by {gap:.1e}" for name, gap in gaps.items()))
        assert max(gaps.values()) < 1e-5, gaps
    else:
        print(f"{family}: off by {(double - single).abs().max():.1e}")
        assert family == "qwen2", family
print("as stated")
PY
