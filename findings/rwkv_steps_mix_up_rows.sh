#!/usr/bin/env bash
# RWKV generates from other logits than its forward pass gives as soon as a batch has two rows.
#
# Seen with transformers 5.23.0 and torch 2.13.0 (CPU, float32).
# Guess: a recurrent model keeps a state for each row, so `generate` with its cache, on prompts of one length and
#   without padding, takes its tokens from the logits that the forward pass gives for the whole text, in a batch as for
#   a row alone.
# Seen: for a row alone, or without the cache, that is so (to 7e-7). With two rows the prompt's logits are right, and
#   all later ones are off by 0.7 to 1.3, where logits have a standard deviation of 0.5. No error and no warning. A
#   cached step adds what it remembers, [rows, size], to what it reads, [rows, 1, size], and broadcasting makes that
#   [rows, rows, size]: each row goes on by as many tokens as there are rows, mixed with what each row remembers. The
#   step's logits are [2, 2, vocabulary]; `generate` takes the last.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PY'
import torch
from transformers import RwkvConfig, RwkvForCausalLM

torch.manual_seed(0)
tokens = {"bos_token_id": 0, "eos_token_id": None}
config = RwkvConfig(vocab_size=32, hidden_size=32, num_hidden_layers=2, context_length=64, **tokens)
lm = RwkvForCausalLM(config).eval()
prompts = torch.tensor([[3, 5], [7, 11]])


@torch.no_grad()
def largest_errors(rows, use_cache):
    output = lm.generate(
        rows,
        attention_mask=torch.ones_like(rows),
        max_new_tokens=6,
        do_sample=False,
        use_cache=use_cache,
        output_logits=True,
        return_dict_in_generate=True,
    )
    whole = lm(input_ids=output.sequences, use_cache=False).logits[:, 1:-1]
    return (torch.stack(output.logits, dim=1) - whole).abs().amax(dim=(0, 2)).tolist()


seen = {
    (len(rows), cached): largest_errors(rows, cached) for rows in (prompts[:1], prompts) for cached in (False, True)
}
for (num_rows, cached), errors in seen.items():
    print(num_rows, "row(s),", "cached:" if cached else "no cache:", *(f"{error:.1e}" for error in errors))
with torch.no_grad():
    whole = lm(input_ids=prompts, use_cache=True)
    step = lm(input_ids=prompts[:, -1:], state=whole.state, use_cache=True)
print(f"standard deviation of logits: {whole.logits.std():.2f}; shape of one cached step: {tuple(step.logits.shape)}")
wrong = seen.pop((2, True))
assert all(max(errors) < 1e-5 for errors in seen.values()), seen
assert wrong[0] < 1e-5 and min(wrong[1:]) > 0.1, wrong
assert step.logits.shape == (2, 2, 32), step.logits.shape
print("as stated")
PY
