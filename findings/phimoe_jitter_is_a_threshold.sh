#!/usr/bin/env bash
# PhiMoE's `router_jitter_noise` is no noise: evaluation mode reads it too, and in training it lets experts be drawn.
#
# Seen with transformers 5.23.0 and torch 2.13.0 (CPU, float32).
# Guess: `router_jitter_noise` is what it is in Mixtral and Switch Transformers: in training mode the states are
#   multiplied by 1 +- noise before they are routed, and evaluation mode does not read it. So a released model may be
#   loaded with 0 to be trained without noise, and evaluates as before.
# Seen: it is the width of a band. Experts whose score lies within 2 * 0.01 of the highest, relatively, share a
#   softmax, whose value weighs the one that is taken; an expert alone in its band has weight 1. Evaluation takes the
#   best one, so 0 instead of the default 0.01 changes 89% of the rows of logits *in evaluation mode*, by up to 3.3,
#   where their standard deviation is 1.2 (random weights: many scores are close). Training draws one of the band:
#   without any dropout two passes differ in 86% of the rows, by up to 4.4. With 0 training is evaluation, but of
#   another model. Mixtral's evaluation does not change.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PY'
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PhimoeConfig

size = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 32}
shape = {**size, "intermediate_size": 48, "num_local_experts": 16, "num_experts_per_tok": 2, "initializer_range": 0.2}
ids = torch.randint(0, 32, (8, 64), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(family, noise, training, passes=1):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=32, router_jitter_noise=noise, **shape)
    lm = AutoModelForCausalLM.from_config(config).train(training)
    return [lm(input_ids=ids).logits for _ in range(passes)]


def compare(name, one, other):
    change = (one - other).abs().amax(dim=-1)
    share = float((change > 1e-4).float().mean())
    print(f"{name}: {share:.0%} of the rows of logits differ, by up to {change.max():.1e}")
    return share


default = PhimoeConfig().router_jitter_noise
assert (default, PhimoeConfig().attention_dropout) == (0.01, 0.0)
with_noise, without = (logits_of("phimoe", noise, training=False)[0] for noise in (default, 0.0))
print(f"standard deviation of logits: {with_noise.std():.1f}")
assert compare("PhiMoE in evaluation, 0.01 and 0", with_noise, without) > 0.5
assert compare("PhiMoE in training, 0.01, two passes", *logits_of("phimoe", default, training=True, passes=2)) > 0.5
assert not compare("PhiMoE with 0, training and evaluation", logits_of("phimoe", 0.0, training=True)[0], without)
assert not compare(
    "Mixtral in evaluation, 0.01 and 0", *(logits_of("mixtral", noise, training=False)[0] for noise in (0.01, 0.0))
)
print("as stated")
PY
