#!/usr/bin/env bash
# `tokenizer.add_eos_token = False`, which it was, takes away the bos token, and BERT's [CLS] and [SEP].
#
# Seen with transformers 5.23.0 and tokenizers 0.23.3 (the post-processor of Llama's tokenizer.json: a bos in front).
# Guess: `add_bos_token` and `add_eos_token` say what the tokenizer does, and setting one changes that one: with
#   `add_eos_token = True`, as benchmarks of reward models set it where there is no chat template, a text has bos and
#   eos. Setting an attribute to the value that it has changes nothing.
# Seen: for a tokenizer loaded from a tokenizer.json both are False, whatever its texts begin with. Setting either, or
#   giving it to `from_pretrained`, makes a new post-processor of these two and the special tokens' names: "<s> a"
#   becomes "a </s>" with True, and "a" with False. A pair of sentences loses its separators and BERT's tokenizer its
#   [CLS] and [SEP], which only the old post-processor had. The same keys in tokenizer_config.json are not read where
#   there is a tokenizer.json: no eos there. With both set to True bos and eos are there. No error and no warning.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3
"$folder/venv/bin/pip" list --format=freeze | grep -E "^(torch|transformers|tokenizers)=="
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" - <<'PY'
import json
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, BertTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
words = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", "a", "b", "▁", "▁a", "▁b"])}
opening = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)])


def generic():
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **NAMES)


def llama():
    return LlamaTokenizer(vocab=words, merges=[("▁", "a"), ("▁", "b")])


def saved_and_loaded(tokenizer, keys=None, **settings):
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        file = Path(folder, "tokenizer_config.json")
        file.write_text(json.dumps({**json.loads(file.read_text()), **(keys or {})}))
        assert Path(folder, "tokenizer.json").is_file()
        return AutoTokenizer.from_pretrained(folder, **settings)


def tokens(tokenizer, *texts):
    return " ".join(tokenizer.convert_ids_to_tokens(tokenizer(*texts).input_ids)).replace("▁", "")


for make in (generic, llama):
    original = make()
    original.backend_tokenizer.post_processor = opening
    loaded = saved_and_loaded(original)
    said = (loaded.add_bos_token, loaded.add_eos_token)
    seen = {"loaded": tokens(loaded, "a"), "loaded, a pair": tokens(loaded, "a", "b")}
    for value in (True, False):
        changed = saved_and_loaded(original)
        changed.add_eos_token = value
        seen[f"add_eos_token = {value}"] = tokens(changed, "a")
        seen[f"from_pretrained(add_eos_token={value})"] = tokens(saved_and_loaded(original, add_eos_token=value), "a")
    seen["True in tokenizer_config.json"] = tokens(saved_and_loaded(original, {"add_eos_token": True}), "a")
    changed = saved_and_loaded(original, add_bos_token=True, add_eos_token=True)
    seen["both given"] = tokens(changed, "a")
    print(f"{type(loaded).__name__}: add_bos_token, add_eos_token: {said}; {seen}")
    assert said == (False, False)
    assert list(seen.values()) == ["<s> a", "<s> a <s> b", "a </s>", "a </s>", "a", "a", "<s> a", "<s> a </s>"], seen

names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
bert = saved_and_loaded(BertTokenizer(vocab={name: number for number, name in enumerate(names)}))
before = tokens(bert, "a", "b")
assert bert.add_eos_token is False
bert.add_eos_token = False
print(f"BertTokenizer: {before!r}, and with add_eos_token = False: {tokens(bert, 'a', 'b')!r}")
assert (before, tokens(bert, "a", "b")) == ("[CLS] a [SEP] b [SEP]", "a b")
print("as stated")
PY
