#!/usr/bin/env bash
# Under `mixed_precision="bf16"` accelerate widens what a prepared module returns to float32, but not in a dataclass.
#
# Seen with accelerate 1.15.0, torch 2.13.0, transformers 5.23.0 (CPU).
# Guess: `prepare` wraps the forward pass so that every floating-point output is float32, in whatever container it
#   stands: a tensor, a tuple, a dict, a named tuple, a dataclass. The outputs of transformers are dataclasses, and are
#   widened.
# Seen: all of these are widened but the plain dataclass, whose tensors stay bfloat16, without a word. transformers'
#   `ModelOutput` is widened because it is a dict as well. Two consequences for a trainer: a loss written over a
#   dataclass is computed in bfloat16 unless it widens by itself; and returning bare logits costs a float32 copy of
#   [batch, tokens, vocabulary] that a dataclass does not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==1.26.4 accelerate==1.15.0 transformers==5.23.0
cat >"$folder/run.py" <<'PY'
import dataclasses
import typing

import torch
from accelerate import Accelerator
from transformers.utils import ModelOutput


@dataclasses.dataclass
class Plain:
    logits: torch.Tensor


@dataclasses.dataclass
class Transformers(ModelOutput):
    logits: torch.Tensor = None


class Named(typing.NamedTuple):
    logits: torch.Tensor


CONTAINERS = {
    "tensor": (lambda logits: logits, lambda output: output),
    "tuple": (lambda logits: (logits,), lambda output: output[0]),
    "dict": (lambda logits: {"logits": logits}, lambda output: output["logits"]),
    "named tuple": (Named, lambda output: output.logits),
    "ModelOutput": (lambda logits: Transformers(logits=logits), lambda output: output.logits),
    "dataclass": (Plain, lambda output: output.logits),
}


class Model(torch.nn.Module):
    def __init__(self, pack):
        super().__init__()
        self.head, self.pack = torch.nn.Linear(4, 4), pack

    def forward(self, states):
        return self.pack(self.head(states))


accelerator = Accelerator(mixed_precision="bf16", cpu=True)
seen = {
    name: str(unpack(accelerator.prepare(Model(pack))(torch.ones(2, 4))).dtype).removeprefix("torch.")
    for name, (pack, unpack) in CONTAINERS.items()
}
print(seen)
assert seen == {name: "bfloat16" if name == "dataclass" else "float32" for name in CONTAINERS}, seen
print("as stated")
PY
"$folder/venv/bin/python" "$folder/run.py"
