#!/usr/bin/env bash
# RoBERTa as a decoder generates from positions 0, 1, 2, ..., where its forward pass counts 2, 3, 4, ...
#
# Seen with transformers 5.23.0 and torch 2.13.0 (CPU, float32).
# Guess: for one prompt without padding `generate` runs the forward pass and nothing else, so its first logits are
#   `model(input_ids).logits[:, -1]`; where a model numbers its positions in a way of its own, it does so in both.
# Seen: without `position_ids` the model counts from one behind the pad token's id (2), as it was trained to. `generate`
#   derives positions from the mask and passes them, from 0. The logits of one prompt of four tokens are off by up to
#   4.6, where logits have a standard deviation of 1.2, with a cache and without. No error and no warning. Position 1
#   is even the table's row for padding, all zeros in a new model. XLM-RoBERTa, CamemBERT, RoBERTa-PreLayerNorm and
#   Data2Vec do the same; BERT, which counts from 0, is right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PY'
import torch
from transformers import AutoConfig, AutoModelForCausalLM

size = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 48}
tokens = {"vocab_size": 32, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": None}
prompt = torch.tensor([[5, 6, 7, 8]])
errors, positions = {}, {}
for family in ("bert", "roberta", "xlm-roberta", "camembert", "roberta-prelayernorm", "data2vec-text"):
    torch.manual_seed(0)
    shape = {"max_position_embeddings": 64, "is_decoder": True, "initializer_range": 0.2, **size, **tokens}
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape)).eval()
    table = next(module for name, module in lm.named_modules() if name.endswith(".position_embeddings"))
    read = positions[family] = []
    table.register_forward_hook(lambda module, inputs, output, read=read: read.append(inputs[0].flatten().tolist()))
    with torch.no_grad():
        expected = lm(input_ids=prompt).logits[:, -1]
        for use_cache in (True, False):
            output = lm.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=1,
                do_sample=False,
                use_cache=use_cache,
                output_logits=True,
                return_dict_in_generate=True,
            )
            errors[family, use_cache] = float((output.logits[0] - expected).abs().max())
    zeros = "zeros" if not table.weight[1].any() else "weights"
    print(f"{family}: off by {errors[family, True]:.1e}, standard deviation {expected.std():.1f};", end=" ")
    print(f"positions: forward {read[0]}, generate {read[1]}; row 1 of the table: {zeros}")
    assert zeros == ("weights" if family == "bert" else "zeros")
for (family, use_cache), error in errors.items():
    assert error < 1e-5 if family == "bert" else error > 0.1, (family, use_cache, error)
right = [0, 1, 2, 3]
assert positions.pop("bert") == [right, right, right]
assert all(each == [[2, 3, 4, 5], right, right] for each in positions.values()), positions
print("as stated")
PY
