"""Decoders on rows of several samples each, none of which sees another.

Most attention is told so by a mask. Kernels for variable lengths (flash-attention's) take no such mask, but
one row of all samples, one behind the other, and where each begins.

Legend: B rows, T columns, V vocabulary. Positions count the tokens of a sample from 0, so that each 0 begins
another one.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from conch.errors import ConfigError


def packed_logits(
    lm: PreTrainedModel, input_ids: Int[Tensor, "B T"], position_ids: Int[Tensor, "B T"]
) -> Float[Tensor, "B R V"]:
    """Logits that chose each token but a row's first, R = T - 1; those of a sample's first token mean
    nothing."""
    if not attends_by_lengths(lm):
        told = attention_inputs(lm, isolating_mask(position_ids), position_ids)
        output = lm(input_ids=input_ids, position_ids=position_ids, use_cache=False, **told)
        return output.logits[:, :-1]
    ids, positions = input_ids.reshape(1, -1), position_ids.reshape(1, -1)
    told = attention_inputs(lm, None, positions)
    output = lm(input_ids=ids, position_ids=positions, use_cache=False, **told)
    return output.logits.view(*input_ids.shape, -1)[:, :-1]


def takes_positions(lm: PreTrainedModel) -> bool:
    """True for decoders that are told the position of each token."""
    return not lm.config.is_encoder_decoder and "position_ids" in inspect.signature(lm.forward).parameters


def attends_by_mask(lm: PreTrainedModel) -> bool:
    """True for attention that takes any mask over its rows."""
    return lm.config._attn_implementation in ("sdpa", "eager")


def attends_by_lengths(lm: PreTrainedModel) -> bool:
    """True for attention that takes the lengths of samples in one row instead of a mask over it, in a model
    that hands them on to it as far as its signature tells."""
    parameters = inspect.signature(lm.forward).parameters.values()
    takes_more = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)
    # Chunks of attention (Llama 4) would be counted from the row's beginning.
    in_chunks = getattr(lm.config.get_text_config(), "attention_chunk_size", None) is not None
    return is_flash_attention_requested(lm.config) and takes_more and not in_chunks


def trial_precision(lm: PreTrainedModel) -> AbstractContextManager[Any]:
    """For forward passes that are made to try a model out: flash-attention takes half precision only, also of
    weights that nothing but the training's mixed precision casts."""
    is_needed = is_flash_attention_requested(lm.config) and lm.dtype == torch.float32
    return torch.autocast(lm.device.type, torch.bfloat16, enabled=is_needed)


def attention_inputs(
    lm: PreTrainedModel, mask: Bool[Tensor, "B 1 T T"] | None, position_ids: Int[Tensor, "B T"]
) -> dict[str, Any]:
    """The arguments of a forward pass that tell which tokens see each other: a mask; or, where there is none,
    where in the single row samples begin, and the longest one's length.

    transformers would find the latter in the positions, too, but anew in each block, waiting for the GPU.
    """
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
    """Scaled dot-product attention takes a mask as it is, in any precision; the plain one adds it to its
    scores."""
    if lm.config._attn_implementation == "sdpa":
        return mask
    return torch.zeros_like(mask, dtype=lm.dtype).masked_fill(~mask, torch.finfo(lm.dtype).min)


def isolating_mask(position_ids: Int[Tensor, "B T"]) -> Bool[Tensor, "B 1 T T"]:
    """True at [b, 0, i, j] where token i may look at token j: of its own sample, and not behind it.

    Padding, each of whose positions is 0, sees itself alone: a row of nothing would make the attention NaN.
    """
    sample = (position_ids == 0).cumsum(dim=-1)
    return sharing_mask(sample, torch.zeros_like(sample))


def sharing_mask(family: Int[Tensor, "B T"], member: Int[Tensor, "B T"]) -> Bool[Tensor, "B 1 T T"]:
    """True at [b, 0, i, j] where token i may look at token j: of its own family, not behind it, and either of
    its own member or of member 0, which all members of the family begin with."""
    is_family = family.unsqueeze(-1) == family.unsqueeze(-2)
    is_seen = (member.unsqueeze(-1) == member.unsqueeze(-2)) | (member == 0).unsqueeze(-2)
    return (is_family & is_seen).tril().unsqueeze(1)


def check_packing(lm: PreTrainedModel, max_tokens: int) -> None:
    """Refuse a model that does not keep packed samples apart. Call it in evaluation mode.

    It is tried out: another first sample in a row must leave the logits of the second what they are.

    max_tokens: longest sample.

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
    """True for a model whose logits of a row's second sample do not depend on the first. It is tried out:
    architectures that remember otherwise than by attention cannot be told by their signature."""
    one, other = (torch.tensor([[first, 1, 0, 1, 0]], device=lm.device) for first in (0, 1))
    positions = torch.tensor([[0, 1, 0, 1, 2]], device=lm.device)
    with trial_precision(lm):
        seen, unseen = (packed_logits(lm, ids, positions)[:, 2:] for ids in (one, other))
    return torch.equal(seen, unseen)


def sliding_window(config: PretrainedConfig) -> int | None:
    """Tokens that the model's local attention looks back, None where all of it is global."""
    if "local" in getattr(config, "attention_layers", ()):  # GPT-Neo
        return int(config.window_size)
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None)
    is_used = layers is None or "sliding_attention" in layers
    return window if isinstance(window, int) and is_used else None
