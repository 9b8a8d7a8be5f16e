"""A trial of a model before a run: what every trainer takes for granted is true of this architecture.

A padded sample scores as it does alone, no token sees later ones, passes in training mode equal those in
evaluation mode, and a completion can end. Whether packed rows are as good as samples apart,
`conch.models.attention.keeps_apart` finds out, and what packs rows pads them where they are not.

The trial is of an architecture, not of its weights: a process tries each configuration once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from conch.config import ModelConfig
from conch.errors import ModelError
from conch.log import get_logger
from conch.models.attention import architecture_key, logprob_gap, rounding_bound, trial_ids, trial_precision
from conch.models.forward import ForwardInputs
from conch.models.policy import decoder_start, response_logits

_log = get_logger(__name__)

_OFF = "`model.trial=false` leaves this check out"

_passed: set[str] = set()
"""What this process has tried and found right."""

Outputs = Float[Tensor, "..."]


@dataclass(frozen=True)
class _Passes:
    """A model's outputs for two samples.

    alone: each by itself, in evaluation mode.
    padded: the same in one batch; what stands at padding is one of the samples' tokens.
    repadded: the same with another token at padding.
    training: the first sample by itself, twice, in training mode.
    """

    alone: list[Outputs]
    padded: list[Outputs]
    repadded: list[Outputs]
    training: list[Outputs]


def check_language_model(lm: PreTrainedModel, config: ModelConfig, end_ids: Sequence[int]) -> None:
    """Try out a policy. Call it with `lm` on its device, before it is wrapped.

    end_ids: tokens that end a completion.

    Raises:
        ModelError: says what is wrong, by how much, and what to do.
    """
    key = _key(lm, config, end_ids)
    if not config.trial or key in _passed:
        return
    if getattr(lm.config, "moe_eval_capacity_token_fraction", None) is not None:
        raise ModelError(
            f"{type(lm).__name__} leaves tokens out of experts that are full, in training by another measure "
            f"than in evaluation, so that log-probs depend on the batch: take another architecture ({_OFF})"
        )
    first, second, *responses = trial_ids(lm, (1, 3, 2, 2))
    samples = [(first, responses[0]), (second, responses[1])]
    tokens = [int(ids[0, 0]) for ids in (first, second)]
    with _trying(lm):
        alone = [_logits_alone(lm, *sample) for sample in samples]
        shortened = _logits_alone(lm, second, responses[1][:, :1])
        padded, repadded = (response_logits(lm, _padded(lm, samples, token)) for token in tokens)
        lm.train()
        training = [_logits_alone(lm, *samples[0]) for _ in range(2)]
    passes = _Passes(alone, _cut(padded, alone), _cut(repadded, alone), training)
    _check(lm, config, passes, logprob_gap, "nats")
    _check_causal(lm, shortened, alone[1][:1])
    _check_end_ids(lm, alone[0], end_ids)
    _passed.add(key)


def check_classifier(model: PreTrainedModel, config: ModelConfig) -> None:
    """Try out a reward model. Call it with `model` on its device, before it is wrapped.

    Raises:
        ModelError: says what is wrong, by how much, and what to do.
    """
    key = _key(model, config, ())
    if not config.trial or key in _passed:
        return
    texts = trial_ids(model, (2, 4))
    with _trying(model):
        alone = [_scores(model, [text]) for text in texts]
        padded = [*_scores(model, texts).split(1)]
        model.train()
        training = [_scores(model, texts[:1]) for _ in range(2)]
    # A classifier finds a text's end by the pad token: no other may stand there.
    _check(model, config, _Passes(alone, padded, padded, training), _score_gap, "points")
    _passed.add(key)


# ----------------------------------------------------------------------------------------------------- checks


def _check(
    model: PreTrainedModel,
    config: ModelConfig,
    passes: _Passes,
    gap_of: Callable[[Outputs, Outputs], float],
    unit: str,
) -> None:
    name, dtype = type(model).__name__, passes.alone[0].dtype
    if any(output.isnan().any() for output in passes.alone):
        raise ModelError(
            f"{name} gives NaN for a few tokens in {str(dtype).removeprefix('torch.')}: set `model.dtype` to "
            f"bfloat16 or float32, or look for damaged weights ({_OFF})"
        )
    agree = rounding_bound(dtype)
    same = rounding_bound(dtype, same_shape=True)
    gap = max(map(gap_of, passes.padded, passes.alone))
    leak = max(map(gap_of, passes.repadded, passes.padded))
    if gap > agree or leak > same:
        raise ModelError(
            f"{name} scores a padded sample otherwise than it does alone, by {max(gap, leak):.2g} {unit}, "
            "and would learn something else in each batch: take an architecture that does not see padding "
            f"({_OFF})"
        )
    if not config.disable_dropout:
        return
    first, second = passes.training
    noise, shift = gap_of(first, second), gap_of(first, passes.alone[0])
    if max(noise, shift) > same:
        what = f"two passes differ by {noise:.2g}" if noise > same else f"a pass is off by {shift:.2g}"
        raise ModelError(
            f"{name} computes something else in training than in evaluation ({what} {unit}), so that "
            "what is sampled would not be what is trained: set its noise to 0 in config.json or "
            f"`model.architecture`, or keep it by `model.disable_dropout=false` ({_OFF})"
        )


def _check_causal(lm: PreTrainedModel, before: Outputs, after: Outputs) -> None:
    """before, after: logits of a token without and with one behind it."""
    gap = logprob_gap(before, after)
    if gap > rounding_bound(before.dtype):
        raise ModelError(
            f"{type(lm).__name__} lets tokens see later tokens: log-probs move by {gap:.2g} nats when one is "
            "added, so that it would learn to copy what it is to predict; take a causal language model (for "
            f"BERT and its kin `is_decoder: true` in config.json, for XLM `causal: true`; {_OFF})"
        )


def _check_end_ids(lm: PreTrainedModel, logits: Float[Tensor, "R V"], end_ids: Sequence[int]) -> None:
    size = logits.shape[-1]
    lost = [each for each in end_ids if each >= size or bool(logits[..., each].isneginf().all())]
    if not lost:
        return
    message = f"{type(lm).__name__} cannot choose {lost} to end a text: its output has {size} tokens"
    if len(lost) == len(end_ids):
        raise ModelError(f"{message}, and no completion would end; take the model's own tokenizer ({_OFF})")
    _log.warning("%s; others of %s end completions", message, [*end_ids])


# ----------------------------------------------------------------------------------------------------- passes


def _logits_alone(lm: PreTrainedModel, prompt: Tensor, response: Tensor) -> Float[Tensor, "R V"]:
    """Logits of a response's tokens as the architecture itself gives them, without mask and positions."""
    prompt, response = prompt.to(lm.device), response.to(lm.device)
    if lm.config.is_encoder_decoder:
        start = decoder_start(lm, 1)
        decoded = torch.cat([start, response[:, :-1]], dim=1)
        output = lm(input_ids=prompt, decoder_input_ids=decoded, use_cache=False)
        return output.logits[0, start.shape[1] - 1 :]
    output = lm(input_ids=torch.cat([prompt, response], dim=1), use_cache=False)
    return output.logits[0, prompt.shape[1] - 1 : -1]


def _padded(lm: PreTrainedModel, samples: Sequence[tuple[Tensor, Tensor]], padding: int) -> ForwardInputs:
    """The samples in one batch, prompts padded left and responses right."""
    num_prompt = max(prompt.shape[1] for prompt, _ in samples)
    num_response = max(response.shape[1] for _, response in samples)
    ids = torch.full((len(samples), num_prompt + num_response), padding)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, response) in enumerate(samples):
        place = slice(num_prompt - prompt.shape[1], num_prompt + response.shape[1])
        ids[row, place], mask[row, place] = torch.cat([prompt, response], dim=1)[0], True
    return ForwardInputs(ids.to(lm.device), mask.to(lm.device), num_response)


def _cut(padded: Float[Tensor, "B R V"], alone: Sequence[Outputs]) -> list[Outputs]:
    return [row[: len(expected)] for row, expected in zip(padded, alone, strict=True)]


def _scores(model: PreTrainedModel, texts: Sequence[Tensor]) -> Float[Tensor, "B K"]:
    """Scores of texts [1, T] in one batch, padded right."""
    width = max(text.shape[1] for text in texts)
    ids = torch.full((len(texts), width), int(model.config.get_text_config().pad_token_id))
    for row, text in zip(ids, texts, strict=True):
        row[: text.shape[1]] = text[0]
    mask = torch.arange(width) < torch.tensor([[text.shape[1]] for text in texts])
    return model(input_ids=ids.to(model.device), attention_mask=mask.long().to(model.device)).logits


def _score_gap(scores: Outputs, expected: Outputs) -> float:
    return float((scores - expected).abs().max())


@contextmanager
def _trying(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradient; random generators and mode are as before when it ends."""
    was_training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.no_grad(), trial_precision(model), torch.random.fork_rng(devices):
            model.eval()
            yield
    finally:
        model.train(was_training)


def _key(model: PreTrainedModel, config: ModelConfig, end_ids: Sequence[int]) -> str:
    return architecture_key(model, config.disable_dropout, config.gradient_checkpointing, *end_ids)
