#!/usr/bin/env bash
# Bamba and MiniMax go on from a cache at position 0 unless they are told where they are; other hybrids count.
#
# Seen with transformers 5.23.0 and torch 2.13.0 (CPU, float32).
# Guess: `position_ids` may be left out: with a cache of 12 tokens the next token has position 12, as in Llama and as
#   in every model that mixes attention with recurrent layers; `generate`, which works, does nothing else.
# Seen: Bamba counts from 0 in each call, whatever the cache holds. MiniMax asks its cache, which looks at the first
#   layer: that one is recurrent, has no keys, and says 0. Granite-hybrid, Qwen3-Next and LFM2, whose first layers are
#   recurrent too, give the logits of the whole text. Off by 0.5 to 3 where logits have a standard deviation of 1.1;
#   with `position_ids` right to 1e-6, if tokens come one by one: several at once MiniMax masks as if the cache were
#   empty, so that `generate` with the cache of a prefix is wrong there, even though it passes the positions. No error
#   comes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PY'
import warnings

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

warnings.simplefilter("ignore", FutureWarning)
transformers.logging.set_verbosity_error()
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
SHAPE |= {"intermediate_size": 48, "max_position_embeddings": 64}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
HEADS = {f"linear_{kind}": size for kind, size in (("num_key_heads", 2), ("num_value_heads", 2))}
HEADS |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "head_dim": 16}
NEXT = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
ROPE = {"position_embedding_type": "rope", "shared_intermediate_size": 16, "layer_types": ["mamba", "attention"]}
MORE = {
    "llama": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": MAMBA2 | EXPERTS | ROPE,
    "qwen3_next": HEADS | NEXT | LINEAR,
    "bamba": MAMBA2 | {"attn_layer_indices": [1]},
    "minimax": EXPERTS | LINEAR | {"block_size": 4},
}
PREFIX, LENGTH = 12, 24


@torch.no_grad()
def go_on(lm, ids, step, told):
    """Logits after the prefix, which is read first; then `step` tokens at a time."""
    cache, logits = lm(input_ids=ids[:, :PREFIX], use_cache=True).past_key_values, []
    for start in range(PREFIX, LENGTH, step):
        places = {"position_ids": torch.arange(start, start + step).unsqueeze(0)} if told else {}
        output = lm(input_ids=ids[:, start : start + step], past_key_values=cache, use_cache=True, **places)
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
def first_logits(lm, ids):
    """Of `generate` with the cache of the prefix."""
    options = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cache = lm(input_ids=ids[:, :PREFIX], use_cache=True).past_key_values
    return lm.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options).logits[0]


for family in MORE:
    torch.manual_seed(0)
    tokens = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE, **MORE[family], **tokens)).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        ids = torch.randint(1, 40, (1, LENGTH))
        whole = lm(input_ids=ids, use_cache=False).logits
    errors = {
        "one by one": go_on(lm, ids, 1, told=False) - whole[:, PREFIX:],
        "one by one, told": go_on(lm, ids, 1, told=True) - whole[:, PREFIX:],
        "all at once": go_on(lm, ids, LENGTH - PREFIX, told=False) - whole[:, PREFIX:],
        "all at once, told": go_on(lm, ids, LENGTH - PREFIX, told=True) - whole[:, PREFIX:],
        "generate with a prefix": first_logits(lm, ids) - whole[:, -1],
    }
    errors = {name: error.abs().max().item() for name, error in errors.items()}
    print(f"{family}, logits of {whole.std():.2f}:", ", ".join(f"{name} {error:.0e}" for name, error in errors.items()))
    wrong = {"bamba": ["one by one", "all at once"], "minimax": [name for name in errors if name != "one by one, told"]}
    for name, error in errors.items():
        assert error > 0.01 if name in wrong.get(family, []) else error < 1e-4, (family, name, error)
print("as stated")
PY
