#!/usr/bin/env bash
# A Llama-2 tokenizer gives other ids once it is saved and loaded: `legacy` is not saved, and tokenizer.json not read.
#
# Seen with transformers 5.23.0 and tokenizers 0.23.3.
# Guess: a fast tokenizer is its tokenizer.json, which `save_pretrained` writes out whole, so saving and loading changes
#   no id; `legacy` matters to the slow tokenizer alone, or is saved with the rest of tokenizer_config.json.
# Seen: `LlamaTokenizer` takes vocabulary, merges and post-processor from tokenizer.json, and makes normaliser and
#   pre-tokeniser anew from `legacy` of tokenizer_config.json, whose default is False. Saving drops `legacy: true`. The
#   tokenizer.json that it writes still puts a space piece behind special tokens, as `tokenizers` reads it, but loading
#   does not: "<s>[INST]" was "<s> ▁[ ..." and becomes "<s> [I ...". The second saving writes the new rules into the
#   file. Where `legacy` was never written (null, False or absent) the ids are not those of tokenizer.json from the
#   start. Beside a config.json of Mistral the same files are loaded as written, and saved, too. No error, no warning.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3
"$folder/venv/bin/pip" list --format=freeze | grep -E "^(torch|transformers|tokenizers)=="
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PY'
import json
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import AutoTokenizer

TEXT = "<s>[INST] hi [/INST] hi</s><s>[INST] hi"
pieces = ["<unk>", "<s>", "</s>", *"▁[]INSThi/", "▁h", "▁[", "[I"]
bpe = {"merges": [("▁", "h"), ("▁", "["), ("[", "I")], "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
published = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, **bpe))
published.add_special_tokens(["<unk>", "<s>", "</s>"])
published.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
published.decoder = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
published.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
NAMES = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
expected = published.encode(TEXT, add_special_tokens=False).ids
print(f"tokenizer.json: {' '.join(published.encode(TEXT, add_special_tokens=False).tokens)}")


def load(folder, model_type):
    Path(folder, "config.json").write_text(json.dumps({"model_type": model_type}))
    return AutoTokenizer.from_pretrained(folder)


def generations(model_type, keys):
    """A published folder, loaded; and what is saved of it, and of that, by transformers and by tokenizers."""
    with tempfile.TemporaryDirectory() as folder:
        published.save(str(Path(folder, "tokenizer.json")))
        Path(folder, "tokenizer_config.json").write_text(json.dumps({**NAMES, **keys}))
        tokenizer = load(folder, model_type)
    loaded, files = [tokenizer], []
    for _ in range(2):
        with tempfile.TemporaryDirectory() as folder:
            loaded[-1].save_pretrained(folder)
            keeps_legacy = "legacy" in json.loads(Path(folder, "tokenizer_config.json").read_text())
            assert keeps_legacy == (model_type == "mistral" and "legacy" in keys)
            files.append(Tokenizer.from_file(str(Path(folder, "tokenizer.json"))))
            loaded.append(load(folder, model_type))
    return loaded, files


def row(model_type, keys):
    loaded, files = generations(model_type, keys)
    ids = [tokenizer.encode(TEXT, add_special_tokens=False) for tokenizer in loaded]
    of_files = [file.encode(TEXT, add_special_tokens=False).ids for file in files]
    heads = [" ".join(tokenizer.convert_ids_to_tokens(each[:3])) for tokenizer, each in zip(loaded, ids, strict=True)]
    same, in_files = [each == expected for each in ids], [each == expected for each in of_files]
    print(f"{model_type} {keys}, {type(loaded[0]).__name__}: loaded, again, again: {heads} {same}; files {in_files}")
    return same, in_files


assert row("llama", {"legacy": True}) == ([True, False, False], [True, False])
for keys in ({"legacy": False}, {"legacy": None}, {}):
    assert row("llama", keys) == ([False, False, False], [False, False])
assert row("mistral", {"legacy": False}) == ([True, True, True], [True, True])
print("as stated")
PY
