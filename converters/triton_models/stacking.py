"""Several networks of one architecture as one, which runs them in a single pass. The converter copies this
file into version folders of ensembles whose members share an architecture.

It stands alone: torch and nothing of the package that wrote it.

The rows of a batch are repeated once for each member, and the architecture's own code runs once over all of
them, [members * rows, length]. Only modules that hold weights are others: each gives every member's rows to
that member's weights. Between them nothing mixes rows, so what reads no weights needs no change.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class UnstackableError(ValueError):
    """Networks that cannot run as one; says why."""


class StackedNetwork:
    """Runs networks of one architecture as one.

    networks: in evaluation mode, on their device. Their weights become views of stacked ones, so that there
        is one copy of each; moving or retraining a network afterwards would part them.

    Raises:
        UnstackableError: weights or buffers differ in name, shape or type, or stand in the network's own
            class.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        _check_alike(networks)
        self._members = len(networks)
        self._batch = _Batch(len(networks))
        self.network = _skeleton(networks[0])
        _replace_modules(self.network, networks, self._batch)

    def repeated(self, tensor: Tensor) -> Tensor:
        """Return a batch [rows, ...] once for each member, [members * rows, ...]; set the batch's size."""
        self._batch.rows = len(tensor)
        return tensor.repeat(self._members, *([1] * (tensor.dim() - 1)))


class _Batch:
    """The size of the batch that is under way: `rows` for each of `members`."""

    def __init__(self, members: int) -> None:
        self.members = members
        self.rows = 0

    def grouped(self, tensor: Tensor) -> Tensor:
        """Return rows [members * rows, ..., width] by member, [members, -1, width]."""
        if tensor.shape[0] % (self.members * self.rows):
            raise UnstackableError(f"a module reads a tensor {list(tensor.shape)}, which has no rows")
        return tensor.reshape(self.members, -1, tensor.shape[-1])

    def parts(self, value: Any) -> list[Any]:
        """Return each member's part of an argument; what has one row for all goes to every member."""
        if isinstance(value, Tensor) and value.dim() and value.shape[0] != 1:
            if value.shape[0] % (self.members * self.rows):
                raise UnstackableError(f"a module reads a tensor {list(value.shape)}, which has no rows")
            return list(value.chunk(self.members))
        if isinstance(value, tuple | list):
            columns = [self.parts(item) for item in value]
            return [type(value)(column[member] for column in columns) for member in range(self.members)]
        return [value] * self.members

    def joined(self, parts: Sequence[Any]) -> Any:
        """Join the members' outputs; one row for all of a member's rows is repeated for each."""
        if isinstance(parts[0], Tensor):
            if self.rows > 1 and parts[0].shape[0] == 1:
                parts = [part.expand(self.rows, *part.shape[1:]) for part in parts]
            return torch.cat(list(parts))
        if isinstance(parts[0], tuple | list):
            return type(parts[0])(self.joined(column) for column in zip(*parts, strict=True))
        return parts[0]


class _Linear(nn.Module):
    """Linear layers of all members as one product of stacks of matrices.

    is_transposed: weights are [out, in], as those of nn.Linear; else [in, out].
    """

    def __init__(self, layers: Sequence[nn.Module], batch: _Batch, *, is_transposed: bool) -> None:
        super().__init__()
        self._batch = batch
        self.weight = _stacked(layers, "weight")
        self.bias = _stacked(layers, "bias")
        self._matrices = self.weight.transpose(1, 2) if is_transposed else self.weight

    def forward(self, values: Tensor) -> Tensor:
        rows = self._batch.grouped(values)
        if self.bias is None:
            outputs = torch.bmm(rows, self._matrices)
        else:
            outputs = torch.baddbmm(self.bias.unsqueeze(1), rows, self._matrices)
        return outputs.view(*values.shape[:-1], outputs.shape[-1])


class _LayerNorm(nn.Module):
    """Layer norms of all members, in float32: the norm once, then scale and shift by member."""

    def __init__(self, layers: Sequence[nn.Module], batch: _Batch) -> None:
        super().__init__()
        self._batch = batch
        first: Any = layers[0]
        self._shape, self._eps = first.normalized_shape, first.eps
        self.weight, self.bias = _stacked(layers, "weight"), _stacked(layers, "bias")

    def forward(self, values: Tensor) -> Tensor:
        rows = self._batch.grouped(nn.functional.layer_norm(values, self._shape, None, None, self._eps))
        if self.bias is None:
            return (rows * self.weight.unsqueeze(1)).view(values.shape)
        return torch.addcmul(self.bias.unsqueeze(1), rows, self.weight.unsqueeze(1)).view(values.shape)


class _RMSNorm(nn.Module):
    """Root-mean-square norms of all members, by their own class's code over weights [members, 1, width]."""

    def __init__(self, layers: Sequence[nn.Module], batch: _Batch) -> None:
        super().__init__()
        self._batch = batch
        weight = _stacked(layers, "weight")
        assert weight is not None
        self._norm = _skeleton(layers[0])
        self._norm.weight = nn.Parameter(weight.unsqueeze(1), requires_grad=False)
        self.weight = weight

    def forward(self, values: Tensor) -> Tensor:
        return self._norm(self._batch.grouped(values)).view(values.shape)

    def is_right(self, layers: Sequence[nn.Module]) -> bool:
        """Whether the class's code takes such weights, tried on some values."""
        assert self.weight is not None
        shape = (self._batch.members, 3, self.weight.shape[-1])
        values = torch.linspace(-2, 2, shape[0] * shape[1] * shape[2]).view(shape).to(self.weight)
        try:
            together = self._norm(values)
        except (RuntimeError, ValueError):
            return False
        apart = torch.stack([layer(rows) for layer, rows in zip(layers, values, strict=True)])
        return torch.equal(together, apart)


class _Apart(nn.Module):
    """Any module, run member by member: embeddings, convolutions, and what is of a kind unknown here."""

    def __init__(self, modules: Sequence[nn.Module], batch: _Batch) -> None:
        super().__init__()
        self._batch = batch
        self._apart = list(modules)  # a list, since they belong to the members

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            kind = type(self._apart[0]).__name__
            raise AttributeError(f"the network's code reads `{name}` of its {kind} itself") from None

    def forward(self, *values: Any, **named: Any) -> Any:
        places = self._batch.parts(tuple(values))
        names = [self._batch.parts(value) for value in named.values()]
        outputs = [
            module(*places[number], **{name: parts[number] for name, parts in zip(named, names, strict=True)})
            for number, module in enumerate(self._apart)
        ]
        return self._batch.joined(outputs)


def _check_alike(networks: Sequence[nn.Module]) -> None:
    first = networks[0]
    expected = {name: (tuple(value.shape), value.dtype) for name, value in first.named_parameters()}
    buffers = dict(first.named_buffers())
    for network in networks[1:]:
        found = {name: (tuple(value.shape), value.dtype) for name, value in network.named_parameters()}
        if type(network) is not type(first) or found.keys() != expected.keys():
            raise UnstackableError(f"{type(first).__name__} and {type(network).__name__} have other weights")
        for name, (shape, dtype) in found.items():
            if (shape, dtype) != expected[name]:
                raise UnstackableError(f"weight {name} is {expected[name]} and {(shape, dtype)}")
        for name, buffer in network.named_buffers():
            if name not in buffers or not torch.equal(buffer, buffers[name]):
                raise UnstackableError(f"the members' buffers {name} differ")


def _skeleton(network: nn.Module) -> nn.Module:
    """Copy a network but not its weights."""
    shared = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(tensor): tensor for tensor in shared})


def _replace_modules(stacked: nn.Module, networks: Sequence[nn.Module], batch: _Batch) -> None:
    """Replace each outermost module that holds weights itself by one that holds those of all members."""
    if _holds_weights(stacked):
        raise UnstackableError(f"{type(stacked).__name__} holds weights of its own, beside its modules")
    done: dict[nn.Module, nn.Module] = {}

    def visit(parent: nn.Module, others: Sequence[nn.Module]) -> None:
        for name, child in list(parent.named_children()):
            if child in done:
                setattr(parent, name, done[child])
                continue
            children = [other.get_submodule(name) for other in others]
            if _holds_weights(child):
                done[child] = _together(children, batch)
                setattr(parent, name, done[child])
            else:
                visit(child, children)

    visit(stacked, networks)


def _holds_weights(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _together(layers: Sequence[nn.Module], batch: _Batch) -> nn.Module:
    kind, first = type(layers[0]), layers[0]
    if kind is nn.Linear and type(first.weight.data) is Tensor:
        return _Linear(layers, batch, is_transposed=True)
    if kind.__name__ == "Conv1D":  # of GPT-2: a linear layer whose weights are [in, out]
        return _Linear(layers, batch, is_transposed=False)
    names = {name for name, _ in first.named_parameters()}
    if kind is nn.LayerNorm and "weight" in names and first.weight.dtype == torch.float32:
        return _LayerNorm(layers, batch)
    if kind.__name__.endswith("RMSNorm") and names == {"weight"}:
        norm = _RMSNorm(layers, batch)
        if norm.is_right(layers):
            return norm
    return _Apart(layers, batch)


def _stacked(layers: Sequence[Any], name: str) -> Any:
    """Stack a weight of all members, and make the members' own views of it, so that no copy is left."""
    weights = [getattr(layer, name) for layer in layers]
    if weights[0] is None:
        return None
    stacked = torch.stack([weight.detach() for weight in weights])
    for number, weight in enumerate(weights):
        weight.data = stacked[number]
    return stacked
