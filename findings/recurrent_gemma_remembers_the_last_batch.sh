#!/usr/bin/env bash
# A prompt of one token makes RecurrentGemma go on from what the batch before it left behind.
#
# Seen with transformers 5.23.0 and torch 2.13.0 (CPU, float32).
# Guess: each call of `generate` starts from an empty cache, so a greedy answer depends on its prompt alone, whatever
#   was generated before.
# Seen: the states of the convolutions are kept in the modules, not in the cache that `generate` makes anew. A prompt
#   of two tokens or more overwrites them; a prompt of one token (a bos token: sampling from nothing) is taken for a
#   step of the batch before, if that had as many rows. Logits are off by up to 0.05, where their standard deviation is
#   0.27, and the same call twice gives logits 0.09 apart. No error and no warning. After a batch of another size, for a
#   longer prompt, without a cache, and in a plain forward pass all is right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PY'
import torch
from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

torch.manual_seed(0)
size = {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 32, "lru_width": 32, "intermediate_size": 48}
tokens = {"vocab_size": 32, "bos_token_id": None, "pad_token_id": None, "eos_token_id": None}
lm = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(attention_window_size=32, **size, **tokens)).eval()


@torch.no_grad()
def logits_of(rows, use_cache=True):
    output = lm.generate(
        rows,
        attention_mask=torch.ones_like(rows),
        max_new_tokens=3,
        do_sample=False,
        use_cache=use_cache,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(output.logits, dim=1), output.sequences


@torch.no_grad()
def error(rows, use_cache=True):
    logits, sequences = logits_of(rows, use_cache)
    whole = lm(input_ids=sequences, use_cache=False).logits[:, rows.shape[1] - 1 : -1]
    return float((logits - whole).abs().max())


one, two, other = torch.tensor([[5]]), torch.tensor([[5, 6]]), torch.tensor([[7, 8, 9]])
seen = {"one token, in a new model": error(one)}
logits_of(other)
seen["two tokens, after another batch"] = error(two)
logits_of(other)
seen["one token, after another batch, no cache"] = error(one, use_cache=False)
logits_of(other.expand(2, 3))
seen["one token, after a batch of another size"] = error(one)
logits_of(other)
seen["one token, after another batch"] = error(one)
logits_of(other)
first, second = logits_of(one)[0], logits_of(one)[0]
with torch.no_grad():
    plain = [(logits_of(rows), lm(input_ids=one, use_cache=True).logits)[1] for rows in (other, two)]
for name, value in seen.items():
    print(f"{name}: logits off by {value:.1e}")
print(f"the same call twice: apart by {(first - second).abs().max():.1e}; standard deviation {first.std():.2f}")
assert seen.pop("one token, after another batch") > 0.01
assert all(value < 1e-5 for value in seen.values()), seen
assert (first - second).abs().max() > 0.01
assert torch.equal(*plain)
print("as stated")
PY
