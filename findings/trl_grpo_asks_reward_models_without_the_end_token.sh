#!/usr/bin/env bash
# TRL's GRPOTrainer asks a reward model about texts of another form than its RewardTrainer trained it on.
#
# Seen with trl 1.16.0, transformers 5.23.0, torch 2.13.0 (Python 3.11).
# Guess: both trainers are of one package, so a model that RewardTrainer has trained is shown texts in GRPO as it has
#   learned to read them: if pairs are closed by the end token in training, completions are when they are scored.
# Seen: RewardTrainer appends the end token to each text of a pair that lacks it, and the score is learned at that
#   place. GRPOTrainer tokenises prompt + completion, from whose text the end token is gone, and closes nothing: the
#   score is read at the last word, a place that was never trained. Here every text of RewardTrainer ends with <eos>
#   and none of GRPOTrainer's does, and one text has the score 0.050 one way and 0.084 the other. Nothing warns.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet trl==1.16.0 transformers==5.23.0 torch==2.13.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PY'
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer

WORDS = ["<pad>", "<eos>", "<unk>", *"abcdefghij"]
PAD, EOS = 0, 1

words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
shape = {
    "vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": PAD, "eos_token_id": EOS,
}
torch.manual_seed(0)
reward_model = LlamaForSequenceClassification(LlamaConfig(**shape, num_labels=1))
policy = LlamaForCausalLM(LlamaConfig(**shape))


def last_ids(ids, mask):
    """Last token of each row that is no padding."""
    return [int(row[seen.bool()][-1]) for row, seen in zip(ids, mask)]


seen = []
reward_model.register_forward_pre_hook(
    lambda module, args, kwargs: seen.append((kwargs["input_ids"], kwargs["attention_mask"])), with_kwargs=True
)
common = {"max_steps": 2, "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
with tempfile.TemporaryDirectory() as folder:
    pairs = Dataset.from_list([{"chosen": "a b c d", "rejected": "a b e f"}] * 8)
    RewardTrainer(
        reward_model, RewardConfig(f"{folder}/rm", **common), train_dataset=pairs, processing_class=tokenizer
    ).train()
    trained_on = {last for batch in seen for last in last_ids(*batch)}
    seen.clear()
    prompts = Dataset.from_list([{"prompt": "a b"}] * 8)
    config = GRPOConfig(
        f"{folder}/grpo", num_generations=4, per_device_train_batch_size=4, max_completion_length=6, **common
    )
    GRPOTrainer(
        policy, reward_model, args=config, train_dataset=prompts, processing_class=tokenizer,
        reward_processing_classes=tokenizer,
    ).train()
    asked_with = [last for batch in seen for last in last_ids(*batch)]
print("RewardTrainer: last tokens", {WORDS[each] for each in trained_on})
print("GRPOTrainer: last tokens", sorted({WORDS[each] for each in asked_with}), f"in {len(asked_with)} texts")
assert trained_on == {EOS}
assert asked_with and EOS not in asked_with
ids = torch.tensor([[3, 4, 5, 6]])
with torch.no_grad():
    without = reward_model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item()
    closed = torch.cat([ids, torch.tensor([[EOS]])], dim=1)
    with_eos = reward_model(input_ids=closed, attention_mask=torch.ones_like(closed)).logits.item()
print(f"score of one text as trained {with_eos:.4f}, as GRPO asks {without:.4f}")
assert abs(with_eos - without) > 1e-3
print("as stated")
PY
