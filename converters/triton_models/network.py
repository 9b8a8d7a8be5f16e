"""The network of a served reward model, and how its states or outputs become scores. The converter copies
this file into version folders, beside the `model.py` that uses it.

It stands alone: torch and transformers, nothing of the package that wrote it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel

_ACTIVATIONS: dict[str, Any] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
    "selu": nn.functional.selu,
}


class ServedModel(nn.Module):
    """A network, and the rule by which its outputs become scores.

    network: a sequence classifier, whose own class ends in scores; a trunk, whose last hidden states are
        pooled as the manifest says and go through `head`; or a class of the checkpoint's own, whose reply
        holds the scores where the manifest's `output` says.
    head: in float32, of one or two layers: {"0.weight" [outputs, width], "0.bias" [outputs], "1.weight" ...};
        None where the network gives scores.
    """

    def __init__(self, network: Any, head: dict[str, Tensor] | None, manifest: dict[str, Any]) -> None:
        super().__init__()
        self.network = network
        self.manifest = manifest
        layers = range(len(head or ()) // 2)
        self.weights, self.biases = (
            nn.ParameterList(
                nn.Parameter(head[f"{layer}.{name}"], requires_grad=False) for layer in layers if head
            )
            for name in ("weight", "bias")
        )
        self.is_custom = manifest.get("layout") == "custom"
        parameters = inspect.signature(network.forward).parameters
        takes_all = any(each.kind == inspect.Parameter.VAR_KEYWORD for each in parameters.values())
        self.takes_mask = not self.is_custom or takes_all or "attention_mask" in parameters
        self.takes_types = "token_type_ids" in parameters

    def head(self) -> dict[str, Tensor] | None:
        """Return the head's tensors by number and name, as the constructor takes them."""
        pairs = enumerate(zip(self.weights, self.biases, strict=True))
        tensors = {
            f"{n}.{name}": value
            for n, pair in pairs
            for name, value in zip(("weight", "bias"), pair, strict=True)
        }
        return tensors or None

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Return scores float32 [rows, rewards] of padded rows, int64 [rows, length]; mask 0 is padding.

        Not of pooling `steps`, which must be told where steps end.
        """
        outputs = self.outputs(input_ids, attention_mask, token_type_ids)
        return self.rewards(outputs, input_ids, attention_mask)

    def outputs(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Return what the network gives: a classifier's scores [rows, outputs], a trunk's last hidden states
        [rows, length, width]."""
        output = self._run(input_ids, attention_mask, token_type_ids)
        if self.is_custom:
            return _scores_in(output, self.manifest["output"], rows=len(input_ids))
        return output.last_hidden_state if len(self.weights) else output.logits

    def rewards(self, outputs: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Make rewards float32 [rows, rewards] of what `outputs` returns."""
        if not len(self.weights):
            return self._served(outputs.float())
        return self._served(self._head(self._pooled(outputs, input_ids, attention_mask)))

    def dense(self, input_ids: Tensor, attention_mask: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores [rows, rewards] as `forward` does, and the first of every token, [rows, length].

        ends: bool [rows, length], True where a step ends; with pooling `steps` the scores there are
            aggregated.
        """
        states = self._run(input_ids, attention_mask, None).last_hidden_state
        every = self._applied(self._head(states))
        if self.manifest["pooling"] == "steps":
            scores = _aggregate(self.manifest["aggregate"], every, ends)
        else:
            scores = self._applied(self._head(self._pooled(states, input_ids, attention_mask)))
        return self._chosen(scores), self._chosen(every)[..., 0]

    def _run(self, input_ids: Tensor, mask: Tensor, types: Tensor | None) -> Any:
        inputs = {"input_ids": input_ids}
        if self.takes_mask:
            inputs["attention_mask"] = mask
        if self.takes_types and types is not None:
            inputs["token_type_ids"] = types
        return self.network(**inputs)

    def _served(self, outputs: Tensor) -> Tensor:
        """Make rewards [..., rewards] of all outputs [..., outputs]."""
        return self._chosen(self._applied(outputs))

    def _applied(self, outputs: Tensor) -> Tensor:
        function = self.manifest.get("function_to_apply", "none")
        if function == "softmax":
            return outputs.softmax(dim=-1)
        return outputs.sigmoid() if function == "sigmoid" else outputs

    def _chosen(self, scores: Tensor) -> Tensor:
        """Choose the rewards, normalised by the manifest."""
        if self.manifest.get("columns") is not None:
            scores = scores[..., self.manifest["columns"]]
        if self.manifest["normalise"]:
            mean, std = (torch.tensor(self.manifest[name], device=scores.device) for name in ("mean", "std"))
            scores = (scores - mean) / std
        return scores

    def _head(self, states: Tensor) -> Tensor:
        """Return the head's outputs [..., outputs] of states [..., width]."""
        values = states.float()
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if layer:
                values = _ACTIVATIONS[self.manifest["head_activation"]](values)
            values = nn.functional.linear(values, weight, bias)
        return values

    def _pooled(self, states: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Pool states [rows, length, width] -> [rows, width]."""
        rule = self.manifest["pooling"]
        if rule == "mean":
            weights = mask.unsqueeze(-1).float()
            return (states.float() * weights).sum(dim=1) / weights.sum(dim=1)
        where = self._position(rule, input_ids, mask)
        return states[torch.arange(states.shape[0], device=states.device), where]

    def _position(self, rule: str, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Return the place at which each row is read, [rows]."""
        if rule == "cls":
            return mask.int().argmax(dim=1)
        if rule == "hf":  # as transformers' decoders do it: by the ids, whatever the mask says
            return _last_true(input_ids != self.manifest["pad_token_id"])
        last = _last_true(mask.bool())
        if rule == "last_token":
            return last
        name = "pooling_token_id" if rule == "token" else "eos_token_id"
        is_read = (input_ids == self.manifest[name]) & mask.bool()
        found = _last_true(is_read) if rule == "token" else is_read.int().argmax(dim=1)
        return torch.where(is_read.any(dim=1), found, last)


def _scores_in(output: Any, where: str, *, rows: int) -> Tensor:
    """Take the scores [rows, outputs] out of what a class of the checkpoint's own returns.

    where: "" for a bare tensor, else a number, or the name of a field or key.
    """
    if where.isdecimal():
        output = output[int(where)]
    elif where:
        output = output[where] if isinstance(output, dict) else getattr(output, where)
    return output.float().reshape(rows, -1)


def _last_true(where: Tensor) -> Tensor:
    """Return the index of the last True of each row, [rows, length] -> [rows]; 0 where there is none."""
    return (where.int() * torch.arange(where.shape[1], device=where.device)).argmax(dim=1)


def _aggregate(how: str, scores: Tensor, ends: Tensor) -> Tensor:
    """Aggregate scores [rows, length, outputs] where `ends` [rows, length] is True -> [rows, outputs]."""
    where = ends.unsqueeze(-1)
    if how == "min":
        return scores.masked_fill(~where, torch.inf).amin(dim=1)
    if how == "prod":
        return scores.masked_fill(~where, 1.0).prod(dim=1)
    if how == "mean":
        return (scores * where).sum(dim=1) / where.sum(dim=1)
    return scores[torch.arange(scores.shape[0], device=scores.device), _last_true(ends)]


def load_model(folder: Path, manifest: dict[str, Any]) -> ServedModel:
    """Load the model of a version folder, on the CPU, in evaluation mode."""
    layout = manifest.get("layout", "classifier")
    auto_class: Any = AutoModel if layout == "trunk" else AutoModelForSequenceClassification
    if layout == "custom":
        auto_class = getattr(transformers, manifest["auto_class"])
    head = load_file(folder / "head.safetensors") if layout == "trunk" else None
    # config.json describes the format of int8 weights; everything beside them is float32.
    dtype = torch.float32 if manifest["dtype"] == "int8" else getattr(torch, manifest["dtype"])
    if layout == "custom":
        allow_older_code(folder)
    network = auto_class.from_pretrained(
        folder, local_files_only=True, trust_remote_code=manifest["trust_remote_code"], dtype=dtype
    )
    return ServedModel(network, head, manifest).eval()


def allow_older_code(folder: Path) -> None:
    """Give classes that were written for transformers 4 what transformers 5 took away, for this process.

    Texts for docstrings, which modules of ArmoRM and QRM import (`LLAMA_INPUTS_DOCSTRING`), are empty ones;
    and a class that does not call `post_init` has no tied weights.
    """
    for file in folder.glob("*.py"):
        code = file.read_text(encoding="utf-8", errors="replace")
        for name in re.findall(r"^from (transformers\.models\.\w+\.modeling_\w+) import", code, re.M):
            with contextlib.suppress(ModuleNotFoundError):
                module = importlib.import_module(name)
                if not hasattr(module, "__getattr__"):
                    vars(module)["__getattr__"] = functools.partial(_empty_docstring, name)
    if not hasattr(PreTrainedModel, "all_tied_weights_keys"):
        base: Any = PreTrainedModel
        base.all_tied_weights_keys = {}


def _empty_docstring(module: str, name: str) -> str:
    if re.fullmatch(r"[A-Z0-9_]+_(DOCSTRING|FOR_DOC)", name):
        return ""
    raise AttributeError(f"module {module!r} has no attribute {name!r}")
