#!/usr/bin/env bash
# NLLB-MoE multiplies by experts 0 and 1 alone, however many it has, and whatever its router says.
#
# Seen with transformers 5.23.0 and torch 2.13.0 (CPU, float32).
# Guess: each token goes through the two experts that the router scores highest, as class and paper say, so over
#   enough tokens all eight experts run, and those that no router chose may be zeroed without a change.
# Seen: the experts take the router's mask of noughts and ones for numbers of experts. Per token there are eight
#   products instead of two: expert 1 in the place of the best one, expert 0 in the place of each of the others, weighed
#   0 but for the second best. Experts 2 to 7 never run: with all their weights zeroed the logits are the same to the
#   bit, though the routers sent 90% and 69% of the tokens first to one of them; and they get no gradient. Computing
#   by hand what the router said changes every row of logits, by up to 2.2, where their standard deviation is 1.2. No
#   error and no warning. Switch Transformers, of the same kin, runs the experts that its router names.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/pip" list --format=freeze | grep -E "^(torch|transformers|tokenizers)=="
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PY'
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

EXPERTS = 8
shared = {"vocab_size": 64, "d_model": 32, "num_experts": EXPERTS, "expert_capacity": 1000}
nllb = {"encoder_layers": 2, "decoder_layers": 2, "encoder_sparse_step": 2, "decoder_sparse_step": 2, "init_std": 0.2}
heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
switch = {"d_ff": 48, "d_kv": 16, "num_heads": 2, "num_layers": 2, "num_decoder_layers": 2, "initializer_factor": 2.0}
sparse = {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "decoder_start_token_id": 0}
draws = torch.Generator().manual_seed(1)
batch = {name: torch.randint(4, 64, (8, 40), generator=draws) for name in ("input_ids", "decoder_input_ids")}


def new(family, shape):
    torch.manual_seed(0)
    return AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(family, **shared, **shape)).eval()


def logits_of(lm):
    with torch.no_grad():
        return lm(**batch).logits


def number(name):
    """Of an expert's weight, by its name."""
    return int(name.partition(".expert_")[2].partition(".")[0])


def watch(lm):
    """Numbers of the experts that run, and how many tokens each router sends first to each."""
    ran, sent = set(), []
    for name, module in lm.named_modules():
        if name.rpartition(".")[2].startswith("expert_"):
            module.register_forward_hook(lambda *_, number=number(name): ran.add(number))
        elif name.endswith(".router"):
            module.register_forward_hook(
                lambda _, inputs, output: sent.append(output[0].reshape(-1, EXPERTS).sum(dim=0).tolist())
            )
    return ran, sent


def as_routed(experts, inputs, output):
    """What the router said: each token through each expert that has a weight."""
    states, _, weights = inputs
    kept = 1 - experts.moe_token_dropout
    products = [experts[f"expert_{i}"](states) * weights[:, i : i + 1] * kept for i in range(EXPERTS)]
    return torch.stack(products).sum(dim=0)


def change(one, other):
    rows = (one - other).abs().amax(dim=-1)
    return float(rows.max()), float((rows > 1e-4).float().mean())


lm = new("nllb-moe", {**nllb, **heads})
ran, sent = watch(lm)
before = logits_of(lm)
print(f"NLLB-MoE: routers send {sent}; experts that ran: {sorted(ran)}")
assert ran == {0, 1} and all(sum(counts[2:]) > 0.5 * sum(counts) for counts in sent)

lm(**batch).logits.square().mean().backward()
weights = {name: weight for name, weight in lm.named_parameters() if ".expert_" in name}
learn = {number(name) for name, weight in weights.items() if weight.grad is not None and weight.grad.any()}
print(f"experts that have a gradient: {sorted(learn)}")
assert learn == {0, 1}

routed = new("nllb-moe", {**nllb, **heads})
for name, module in routed.named_modules():
    if name.endswith(".experts"):
        module.register_forward_hook(as_routed)
far, share = change(before, logits_of(routed))
print(f"as routed: {share:.0%} of the rows of logits differ, by up to {far:.1f}; standard deviation {before.std():.1f}")
assert share > 0.9 and far > 0.5

with torch.no_grad():
    for name, weight in weights.items():
        if number(name) > 1:
            weight.zero_()
print(f"experts 2 to 7 zeroed: logits equal: {torch.equal(before, logits_of(lm))}")
assert torch.equal(before, logits_of(lm))

lm = new("switch_transformers", {**switch, **sparse})
ran, sent = watch(lm)
logits_of(lm)
named = {i for counts in sent for i, count in enumerate(counts) if count}
print(f"Switch Transformers: routers send {sent}; experts that ran: {sorted(ran)}")
assert ran == named and len(named) > 2
print("as stated")
PY
