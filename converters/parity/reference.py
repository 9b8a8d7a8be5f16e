"""The reference scores of a checkpoint: its own model in float32, one sample at a time, without padding.

The scoring rules are carried out here a second time, for one row of Python numbers; the code shares nothing
with `model.py`. A half-precision model runs in float32 with little more memory than it takes.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from conch.converters.checkpoints.reader import RewardCheckpoint
from conch.converters.parity.compare import ExpectedScores
from conch.converters.parity.report import GOLDEN_TOLERANCES
from conch.converters.parity.samples import ParityCase, Sample, build_cases, requests_of
from conch.converters.parity.subprocess_model import Request
from conch.errors import ConversionError, ModelError
from conch.log import progress
from conch.models.loading import decoder_layers
from conch.store.manifest import Golden, GoldenSample, ScoringRules
from conch.triton.contract import Form

_GOLDEN_SAMPLES = 8


@dataclass(frozen=True, slots=True)
class ParityReference:
    """What a served model is asked, and what it must score.

    cases: the samples, one case a request.
    requests: what a client sends for each case.
    expected: the checkpoint's own scores.
    """

    cases: list[ParityCase]
    requests: list[Request]
    expected: ExpectedScores


def reference_of(checkpoint: RewardCheckpoint, form: Form, *, max_batch_size: int) -> ParityReference:
    """Build the cases for a served form of the checkpoint, and score them with the checkpoint itself.

    Raises:
        ConversionError: the model itself fails on a sample, or scores it with NaN or infinity.
    """
    cases = build_cases(checkpoint, form, max_batch_size=max_batch_size)
    expected = expected_scores(checkpoint, cases)
    return ParityReference(cases, requests_of(cases, form, checkpoint.rules.pad_token_id), expected)


def expected_scores(checkpoint: RewardCheckpoint, cases: Iterable[ParityCase]) -> ExpectedScores:
    """Score every sample that has tokens with the checkpoint's own model.

    Raises:
        ConversionError: the model itself fails on a sample, or scores it with NaN or infinity.
    """
    samples = {sample.ids: sample for case in cases for sample in case.samples if sample.ids}
    rules, expected = checkpoint.rules, ExpectedScores({})
    with in_float32(checkpoint.model):
        for ids, sample in progress(list(samples.items()), desc="scoring with the original"):
            raw, at_tokens = _outputs(checkpoint, sample)
            expected.scores[ids] = _normalised(rules, raw)
            if rules.granularity != "sample":
                expected.steps[ids] = tuple(
                    (sample.ends[place] or 0, _normalised(rules, at_tokens[place])[0])
                    for place in _step_places(rules, sample)
                )
    return expected


def golden_of(cases: Sequence[ParityCase], form: Form, expected: ExpectedScores, dtype: str) -> Golden:
    """Choose eight samples of the cases, with the original's scores."""
    samples = list(dict.fromkeys(sample for case in cases for sample in case.samples if sample.ids))
    step = max(1, len(samples) // _GOLDEN_SAMPLES)
    chosen = samples[::step][:_GOLDEN_SAMPLES]
    return Golden(
        tolerance=GOLDEN_TOLERANCES[dtype],
        samples=tuple(_golden_sample(sample, form, expected) for sample in chosen),
    )


def _golden_sample(sample: Sample, form: Form, expected: ExpectedScores) -> GoldenSample:
    request: dict[str, Any] = {"text": sample.text} if form == "text" else {"input_ids": sample.ids}
    if expected.steps:
        request["step_ends"], request["step_scores"] = zip(*expected.steps[sample.ids], strict=True)
    return GoldenSample(**request, scores=expected.scores[sample.ids])


def _normalised(rules: ScoringRules, raw: list[float]) -> tuple[float, ...]:
    """Of all outputs return the rewards, normalised where the rules say so."""
    served = raw if rules.columns is None else [raw[column] for column in rules.columns]
    if not (rules.normalise or rules.folded):
        return tuple(served)
    assert rules.mean is not None and rules.std is not None
    return tuple((score - m) / s for score, m, s in zip(served, rules.mean, rules.std, strict=True))


@torch.inference_mode()
def _outputs(checkpoint: RewardCheckpoint, sample: Sample) -> tuple[list[float], list[list[float]]]:
    """Return all outputs of the head: for the sample, and at each token where scores are read there."""
    rules, row = checkpoint.rules, torch.tensor([sample.ids], device=checkpoint.model.device)
    inputs = {"input_ids": row, "attention_mask": torch.ones_like(row)}
    reads_tokens = rules.pooling != "hf" or rules.granularity != "sample"
    try:
        at_tokens = _at_every_token(checkpoint, inputs) if reads_tokens else []
        if rules.pooling == "hf":
            scores = checkpoint.model(**inputs).logits[0].double().tolist()
        else:
            scores = _pooled_scores(rules, sample, at_tokens)
    except Exception as error:  # torch raises many kinds; a stack of its frames helps nobody
        raise ConversionError(
            f"the checkpoint itself fails on a sample of {len(sample.ids)} tokens: {error}; "
            "if that is longer than its window, give a lower --max_length"
        ) from error
    if not all(map(math.isfinite, [*scores, *(value for outputs in at_tokens for value in outputs)])):
        raise ConversionError(
            f"the checkpoint itself scores a sample of {len(sample.ids)} tokens with {scores}, "
            "or one of its tokens with a number that is not finite"
        )
    return scores, at_tokens


def _at_every_token(checkpoint: RewardCheckpoint, inputs: dict[str, Tensor]) -> list[list[float]]:
    assert checkpoint.head is not None
    (head,) = checkpoint.head.layers
    states = checkpoint.trunk(**inputs).last_hidden_state[0].double()
    outputs = states @ head.weight.double().T.to(states.device)
    if head.bias is not None:
        outputs = outputs + head.bias.double().to(states.device)
    rows = outputs.tolist()
    is_probability = checkpoint.rules.pooling == "steps" and len(rows[0]) > 1
    return [_softmax(row) for row in rows] if is_probability else rows


def _pooled_scores(rules: ScoringRules, sample: Sample, at_tokens: list[list[float]]) -> list[float]:
    ids, eos = sample.ids, rules.eos_token_id
    if rules.pooling == "steps":
        return _aggregated(rules, [at_tokens[place] for place in _step_places(rules, sample)])
    if rules.pooling == "mean":  # the head is linear: the mean of its outputs is its output of the mean
        return [_mean(column) for column in zip(*at_tokens, strict=True)]
    place = {"cls": 0, "last_token": len(ids) - 1}.get(rules.pooling)
    if place is None:
        place = ids.index(eos) if eos in ids else len(ids) - 1
    return at_tokens[place]


def _step_places(rules: ScoringRules, sample: Sample) -> list[int]:
    """Return the tokens at which steps end, or that are scored each; only tokens that the client sent."""
    ids = sample.ids
    sent = [place for place, end in enumerate(sample.ends) if end is not None]
    own = sent or list(range(len(ids)))
    words = [place for place in own if ids[place] != rules.eos_token_id] or own
    if rules.granularity != "sample" and not sent:
        return words[-1:]
    if rules.granularity == "token":
        return own
    return sorted({place for place in own if ids[place] == rules.separator_id} | {words[-1]})


def _aggregated(rules: ScoringRules, steps: list[list[float]]) -> list[float]:
    if rules.aggregate == "last":
        return steps[-1]
    combine: dict[str, Callable[[Any], float]] = {"min": min, "prod": math.prod, "mean": _mean}
    return [combine[str(rules.aggregate)](column) for column in zip(*steps, strict=True)]


def _softmax(row: list[float]) -> list[float]:
    powers = [math.exp(value - max(row)) for value in row]
    return [power / sum(powers) for power in powers]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@contextlib.contextmanager
def in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Let the model compute, inside the block, what it would if loaded in float32, to the last bit.

    Layers are cast one at a time, while each runs; parameters outside of layers for the whole block.
    Afterwards the model is as before.
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
    buffers = _replace_buffers(model)
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
    """Casts parameters to float32 and back."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters
        self._stored: list[Tensor] = []

    def up(self, *_: Any) -> None:
        """Cast to float32."""
        self._stored = [parameter.data for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.data = parameter.data.float()

    def down(self, *_: Any) -> None:
        """Put the stored parameters back."""
        for parameter, stored in zip(self._parameters, self._stored, strict=True):
            parameter.data = stored
        self._stored = []


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    try:
        return list(decoder_layers(model))
    except ModelError:  # an unusual build: then the whole model is cast at once
        return []


def _replace_buffers(model: PreTrainedModel) -> list[tuple[nn.Module, str, Tensor]]:
    """Exchange the buffers for those of a float32 model, and return the old ones.

    A half-precision model may have computed its tables of positions in half precision.
    """
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
