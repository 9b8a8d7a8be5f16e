#!/usr/bin/env bash
# What NLLB-MoE computes in training mode depends on how many tokens its last evaluation read.
#
# Seen with transformers 5.23.0 and torch 2.13.0 (CPU, float32).
# Guess: with all dropout at 0 and `second_expert_policy="all"` a pass in training mode is a function of weights and
#   batch: `expert_capacity` of the configuration (64) bounds how many tokens an expert takes, evaluation has its own
#   bound (`moe_eval_capacity_token_fraction`), and a pass without gradients leaves no trace in a model.
# Seen: an evaluation writes its bound, the number of its tokens, over the router's, and training keeps it. For a batch
#   of 8 rows of 40 tokens: two passes in training mode are equal to the bit. After `eval()` on the same batch they are
#   the evaluation (nothing is bounded any more), every row of log-probabilities is another, by up to 2.3. After an
#   evaluation of one row of 8 tokens they differ in every row, by up to 2.4. `train()` does not bring the bound back,
#   the configuration still says 64, and the state dict says nothing: a run that resumes from a checkpoint goes on with
#   64. No error and no warning.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/pip" list --format=freeze | grep -E "^(torch|transformers|tokenizers)=="
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PY'
import torch
from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration

size = {"vocab_size": 64, "d_model": 32, "num_experts": 8, "init_std": 0.2}
layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_sparse_step": 2, "decoder_sparse_step": 2}
heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
names = ("dropout", "attention_dropout", "activation_dropout", "moe_token_dropout")
no_dropout = dict.fromkeys((*names, "encoder_layerdrop", "decoder_layerdrop"), 0.0)
torch.manual_seed(0)
lm = NllbMoeForConditionalGeneration(NllbMoeConfig(**size, **layers, **heads, **no_dropout))
assert (lm.config.expert_capacity, lm.config.second_expert_policy) == (64, "all")
draws = torch.Generator().manual_seed(1)
texts, answers = (torch.randint(4, 64, (8, 40), generator=draws) for _ in range(2))


@torch.no_grad()
def log_probs(training, rows=8, length=40):
    output = lm.train(training)(input_ids=texts[:rows, :length], decoder_input_ids=answers[:rows, :length])
    return output.logits.log_softmax(dim=-1)


def bounds():
    return [module.expert_capacity for name, module in lm.named_modules() if name.endswith(".router")]


def compare(name, one, other):
    rows = (one - other).abs().amax(dim=-1)
    share = float((rows > 1e-4).float().mean())
    print(f"{name}: {share:.0%} of the rows of log-probabilities differ, by up to {rows.max():.1e}; bounds {bounds()}")
    return share


state = {name: value.clone() for name, value in lm.state_dict().items()}
first = log_probs(training=True)
assert not compare("training, twice", first, log_probs(training=True))
evaluated = log_probs(training=False)
after = log_probs(training=True)
assert not compare("training after an evaluation of the batch, and that evaluation", after, evaluated)
assert compare("training after an evaluation of the batch, and before", after, first) > 0.9
log_probs(training=False, rows=1, length=8)
after = log_probs(training=True)
assert compare("training after an evaluation of 8 tokens, and before", after, first) > 0.9
assert lm.config.expert_capacity == 64
assert all(torch.equal(value, state[name]) for name, value in lm.state_dict().items())
for module in lm.modules():
    if hasattr(module, "expert_capacity"):
        module.expert_capacity = 64
assert not compare("training with the bound put back, and before", log_probs(training=True), first)
print("as stated")
PY
