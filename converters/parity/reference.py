"""The original model as the measure: float32, one sample at a time, without padding.

Its rules are written here a second time, for one row of Python numbers, and share nothing with `model.py`.

Run a half-precision model in float32 with little more memory than it takes.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from conch.converters.checkpoints.reader import Checkpoint
from conch.converters.parity.compare import Expected
from conch.converters.parity.report import GOLDEN_TOLERANCES
from conch.converters.parity.samples import Case, Sample
from conch.errors import ConversionError, ModelError
from conch.log import progress
from conch.models.loading import decoder_layers
from conch.store.manifest import Golden, GoldenSample
from conch.triton.contract import Form

_GOLDEN_SAMPLES = 8


def expected_scores(checkpoint: Checkpoint, cases: Iterable[Case]) -> Expected:
    """What the original says of every sample that has tokens.

    Raises:
        ConversionError: the model itself fails on a sample, or scores it with NaN or infinity.
    """
    samples = {sample.ids: sample for case in cases for sample in case.samples if sample.ids}
    expected = Expected({})
    with in_float32(checkpoint.model):
        for ids, sample in progress(list(samples.items()), desc="scoring with the original"):
            raw, every = _outputs(checkpoint, sample)
            expected.scores[ids] = _normalised(checkpoint, raw)
            if checkpoint.granularity != "sample":
                expected.steps[ids] = tuple(
                    (sample.ends[place] or 0, _normalised(checkpoint, every[place])[0])
                    for place in _step_places(checkpoint, sample)
                )
    return expected


def golden_of(cases: Sequence[Case], form: Form, expected: Expected, dtype: str) -> Golden:
    """Eight samples of the cases, with the original's scores."""
    samples = list(dict.fromkeys(sample for case in cases for sample in case.samples if sample.ids))
    step = max(1, len(samples) // _GOLDEN_SAMPLES)
    chosen = samples[::step][:_GOLDEN_SAMPLES]
    return Golden(
        tolerance=GOLDEN_TOLERANCES[dtype],
        samples=tuple(_golden_sample(sample, form, expected) for sample in chosen),
    )


def _golden_sample(sample: Sample, form: Form, expected: Expected) -> GoldenSample:
    sent: dict[str, Any] = {"text": sample.text} if form == "text" else {"input_ids": sample.ids}
    if expected.steps:
        sent["step_ends"], sent["step_scores"] = zip(*expected.steps[sample.ids], strict=True)
    return GoldenSample(**sent, scores=expected.scores[sample.ids])


def _normalised(checkpoint: Checkpoint, raw: list[float]) -> tuple[float, ...]:
    chosen = raw if checkpoint.columns is None else [raw[column] for column in checkpoint.columns]
    if checkpoint.normalise == "none":
        return tuple(chosen)
    assert checkpoint.mean is not None and checkpoint.std is not None
    return tuple((score - m) / s for score, m, s in zip(chosen, checkpoint.mean, checkpoint.std, strict=True))


@torch.inference_mode()
def _outputs(checkpoint: Checkpoint, sample: Sample) -> tuple[list[float], list[list[float]]]:
    """All outputs of the head: for the sample, and at each of its tokens where something is read there."""
    row = torch.tensor([sample.ids], device=checkpoint.model.device)
    inputs = {"input_ids": row, "attention_mask": torch.ones_like(row)}
    reads_tokens = checkpoint.pooling != "hf" or checkpoint.granularity != "sample"
    try:
        every = _at_every_token(checkpoint, inputs) if reads_tokens else []
        if checkpoint.pooling == "hf":
            scores = checkpoint.model(**inputs).logits[0].double().tolist()
        else:
            scores = _pooled_scores(checkpoint, sample, every)
    except Exception as error:  # torch raises many kinds; a stack of its frames helps nobody
        raise ConversionError(
            f"the checkpoint itself fails on a sample of {len(sample.ids)} tokens: {error}; "
            "if that is longer than its window, give a lower --max_length"
        ) from error
    if not all(map(math.isfinite, [*scores, *(value for outputs in every for value in outputs)])):
        raise ConversionError(
            f"the checkpoint itself scores a sample of {len(sample.ids)} tokens with {scores}, "
            "or one of its tokens with a number that is not finite"
        )
    return scores, every


def _at_every_token(checkpoint: Checkpoint, inputs: dict[str, Tensor]) -> list[list[float]]:
    head = checkpoint.head
    assert head is not None
    states = checkpoint.trunk(**inputs).last_hidden_state[0].double()
    outputs = states @ head.weight.double().T.to(states.device)
    if head.bias is not None:
        outputs = outputs + head.bias.double().to(states.device)
    rows = outputs.tolist()
    is_probability = checkpoint.pooling == "steps" and len(rows[0]) > 1
    return [_softmax(row) for row in rows] if is_probability else rows


def _pooled_scores(checkpoint: Checkpoint, sample: Sample, every: list[list[float]]) -> list[float]:
    ids, eos = sample.ids, checkpoint.tokenizer.eos_token_id
    if checkpoint.pooling == "steps":
        return _aggregated(checkpoint, [every[place] for place in _step_places(checkpoint, sample)])
    if checkpoint.pooling == "mean":  # the head is linear: the mean of its outputs is its output of the mean
        return [_mean(column) for column in zip(*every, strict=True)]
    where = {"cls": 0, "last_token": len(ids) - 1}.get(checkpoint.pooling)
    if where is None:
        where = ids.index(eos) if eos in ids else len(ids) - 1
    return every[where]


def _step_places(checkpoint: Checkpoint, sample: Sample) -> list[int]:
    """Tokens at which steps end, or that are scored each; never those that the client did not send."""
    ids = sample.ids
    sent = [place for place, end in enumerate(sample.ends) if end is not None]
    own = sent or list(range(len(ids)))
    words = [place for place in own if ids[place] != checkpoint.tokenizer.eos_token_id] or own
    if checkpoint.granularity != "sample" and not sent:
        return words[-1:]
    if checkpoint.granularity == "token":
        return own
    return sorted({place for place in own if ids[place] == checkpoint.separator_id} | {words[-1]})


def _aggregated(checkpoint: Checkpoint, steps: list[list[float]]) -> list[float]:
    if checkpoint.aggregate == "last":
        return steps[-1]
    combine: dict[str, Callable[[Any], float]] = {"min": min, "prod": math.prod, "mean": _mean}
    return [combine[str(checkpoint.aggregate)](column) for column in zip(*steps, strict=True)]


def _softmax(row: list[float]) -> list[float]:
    powers = [math.exp(value - max(row)) for value in row]
    return [power / sum(powers) for power in powers]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@contextlib.contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """Inside, the model computes what it would if it had been loaded in float32, to the last bit.

    Its layers are cast one at a time, while each runs; what stands outside of them stays cast meanwhile.
    Afterwards the model is as it was.
    """
    if all(parameter.dtype == torch.float32 for parameter in model.parameters()):
        yield
        return
    layers = _layers(model)
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    outside = _Cast([parameter for parameter in model.parameters() if id(parameter) not in inside])
    handles = []
    for layer in layers:
        cast = _Cast(list(layer.parameters()))
        handles.append(layer.register_forward_pre_hook(cast.up))
        handles.append(layer.register_forward_hook(cast.down, always_call=True))
    buffers = _replaced_buffers(model)
    outside.up()
    try:
        yield
    finally:
        outside.down()
        for handle in handles:
            handle.remove()
        for module, name, buffer in buffers:
            module._buffers[name] = buffer


class _Cast:
    """Casts parameters to float32 and puts back what was there."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters
        self._stored: list[Tensor] = []

    def up(self, *_: Any) -> None:
        """Cast."""
        self._stored = [parameter.data for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.data = parameter.data.float()

    def down(self, *_: Any) -> None:
        """Put back."""
        for parameter, stored in zip(self._parameters, self._stored, strict=True):
            parameter.data = stored
        self._stored = []


def _layers(model: Any) -> list[nn.Module]:
    try:
        return list(decoder_layers(model))
    except ModelError:  # an unusual build: then the whole model is cast at once
        return []


def _replaced_buffers(model: Any) -> list[tuple[nn.Module, str, Tensor]]:
    """Exchange the buffers for those of a float32 model, since a half-precision model may have computed its
    tables of positions in half precision. Returns the old ones."""
    config = copy.deepcopy(model.config)
    config.dtype = torch.float32  # classes made by transformers' own generic ones build their trunk in it
    with init_empty_weights(include_buffers=False):
        fresh = dict(type(model)(config).named_buffers())
    old = []
    for path, buffer in model.named_buffers():
        parent, _, name = path.rpartition(".")
        module = model.get_submodule(parent)
        if name in module._non_persistent_buffers_set and path in fresh:
            old.append((module, name, buffer))
            module._buffers[name] = fresh[path].to(buffer.device)
    return old
