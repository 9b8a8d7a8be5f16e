#!/usr/bin/env bash
# With `--use_cache` lm-eval makes copies of one sample of all samples of a prompt, in the second run.
#
# Seen with lm_eval 0.4.13, transformers 5.23.0, torch 2.13.0 (Python 3.11).
# Guess: the cache keeps apart what `repeats: 8` asks for eight times, or leaves sampled answers alone: a run that is
#   taken up again, or scored with another filter (best of n, maj@n, pass@k), has the samples of the first run, or new
#   ones.
# Seen: the cache's key is prompt and settings, without the number of the repeat, and sampled answers are left out if
#   the settings say `do_sample: true`. A temperature alone makes lm-eval's models sample as well, and that is not
#   looked at. So the first run has 7 or 8 different answers a prompt, the second eight times the last of them: 8
#   answers that agree, and pass@8 and maj@8 are both the pass@1 of one draw. With `do_sample: true` beside it, both
#   runs sample.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 lm_eval==0.4.13
cd "$folder"
export HF_HUB_OFFLINE=1 HF_HOME="$folder" OMP_NUM_THREADS=1
"$folder/venv/bin/python" - 2> "$folder/log" <<'PY' || { cat "$folder/log" && false; }
import json
from pathlib import Path

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

REPEATS = 8
words = Tokenizer(models.WordLevel({mark: i for i, mark in enumerate("#?+0123456789")}, unk_token="?"))
words.pre_tokenizer, words.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="#", pad_token="#", unk_token="?")
torch.manual_seed(0)
shape = {"vocab_size": 13, "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
lm = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).eval()
rows = [{"sum": f"{number}+{number}?", "answer": str(2 * number)} for number in range(5)]
Path("sums.jsonl").write_text("\n".join(map(json.dumps, rows)))


def samples(cache, **sampling):
    """What a run scores: the answers to each prompt."""
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "sums.jsonl"}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{sum}}",
        "doc_to_target": "{{answer}}",
        "repeats": REPEATS,
        "generation_kwargs": {"until": ["?"], "max_gen_toks": 3, **sampling},
        "filter_list": [{"name": "all", "filter": [{"function": "take_first_k", "k": REPEATS}]}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    model = HFLM(pretrained=lm, tokenizer=tokenizer, device="cpu", batch_size=8)
    results = lm_eval.simple_evaluate(model, tasks=[task], use_cache=cache, log_samples=True, bootstrap_iters=0)
    return [sample["resps"][0] for sample in results["samples"]["sums"]]


for name, sampling in (("temperature", {}), ("both", {"do_sample": True})):
    runs = [samples(name, temperature=1.0, **sampling) for _ in range(2)]
    kinds = [[len(set(answers)) for answers in run] for run in runs]
    print({"temperature": 1.0} | sampling, "different answers to each prompt, run by run:", *kinds)
    print("  first prompt:", *runs[0][0], "| then", *runs[1][0])
    assert all(len(answers) == REPEATS for run in runs for answers in run)
    assert min(kinds[0]) > 4, kinds
    if sampling:
        assert min(kinds[1]) > 4, kinds
    else:
        assert runs[1] == [answers[-1:] * REPEATS for answers in runs[0]], runs
print("as stated")
PY
