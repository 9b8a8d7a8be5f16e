"""Packed rows: several samples in a row, none of which sees another.

Most attention takes a mask for that. Kernels for variable lengths (flash-attention's) take no such mask, but
one row of all samples, one behind the other, and the column where each begins.

Legend: B rows, T columns, V vocabulary. Position ids count the tokens of a sample from 0: each 0 begins a
sample.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from conch.errors import ConfigError, first_line
from conch.log import get_logger
from conch.models.adapter import has_adapter
from conch.models.loading import first_position
from conch.ops import position_ids

_log = get_logger(__name__)


def packed_logits(
    lm: PreTrainedModel, input_ids: Int[Tensor, "B T"], position_ids: Int[Tensor, "B T"]
) -> Float[Tensor, "B R V"]:
    """Logits that chose each token but a row's first: R = T - 1.

    Those of a sample's first token mean nothing.
    """
    if not attends_by_lengths(lm):
        attention = attention_inputs(lm, isolating_mask(position_ids), position_ids)
        places = model_positions(lm, position_ids)
        output = lm(input_ids=input_ids, position_ids=places, use_cache=False, **attention)
        return output.logits[:, :-1]
    ids, positions = input_ids.reshape(1, -1), position_ids.reshape(1, -1)
    attention = attention_inputs(lm, None, positions)
    places = model_positions(lm, positions)
    output = lm(input_ids=ids, position_ids=places, use_cache=False, **attention)
    return output.logits.view(*input_ids.shape, -1)[:, :-1]


def takes_positions(lm: PreTrainedModel) -> bool:
    """True for decoders that take the position of each token as an argument."""
    return not lm.config.is_encoder_decoder and "position_ids" in inspect.signature(lm.forward).parameters


def model_positions(lm: PreTrainedModel, position_ids: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Position ids as the model counts them, from those that count from 0."""
    return position_ids + first_position(lm.config)


def attends_by_mask(lm: PreTrainedModel) -> bool:
    """True for attention that takes any [B, 1, T, T] mask."""
    return lm.config._attn_implementation in ("sdpa", "eager")


def attends_by_lengths(lm: PreTrainedModel) -> bool:
    """True for attention that takes the lengths of the samples in one row instead of a mask.

    The model must pass them on to it, which is judged by its signature.
    """
    parameters = inspect.signature(lm.forward).parameters.values()
    takes_keywords = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)
    # Chunks of attention would be counted from the row's beginning.
    in_chunks = _attention_chunk(lm.config.get_text_config()) is not None
    return is_flash_attention_requested(lm.config) and takes_keywords and not in_chunks


def trial_precision(lm: PreTrainedModel) -> AbstractContextManager[Any]:
    """Autocast for forward passes that only try a model out, before the training's mixed precision casts.

    Flash-attention takes half precision only, also of float32 weights; parts in several precisions (a float32
    head on a half-precision trunk) meet in the half one.
    """
    dtypes = {parameter.dtype for parameter in lm.parameters() if parameter.is_floating_point()}
    half = next((each for each in (torch.bfloat16, torch.float16) if each in dtypes), torch.bfloat16)
    only_half = is_flash_attention_requested(lm.config) and lm.dtype == torch.float32
    return torch.autocast(lm.device.type, half, enabled=only_half or (len(dtypes) > 1 and half in dtypes))


def attention_inputs(
    lm: PreTrainedModel, mask: Bool[Tensor, "B 1 T T"] | None, position_ids: Int[Tensor, "B T"]
) -> dict[str, Any]:
    """Arguments of a forward pass that say which tokens see each other.

    mask: True where a token sees another. None for one row of attention that takes lengths: the arguments are
        then the columns where samples begin, and the length of the longest.
    position_ids: of one row where there is no mask.
    """
    # transformers finds the lengths in the position ids, too, but in each block again, waiting for the GPU.
    if mask is not None:
        return {"attention_mask": as_attention_takes_it(lm, mask)}
    begins = (position_ids.flatten() == 0).nonzero().flatten()
    bounds = nn.functional.pad(begins, (0, 1), value=position_ids.numel()).to(torch.int32)
    longest = int(position_ids.max()) + 1
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def as_attention_takes_it(lm: PreTrainedModel, mask: Bool[Tensor, "B 1 S T"]) -> Tensor:
    """The mask as the model's attention takes it: bool for sdpa, else numbers to add to its scores."""
    if lm.config._attn_implementation == "sdpa":
        return mask
    return torch.zeros_like(mask, dtype=lm.dtype).masked_fill(~mask, torch.finfo(lm.dtype).min)


def isolating_mask(position_ids: Int[Tensor, "B T"]) -> Bool[Tensor, "B 1 T T"]:
    """True at [b, 0, i, j] where token i sees token j: j is of the same sample, and not behind i.

    Padding has position 0 everywhere, and each padding token sees itself: a token that sees nothing would
    become NaN.
    """
    sample = (position_ids == 0).cumsum(dim=-1)
    return sharing_mask(sample, torch.zeros_like(sample))


def sharing_mask(family: Int[Tensor, "B T"], member: Int[Tensor, "B T"]) -> Bool[Tensor, "B 1 T T"]:
    """True at [b, 0, i, j] where token i sees token j, for samples that share a prompt.

    j is of the same family, not behind i, and either of the same member or of member 0, the shared prompt.

    family: number of a prompt and its responses.
    member: 0 for the prompt, else the number of the response.
    """
    same_family = family.unsqueeze(-1) == family.unsqueeze(-2)
    same_member = (member.unsqueeze(-1) == member.unsqueeze(-2)) | (member == 0).unsqueeze(-2)
    return (same_family & same_member).tril().unsqueeze(1)


def check_packing(lm: PreTrainedModel, max_tokens: int) -> None:
    """Refuse a model that does not keep packed samples apart. Call it in evaluation mode.

    max_tokens: tokens of the longest sample.

    Raises:
        ConfigError: samples see each other, or a sliding window would be lost.
    """
    name = type(lm).__name__
    if not takes_positions(lm):
        raise ConfigError(
            f"`sft.packing` is for decoders that take position ids, {name} does not: turn it off"
        )
    window = None if attends_by_lengths(lm) else sliding_window(lm.config)
    if window is not None and window < max_tokens:
        raise ConfigError(
            f"`sft.packing` replaces the attention mask, in which {name} keeps a sliding window of {window} "
            f"tokens, and samples may have {max_tokens}: set `sft.max_length` to at most {window}"
        )
    if not attends_by_mask(lm) and not attends_by_lengths(lm):
        raise ConfigError(
            "`sft.packing` needs attention that takes a mask or lengths, not "
            f"{lm.config._attn_implementation!r}: set `model.attention=sdpa`"
        )
    if not keeps_apart(lm):
        raise ConfigError(
            f"`sft.packing` is not possible: {name} looks from one sample at another; turn it off"
        )


@torch.no_grad()
def keeps_apart(lm: PreTrainedModel) -> bool:
    """True for a model to which each sample of a row is as if it stood alone. Call it in evaluation mode.

    Runs the model: its signature does not tell whether it remembers tokens otherwise than by attention, nor
    whether it takes the mask.
    """
    ids = [each.to(lm.device) for each in trial_ids(lm, (2, 1, 1, 3, 2, 1, 1))]
    (prompt, one, other, apart), swaps = ids[:4], ids[4:]
    samples = [torch.cat(parts, dim=1) for parts in ((prompt, one), (prompt, other), (apart,))]
    logits_of = _logits_of_one_row if attends_by_lengths(lm) else _logits_of_shared_row
    with trial_precision(lm):
        try:
            packed = logits_of(lm, prompt, one, other, apart)
            swapped = logits_of(lm, *swaps, apart)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever an architecture makes of a mask that it does not know
            _log.debug("%s takes no packed rows: %s", type(lm).__name__, first_line(error))
            return False
        alone = lm(input_ids=torch.cat(samples), use_cache=False).logits
    pairs = zip(packed, alone, strict=True)
    return all(is_rounding(*pair) for pair in pairs) and is_rounding(swapped[2], packed[2], same_shape=True)


def _logits_of_one_row(lm: PreTrainedModel, prompt: Tensor, *others: Tensor) -> list[Float[Tensor, "3 V"]]:
    """Logits of three samples in one row, two of which begin with the prompt [1, 2]; see `keeps_apart`."""
    one, other, apart = others
    ids = torch.cat([prompt, one, prompt, other, apart], dim=1)
    positions = torch.tensor([[0, 1, 2] * 3], device=lm.device)
    attention = attention_inputs(lm, None, positions)
    places = model_positions(lm, positions)
    logits = lm(input_ids=ids, position_ids=places, use_cache=False, **attention).logits[0]
    return [*logits.split(3)]


def _logits_of_shared_row(lm: PreTrainedModel, prompt: Tensor, *others: Tensor) -> list[Float[Tensor, "3 V"]]:
    """As `_logits_of_one_row`, where two samples share the columns of the prompt."""
    ids = torch.cat([prompt, *others], dim=1)
    family = torch.tensor([[0] * 4 + [1] * 3], device=lm.device)
    member = torch.tensor([[0, 0, 1, 2, 0, 0, 0]], device=lm.device)
    positions = torch.tensor([[0, 1, 2, 2, 0, 1, 2]], device=lm.device)
    attention = attention_inputs(lm, sharing_mask(family, member), positions)
    places = model_positions(lm, positions)
    logits = lm(input_ids=ids, position_ids=places, use_cache=False, **attention).logits[0]
    return [logits[:3], logits[[0, 1, 3]], logits[4:]]


@torch.no_grad()
def takes_left_padding(lm: PreTrainedModel) -> bool:
    """True for a model to which padding before a prompt is as if it were not there.

    It is padded as `transformers.generate` does, under a mask and with position ids where the model takes
    them. Prompts of encoder-decoders are padded behind. Runs the model.
    """
    if lm.config.is_encoder_decoder:
        return True
    was_training = lm.training
    lm.eval()
    pads, other_pads, prompt = (ids.to(lm.device) for ids in trial_ids(lm, (2, 2, 3)))
    try:
        with trial_precision(lm):
            padded, other = (_left_padded_logits(lm, each, prompt) for each in (pads, other_pads))
            alone = lm(input_ids=prompt, use_cache=False).logits
    finally:
        lm.train(was_training)
    return is_rounding(padded, alone) and is_rounding(other, padded, same_shape=True)


def _left_padded_logits(lm: PreTrainedModel, pads: Tensor, prompt: Tensor) -> Float[Tensor, "1 L V"]:
    ids = torch.cat([pads, prompt], dim=1)
    mask = torch.ones_like(ids)
    mask[:, : pads.shape[1]] = 0
    places = {"position_ids": position_ids(mask)} if takes_positions(lm) else {}
    return lm(input_ids=ids, attention_mask=mask, use_cache=False, **places).logits[:, pads.shape[1] :]


def trial_ids(lm: PreTrainedModel, lengths: Sequence[int]) -> list[Int[Tensor, "1 L"]]:
    """Samples of these lengths to try a model with: of tokens that differ as long as the vocabulary has them,
    and none that the config names as special where there are ten others."""
    config = lm.config.get_text_config()
    named = [getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")]
    special = {token for each in named for token in (each if isinstance(each, list) else [each])}
    size = int(config.vocab_size)
    known = [token for token in range(min(size, 64)) if token not in special]
    known = known if len(known) >= 10 else list(range(size))
    ids = torch.tensor([known[place % len(known)] for place in range(sum(lengths))])
    return [part.unsqueeze(0) for part in ids.split(list(lengths))]


_HALF = {torch.bfloat16: 0.25, torch.float16: 0.05}
"""Nats that rounding explains in half precision, where shapes and with them kernels differ. bfloat16 rounds
logits between 16 and 32 by up to 0.06, and so do layers on the way; float16 has three bits more."""

_HALF_SAME_SHAPE = 0.02
"""The same where shapes are equal: only experts then compute in other groups."""


def is_rounding(
    outputs: Float[Tensor, "*S V"], expected: Float[Tensor, "*S V"], *, same_shape: bool = False
) -> bool:
    """True where `logprob_gap` is no more than rounding explains.

    same_shape: True where both come from inputs of one shape.
    """
    return logprob_gap(outputs, expected) <= rounding_bound(expected.dtype, same_shape=same_shape)


def rounding_bound(dtype: torch.dtype, *, same_shape: bool = False) -> float:
    """Nats that rounding explains; in float32 that of a deep model's logits. A fault makes 0.01 and more."""
    return _HALF_SAME_SHAPE if dtype in _HALF and same_shape else _HALF.get(dtype, 1e-4)


def logprob_gap(logits: Float[Tensor, "*S V"], expected: Float[Tensor, "*S V"]) -> float:
    """Distance in nats of two distributions: the mean over the vocabulary of their log-probs' difference, in
    the state where that is largest."""
    gap = (logits.double().log_softmax(dim=-1) - expected.double().log_softmax(dim=-1)).abs()
    return float(gap.nan_to_num(0.0).mean(dim=-1).max())  # -inf less -inf: a token that never comes


def sliding_window(config: PretrainedConfig) -> int | None:
    """Tokens that the model's local attention looks back, or a chunk of them that attends to itself alone;
    None where all attention is global."""
    config = config.get_text_config()
    if "local" in getattr(config, "attention_layers", ()):  # GPT-Neo
        return int(config.window_size)
    chunk = _attention_chunk(config)
    if chunk is not None:
        return chunk
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None)
    is_used = layers is None or "sliding_attention" in layers
    return window if isinstance(window, int) and is_used else None


def _attention_chunk(config: PretrainedConfig) -> int | None:
    """Tokens of a chunk of attention (Llama 4); None where attention is not cut."""
    chunk = getattr(config, "attention_chunk_size", None)
    layers = getattr(config, "layer_types", None)
    is_used = layers is None or "chunked_attention" in layers
    return chunk if isinstance(chunk, int) and is_used else None


def architecture_key(model: PreTrainedModel, *more: object) -> str:
    """Hash of what a model computes, but for its weights: its config, precision, device and attention.

    more: whatever else matters, and has a `repr` of its own.
    """
    settings = model.config.to_json_string(use_diff=False)
    facts = (
        type(model).__name__,
        settings,
        model.dtype,
        model.device.type,
        model.config._attn_implementation,
    )
    return hashlib.sha256(repr((*facts, has_adapter(model), *more)).encode()).hexdigest()
