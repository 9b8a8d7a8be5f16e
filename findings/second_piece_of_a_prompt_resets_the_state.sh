#!/usr/bin/env bash
# Read in two pieces, a prompt loses its first piece in Mamba, Falcon-Mamba, Jamba and Zamba, but not in later hybrids.
#
# Seen with transformers 5.23.0 and torch 2.13.0 (CPU, float32).
# Guess: a cache stands for what was read: a prefix that many prompts share is read once, its cache goes on with the
#   rest of each prompt, and the logits are those of the whole text (`prefill_chunk_size` does that inside `generate`).
#   Recurrent layers keep their state in that cache, so it is true of them; what cannot do it raises an error.
# Seen: so it is if the rest is one token, and for rests of any length in Mamba-2, Bamba, Granite-hybrid, Nemotron-H
#   and LFM2 (to 1e-6). The layers of Mamba-1 hand their convolution on, but start the scan of several tokens from a
#   state of zeros, and store what comes out: the logits are off by 0.6 to 3, where they have a standard deviation of
#   1.1 to 1.3, and what is generated after them goes on from the wrong state. `generate(prefill_chunk_size=8)` of
#   Jamba and Zamba, and `generate` with the cache of a prefix, are off by 0.2 to 0.5. There is no error.
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
STATES = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
HYBRID = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
HYBRID |= {"intermediate_size": 48, "max_position_embeddings": 64}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 16}
NEMOTRON = {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 4}
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
ZAMBA = {"layers_block_type": ["mamba", "hybrid"] * 2, "num_hidden_layers": 4, "attention_head_dim": 32}
SHAPES = {
    "mamba": STATES,
    "falcon_mamba": STATES,
    "jamba": HYBRID | JAMBA | {"num_experts": 2, "mamba_d_state": 8},
    "zamba": HYBRID | ZAMBA | {"n_mamba_heads": 2, "mamba_d_state": 8},
    "mamba2": STATES | {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 4, "expand": 2},
    "bamba": HYBRID | MAMBA2 | {"attn_layer_indices": [1]},
    "granitemoehybrid": HYBRID | MAMBA2 | EXPERTS | {"layer_types": ["mamba", "attention"]},
    "nemotron_h": HYBRID | NEMOTRON | {"layers_block_type": ["mamba", "attention"], "head_dim": 16},
    "lfm2": HYBRID | {"layer_types": ["conv", "full_attention"]},
}
FORGETFUL = ("mamba", "falcon_mamba", "jamba", "zamba")
PREFIX, LENGTH = 12, 24


def build(family):
    """A random model whose states decay slowly, and a text."""
    torch.manual_seed(0)
    tokens = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPES[family], **tokens)).eval()
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if parameter.dim() > 1 and not name.endswith("A_log"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif name.endswith("A_log"):
                parameter.sub_(1.0)
    return lm, torch.randint(1, 40, (1, LENGTH))


@torch.no_grad()
def go_on(lm, ids, pieces):
    """Logits of a text that is read in pieces, each with the cache of those before."""
    name = next(name for name in ("past_key_values", "cache_params") if name in lm(input_ids=ids, use_cache=True))
    cache, start, logits = {}, 0, []
    for size in pieces:
        places = {} if name == "cache_params" else {"position_ids": torch.arange(start, start + size).unsqueeze(0)}
        output = lm(input_ids=ids[:, start : start + size], use_cache=True, **cache, **places)
        cache, start = {name: output[name]}, start + size
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
def first_logits(lm, ids, **options):
    options |= {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return lm.generate(ids, attention_mask=torch.ones_like(ids), **options).logits[0]


rest = LENGTH - PREFIX
for family in SHAPES:
    lm, ids = build(family)
    with torch.no_grad():
        whole = lm(input_ids=ids, use_cache=False).logits
    errors = {
        "one token more": go_on(lm, ids, [LENGTH - 1, 1]) - whole,
        "token by token": go_on(lm, ids, [PREFIX] + [1] * rest) - whole,
        "the rest at once": go_on(lm, ids, [PREFIX, rest]) - whole,
    }
    if family in ("jamba", "zamba", "bamba", "granitemoehybrid", "nemotron_h", "lfm2"):
        errors["generate by 8"] = first_logits(lm, ids, prefill_chunk_size=8) - whole[:, -1]
        with torch.no_grad():
            cache = lm(input_ids=ids[:, :PREFIX], use_cache=True).past_key_values
        errors["generate with a prefix"] = first_logits(lm, ids, past_key_values=cache) - whole[:, -1]
    errors = {name: error.abs().max().item() for name, error in errors.items()}
    print(f"{family}, logits of {whole.std():.2f}:", ", ".join(f"{name} {error:.0e}" for name, error in errors.items()))
    steps = errors.pop("one token more"), errors.pop("token by token")
    assert max(steps) < 1e-4, (family, steps)
    if family in FORGETFUL:
        assert min(errors.values()) > 0.01 and errors["the rest at once"] > 0.05, (family, errors)
    else:
        assert max(errors.values()) < 1e-4, (family, errors)
print("as stated")
PY
