#!/usr/bin/env bash
# Whether `padding_side` survives `save_pretrained` depends on whether the last call of the tokenizer padded.
#
# Seen with transformers 5.23.0 and tokenizers 0.23.3.
# Guess: what is saved is what is set: a tokenizer whose `padding_side` was set to "left" pads on the left once saved
#   and loaded, and what it encoded before does not matter. If the attribute were not saved, it would never be.
# Seen: the attribute is not written to tokenizer_config.json, but tokenizer.json keeps what the backend did last, and
#   loading takes the side from there. Set and saved: "right" again. Set, one padded batch encoded, saved: "left". One
#   batch without padding encoded behind it: "right" again. Padded on the left, then set to "right", saved: "left", what
#   nothing said any more. `truncation_side` is kept the same way by a text that was cut, and only with the settings of
#   that call. Given to the constructor or to `from_pretrained`, the side is saved and wins. No error and no warning.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3
"$folder/venv/bin/pip" list --format=freeze | grep -E "^(torch|transformers|tokenizers)=="
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" - <<'PY'
import tempfile

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

ROWS = ["a", "a b"]


def generic():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": 1, "</s>": 2, "a": 3, "b": 4}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def qwen():
    return Qwen2Tokenizer(vocab={"<|endoftext|>": 0, "a": 1, "b": 2, "Ġ": 3}, merges=[])


def saved_and_loaded(tokenizer, **settings):
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder, **settings)


def pad(tokenizer):
    return tokenizer(ROWS, padding=True)


def set_to(side):
    return lambda tokenizer: setattr(tokenizer, "padding_side", side)


STEPS = {
    "set to left": ((set_to("left"),), "right"),
    "set to left, a padded batch": ((set_to("left"), pad), "left"),
    "set to left, a padded batch, one without padding": ((set_to("left"), pad, lambda each: each(ROWS)), "right"),
    "a padded batch, set to left": ((pad, set_to("left")), "right"),
    "set to left, a padded batch, set to right": ((set_to("left"), pad, set_to("right")), "left"),
}
for make in (generic, qwen):
    assert saved_and_loaded(make()).padding_side == "right"
    for name, (steps, expected) in STEPS.items():
        tokenizer = saved_and_loaded(make())
        for step in steps:
            step(tokenizer)
        loaded = saved_and_loaded(tokenizer)
        row = loaded.convert_ids_to_tokens(pad(loaded).input_ids[0])
        print(f"{type(tokenizer).__name__}: {name}: {tokenizer.padding_side} is loaded as {loaded.padding_side}: {row}")
        pads_left = row[0] == loaded.pad_token
        assert loaded.padding_side == expected and pads_left == (expected == "left"), name

    tokenizer = saved_and_loaded(make())
    tokenizer.truncation_side = "left"
    unused = saved_and_loaded(tokenizer).truncation_side
    tokenizer(["a b a"], truncation=True, max_length=2)
    used = saved_and_loaded(tokenizer).truncation_side
    print(f"truncation_side set to left is loaded as {unused}, and once a text was cut as {used}")
    assert (unused, used) == ("right", "left")

    given = saved_and_loaded(saved_and_loaded(make(), padding_side="left")).padding_side
    print(f"given to from_pretrained it is loaded as {given}")
    assert given == "left"
print("as stated")
PY
