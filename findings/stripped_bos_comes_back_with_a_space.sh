#!/usr/bin/env bash
# A chat of Llama 2 whose bos is taken out, for the tokenizer to put it back, reads other pieces behind it.
#
# Seen with transformers 5.23.0 and tokenizers 0.23.3.
# Guess: a rendered chat without its bos, given to the tokenizer, which adds one, has the ids of
#   `apply_chat_template(chat)`. Cards and benchmarks of reward models do that against a second bos, and for Llama 3 it
#   holds.
# Seen: with `legacy=False`, as Llama-2-chat is published, a space piece goes in front of a text that begins with no
#   special token, and the bos in front of that: "<s> [I N S T ]" of the chat becomes "<s> ▁[ I N S T ]". The second
#   turn of the same chat keeps "[I". With `legacy=True` the ids are the chat's. A second bos, the thing to be avoided,
#   would have left all other ids alone. Encoding the chat whole with `add_special_tokens=False` gives its ids in both.
#   No error and no warning.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3 jinja2==3.1.6
"$folder/venv/bin/pip" list --format=freeze | grep -E "^(torch|transformers|tokenizers)=="
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PY'
from transformers import LlamaTokenizer

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}{{ bos_token }}[INST] {{ message.content }} [/INST]"
    "{% else %} {{ message.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
pieces = ["<unk>", "<s>", "</s>", *"▁[]INSThi/", "▁h", "▁[", "[I"]
vocabulary = {piece: number for number, piece in enumerate(pieces)}
turn = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hi"}]
chat = [*turn, *turn]
same = {}
for legacy in (True, False):
    merges = [("▁", "h"), ("▁", "["), ("[", "I")]
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges, legacy=legacy, add_bos_token=True)
    tokenizer.chat_template = TEMPLATE
    expected = tokenizer.apply_chat_template(chat, return_dict=True).input_ids
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text.startswith("<s>[INST]")
    ways = {
        "first bos out, tokenizer's in": tokenizer(text.removeprefix("<s>")).input_ids,
        "two bos, without the first": tokenizer(text).input_ids[1:],
        "whole, nothing added": tokenizer(text, add_special_tokens=False).input_ids,
    }
    print(f"legacy={legacy}: chat: {' '.join(tokenizer.convert_ids_to_tokens(expected))}")
    for name, ids in ways.items():
        same[legacy, name] = ids == expected
        print(f"  {name}: {' '.join(tokenizer.convert_ids_to_tokens(ids))}: {'same' if ids == expected else 'other'}")
    assert tokenizer(text).input_ids[:2] == [1, 1]
other = [key for key, value in same.items() if not value]
assert other == [(False, "first bos out, tokenizer's in")], other
print("as stated")
PY
