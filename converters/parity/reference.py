"""The reference scores of a checkpoint: its own model in float32, one sample at a time, without padding.

The scoring rules are carried out here a second time, for one row of Python numbers; the code shares nothing
with `model.py`. A half-precision model runs in float32 with little more memory than it takes.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from conch.converters.checkpoints.reader import RewardCheckpoint
from conch.converters.parity.compare import ExpectedScores, Key, samples_above_tolerance
from conch.converters.parity.inputs import Sample, places_of
from conch.converters.parity.report import GOLDEN_TOLERANCES, TOLERANCES
from conch.converters.parity.samples import (
    ONLY_IDS,
    ParityCase,
    build_cases,
    pairs_of_answers,
    requests_of,
)
from conch.converters.parity.subprocess_model import Request
from conch.errors import ConversionError, ModelError
from conch.log import get_logger, progress
from conch.models.loading import decoder_layers
from conch.store.manifest import Golden, GoldenSample, ScoringRules
from conch.triton.contract import Form

_GOLDEN_SAMPLES = 8
_COPIES = (1, 2, 7, 32)
_FEW = 0.25
"""Part of the samples, at most, that rounding may explain: what is wrong shows in most."""
_ROUNDINGS = 4
"""A served model may round worse than the original did in any of a few tries."""

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ParityReference:
    """What a served model is asked, and what it must score.

    cases: the samples, one case a request.
    requests: what a client sends for each case.
    expected: the checkpoint's own scores.
    rounding: see `rounding_of`; of the samples that tell nothing, once a served model was compared.
    """

    cases: list[ParityCase]
    requests: list[Request]
    expected: ExpectedScores
    rounding: dict[Key, float] = field(default_factory=dict)


def reference_of(checkpoint: RewardCheckpoint, form: Form, *, max_batch_size: int) -> ParityReference:
    """Build the cases for a served form of the checkpoint, and score them with the checkpoint itself.

    Raises:
        ConversionError: the model itself fails on a sample, scores it with NaN or infinity, or scores all
            answers to a prompt alike.
    """
    cases = _fit_for_own_class(checkpoint, build_cases(checkpoint, form, max_batch_size=max_batch_size))
    expected = expected_scores(checkpoint, cases)
    _refuse_deaf(checkpoint, cases, expected)
    return ParityReference(cases, requests_of(cases, form, checkpoint.rules.pad_token_id), expected)


def expected_scores(checkpoint: RewardCheckpoint, cases: Iterable[ParityCase]) -> ExpectedScores:
    """Score every sample that has tokens with the checkpoint's own model.

    Raises:
        ConversionError: the model itself fails on a sample, or scores it with NaN or infinity.
    """
    scored = [case for case in cases if not case.only_ids]
    samples = {sample.key: sample for case in scored for sample in case.samples if sample.ids}
    rules, expected = checkpoint.rules, ExpectedScores({})
    with in_precision(checkpoint.model, torch.float32):
        for key, sample in progress(list(samples.items()), desc="scoring with the original"):
            places = _places(checkpoint, sample)
            outputs, at_places = _outputs(checkpoint, sample, places)
            expected.scores[key] = _normalised(rules, outputs)
            if rules.granularity != "sample":
                expected.steps[key] = tuple(
                    (sample.ends[place] or 0, _normalised(rules, row)[0])
                    for place, row in zip(places, at_places, strict=True)
                )
    return expected


def rounding_of_failures(
    cases: Sequence[ParityCase],
    replies: Sequence[dict[str, Any]],
    expected: ExpectedScores,
    dtype: str,
    read: Callable[[], RewardCheckpoint],
) -> dict[Key, float]:
    """Return `rounding_of` the samples above the tolerance that it explains; {} where too many are above it.

    read: gives the checkpoint; called where it is needed.
    """
    samples = samples_above_tolerance(cases, replies, expected, dtype)
    if not 0 < len(samples) <= _FEW * len(expected.scores):
        return {}
    _log.info("scoring %d samples with the original in float64: does it round them as badly?", len(samples))
    try:
        rounding = rounding_of(read(), samples.values(), dtype)
    except ConversionError as error:  # some architectures know no float64
        _log.info("float64 does not tell: %s", error)
        return {}
    rounding = {key: value for key, value in rounding.items() if value > TOLERANCES[dtype]}
    for key, value in rounding.items():
        _log.warning(
            "a sample of %d tokens is compared to %.1e only: the original rounds its score as badly",
            *(len(samples[key].ids), value),
        )
    return rounding


def rounding_of(checkpoint: RewardCheckpoint, samples: Iterable[Sample], dtype: str) -> dict[Key, float]:
    """Return, by the key of a sample, a difference of scores that tells nothing about a served model.

    It is a multiple of how far the original's scores in float32 are from its scores in float64, alone and
    several times in one batch, without padding, for which kernels add in other orders. Most are 1e-7 away;
    behind a token that was never trained it may be 1e-4.

    dtype: precision of the served weights; what float32's rounding moves, that of others moves by more.
    """
    precision = {"int8": "bfloat16"}.get(dtype, dtype)
    coarser = torch.finfo(getattr(torch, precision)).eps / torch.finfo(torch.float32).eps
    found: dict[Key, float] = {}
    for sample in samples:
        with in_precision(checkpoint.model, torch.float64):
            exact = _all_scores(checkpoint, sample, copies=1)
        with in_precision(checkpoint.model, torch.float32):
            rounded = [_all_scores(checkpoint, sample, copies) for copies in _COPIES]
        away = max(abs(one - other) for row in rounded for one, other in zip(row, exact, strict=True))
        found[sample.key] = _ROUNDINGS * coarser * away
    return found


def _all_scores(checkpoint: RewardCheckpoint, sample: Sample, copies: int) -> list[float]:
    """The sample's scores, followed by those of its steps or tokens."""
    outputs, at_places = _outputs(checkpoint, sample, _places(checkpoint, sample), copies)
    return [score for row in (outputs, *at_places) for score in _normalised(checkpoint.rules, row)]


def _fit_for_own_class(checkpoint: RewardCheckpoint, cases: list[ParityCase]) -> list[ParityCase]:
    """Turn cases whose samples were cut to the limit, and then refused by the checkpoint's own class, into
    comparisons of what is read.

    A class may look for a turn that a cut takes, as a gate on the end of the prompt does.
    """
    if checkpoint.output is None:
        return cases
    limit, fit, refused = checkpoint.rules.max_length, list[ParityCase](), False
    with in_precision(checkpoint.model, torch.float32):
        for case in cases:
            cut = () if case.only_ids else (each for each in case.samples if len(each.ids) == limit)
            if all(_is_taken(checkpoint, sample) for sample in cut):
                fit.append(case)
            elif not refused:
                refused = True
                fit.append(ParityCase(ONLY_IDS, case.samples, only_ids=True))
    if refused:
        _log.warning(
            "%s refuses a dialogue that is cut to the limit of %d tokens, and so will its served form; "
            "--truncation_side says where dialogues lose tokens, --max_length how many they may have",
            *(type(checkpoint.model).__name__, limit),
        )
    return fit


@torch.inference_mode()
def _is_taken(checkpoint: RewardCheckpoint, sample: Sample) -> bool:
    row = torch.tensor([sample.ids], device=checkpoint.model.device)
    try:
        _of_own_class(checkpoint, {"input_ids": row, "attention_mask": torch.ones_like(row)})
    except Exception:  # code of others raises what it likes
        return False
    return True


def _refuse_deaf(checkpoint: RewardCheckpoint, cases: Sequence[ParityCase], expected: ExpectedScores) -> None:
    """Raise ConversionError if a model gives any two answers to a prompt the same score, to the bit."""
    pairs = pairs_of_answers(cases)
    if not pairs or any(expected.scores[one.key] != expected.scores[other.key] for one, other in pairs):
        return
    rules = checkpoint.rules
    token = f" {rules.pooling_token_id}" if rules.pooling == "token" else ""
    raise ConversionError(
        f"{checkpoint.source} gives different answers to one prompt the same score (pooling "
        f"{rules.pooling}{token}, {len(pairs)} pairs): what it is scored by is read before the answer; say "
        "where with --pooling or --pooling_token, or take a --recipe"
    )


def golden_of(
    cases: Sequence[ParityCase],
    form: Form,
    expected: ExpectedScores,
    dtype: str,
    left_out: Container[Key] = (),
) -> Golden:
    """Choose eight samples of the cases, with the original's scores.

    left_out: keys of samples that another machine may score otherwise.
    """
    scored = [case for case in cases if not case.only_ids]
    samples = dict.fromkeys(sample for case in scored for sample in case.samples if sample.ids)
    samples = [sample for sample in samples if sample.key not in left_out] or [*samples]
    step = max(1, len(samples) // _GOLDEN_SAMPLES)
    chosen = samples[::step][:_GOLDEN_SAMPLES]
    return Golden(
        tolerance=GOLDEN_TOLERANCES[dtype],
        samples=tuple(_golden_sample(sample, form, expected) for sample in chosen),
    )


def _golden_sample(sample: Sample, form: Form, expected: ExpectedScores) -> GoldenSample:
    request: dict[str, Any] = {"text": sample.text} if form == "text" else {"input_ids": sample.ids}
    if expected.steps:
        request["step_ends"], request["step_scores"] = zip(*expected.steps[sample.key], strict=True)
    return GoldenSample(**request, scores=expected.scores[sample.key])


def _normalised(rules: ScoringRules, raw: list[float]) -> tuple[float, ...]:
    """Of all outputs, with the function applied, return the rewards, normalised where the rules say so."""
    served = raw if rules.columns is None else [raw[column] for column in rules.columns]
    if not (rules.normalise or rules.folded):
        return tuple(served)
    assert rules.mean is not None and rules.std is not None
    return tuple((score - m) / s for score, m, s in zip(served, rules.mean, rules.std, strict=True))


@torch.inference_mode()
def _outputs(
    checkpoint: RewardCheckpoint, sample: Sample, places: Sequence[int], copies: int = 1
) -> tuple[list[float], list[list[float]]]:
    """Return all outputs of the head: for the sample, and at each of the places.

    copies: of the sample in the batch; the first one's outputs are returned.
    """
    rules, row = checkpoint.rules, torch.tensor([sample.ids] * copies, device=checkpoint.model.device)
    inputs = {"input_ids": row, "attention_mask": torch.ones_like(row)}
    types = (
        {"token_type_ids": torch.tensor([sample.types] * copies, device=row.device)} if sample.types else {}
    )
    try:
        at_places, states = [], None
        if places or rules.pooling != "hf":
            inner = {**inputs, **_taken(checkpoint.trunk, types)}
            states = checkpoint.trunk(**inner).last_hidden_state[0].double()
            at_places = [_applied(rules, row) for row in _head(checkpoint, states[list(places)]).tolist()]
        if rules.pooling == "steps":
            scores = _aggregated(rules, at_places)
        elif rules.pooling == "hf":
            scores = _applied(rules, _of_own_class(checkpoint, {**inputs, **types}))
        else:
            assert states is not None
            scores = _applied(rules, _head(checkpoint, _pooled(rules, sample, states)).tolist())
    except Exception as error:  # torch raises many kinds; a stack of its frames helps nobody
        raise ConversionError(
            f"the checkpoint itself fails on a sample of {len(sample.ids)} tokens: {error}; "
            f"{_remedy(checkpoint, sample)}"
        ) from error
    if not all(map(math.isfinite, [*scores, *(value for outputs in at_places for value in outputs)])):
        raise ConversionError(
            f"the checkpoint itself scores a sample of {len(sample.ids)} tokens with {scores}, "
            "or one of its tokens with a number that is not finite"
        )
    return scores, at_places


def _remedy(checkpoint: RewardCheckpoint, sample: Sample) -> str:
    if checkpoint.output is not None and not sample.text:
        return "its code may demand what rows of random tokens have not, such as a turn: use --form text"
    return "if that is longer than its window, give a lower --max_length"


def _taken(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return those of the inputs that the model's own forward pass knows by name."""
    names = inspect.signature(model.forward).parameters
    return {name: value for name, value in inputs.items() if name in names}


def _of_own_class(checkpoint: RewardCheckpoint, inputs: dict[str, Tensor]) -> list[float]:
    """Return the outputs that the checkpoint's own class gives for one sample."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    types = _taken(checkpoint.model, {name: inputs[name] for name in inputs if name == "token_type_ids"})
    if checkpoint.output is None:
        return checkpoint.model(ids, attention_mask=mask, **types).logits[0].double().tolist()
    parameters = inspect.signature(checkpoint.model.forward).parameters.values()
    takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters)
    takes_mask = takes_all or any(each.name == "attention_mask" for each in parameters)
    masked = {"attention_mask": mask} if takes_mask else {}
    reply: Any = checkpoint.model(input_ids=ids, **masked, **types)
    where = checkpoint.output
    if where.isdecimal():
        reply = reply[int(where)]
    elif where:
        reply = reply[where] if isinstance(reply, dict) else getattr(reply, where)
    return reply.double().flatten()[: reply.numel() // len(ids)].tolist()


def _head(checkpoint: RewardCheckpoint, states: Tensor) -> Tensor:
    """Return the head's outputs [..., outputs] of states [..., width], in float64."""
    assert checkpoint.head is not None
    for number, layer in enumerate(checkpoint.head.layers):
        if number:
            states = _activated(str(checkpoint.head.activation), states)
        states = states @ layer.weight.double().T.to(states.device)
        if layer.bias is not None:
            states = states + layer.bias.double().to(states.device)
    return states


def _activated(name: str, values: Tensor) -> Tensor:
    if name == "relu":
        return values.clamp(min=0)
    if name == "gelu":
        return values * (1 + torch.erf(values / math.sqrt(2))) / 2
    if name == "silu":
        return values / (1 + torch.exp(-values))
    if name == "selu":  # Klambauer et al. 2017, equation 2
        scale, alpha = 1.0507009873554805, 1.6732632423543772
        return scale * torch.where(values > 0, values, alpha * (torch.exp(values) - 1))
    return torch.tanh(values)


def _pooled(rules: ScoringRules, sample: Sample, states: Tensor) -> Tensor:
    """Pool the states [length, width] of one sample -> [width]."""
    ids, last = list(sample.ids), len(sample.ids) - 1
    if rules.pooling == "mean":
        return states.mean(dim=0)
    if rules.pooling == "token":
        reads = [place for place, token in enumerate(ids) if token == rules.pooling_token_id]
        return states[reads[-1] if reads else last]
    place = {"cls": 0, "last_token": last}.get(rules.pooling)
    if place is None:
        place = ids.index(rules.eos_token_id) if rules.eos_token_id in ids else last
    return states[place]


def _places(checkpoint: RewardCheckpoint, sample: Sample) -> list[int]:
    """Return the tokens at which steps end, or that are scored each; only tokens that the client sent."""
    rules, ids = checkpoint.rules, sample.ids
    if rules.pooling != "steps" and rules.granularity == "sample":
        return []
    if rules.reads == "dialogues" and sample.separators is not None:
        return list(sample.separators)
    sent = [place for place, end in enumerate(sample.ends) if end is not None]
    own = sent or list(range(len(ids)))
    tokenizer = checkpoint.tokenizer
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    special |= {
        token for token, word in tokenizer.added_tokens_decoder.items()
        if word.special and token != tokenizer.unk_token_id
    }  # fmt: skip
    words = [place for place in own if ids[place] != rules.eos_token_id] or own
    if rules.granularity != "sample" and not sent:
        return words[-1:]
    if rules.granularity == "token":
        return own
    separators = sample.separators
    if separators is None:
        separators = places_of(rules.separator_ids or (rules.separator_id,), ids)
    ends = sorted({*separators} & {*own})
    rest = [place for place in own if not ends or place > ends[-1]]
    for token in {ids[place] for place in rest} - special:
        if token == tokenizer.unk_token_id or tokenizer.decode([token]).strip():
            open_step = [place for place in rest if ids[place] != rules.eos_token_id] or rest
            return [*ends, open_step[-1]]
    return ends or words[-1:]


def _aggregated(rules: ScoringRules, steps: list[list[float]]) -> list[float]:
    if rules.aggregate == "last":
        return steps[-1]
    combine: dict[str, Callable[[Any], float]] = {"min": min, "prod": math.prod, "mean": _mean}
    return [combine[str(rules.aggregate)](column) for column in zip(*steps, strict=True)]


def _applied(rules: ScoringRules, row: list[float]) -> list[float]:
    if rules.function_to_apply == "softmax":
        return _softmax(row)
    if rules.function_to_apply == "sigmoid":
        return [1 / (1 + math.exp(-value)) for value in row]
    return row


def _softmax(row: list[float]) -> list[float]:
    powers = [math.exp(value - max(row)) for value in row]
    return [power / sum(powers) for power in powers]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@contextlib.contextmanager
def in_precision(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """Let the model compute, inside the block, what it would if loaded in this precision, to the last bit.

    Layers are cast one at a time, while each runs; parameters outside of layers for the whole block.
    Afterwards the model is as before.
    """
    if all(parameter.dtype == dtype for parameter in model.parameters()):
        yield
        return
    layers = _layers(model)
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    outside = _Cast([parameter for parameter in model.parameters() if id(parameter) not in inside], dtype)
    handles = []
    for layer in layers:
        cast = _Cast(list(layer.parameters()), dtype)
        handles.append(layer.register_forward_pre_hook(cast.up))
        handles.append(layer.register_forward_hook(cast.down, always_call=True))
    buffers = _replace_buffers(model, dtype)
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
    """Casts parameters to a precision and back."""

    def __init__(self, parameters: list[nn.Parameter], dtype: torch.dtype) -> None:
        self._parameters = parameters
        self._dtype = dtype
        self._stored: list[Tensor] = []

    def up(self, *_: Any) -> None:
        """Cast to the precision."""
        self._stored = [parameter.data for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.data = parameter.data.to(self._dtype)

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


def _replace_buffers(model: PreTrainedModel, dtype: torch.dtype) -> list[tuple[nn.Module, str, Tensor]]:
    """Exchange the buffers for those of a model of this precision, and return the old ones.

    A half-precision model may have computed its tables of positions in half precision; what it stores, such
    as the statistics of a batch norm, is cast.
    """
    config = copy.deepcopy(model.config)
    config.dtype = dtype  # classes made by transformers' own generic ones build their trunk in it
    with init_empty_weights(include_buffers=False):
        fresh = dict(type(model)(config).named_buffers())
    old = []
    for path, buffer in model.named_buffers():
        parent, _, name = path.rpartition(".")
        module = model.get_submodule(parent)
        is_stored = name not in module._non_persistent_buffers_set
        if is_stored and buffer.is_floating_point():
            old.append((module, name, buffer))
            module._buffers[name] = buffer.to(dtype)
        elif not is_stored and path in fresh:
            old.append((module, name, buffer))
            module._buffers[name] = fresh[path].to(buffer.device)
    return old
