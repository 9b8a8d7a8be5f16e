"""Packed rows: several samples in a row, none of which sees another.

Most attention takes a mask for that. Kernels for variable lengths (flash-attention's) take no such mask, but
one row of all samples, one behind the other, and the column where each begins.

Legend: B rows, T columns, V vocabulary. Position ids count the tokens of a sample from 0: each 0 begins a
sample.
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
    """Logits that chose each token but a row's first: R = T - 1.

    Those of a sample's first token mean nothing.
    """
    if not attends_by_lengths(lm):
        attention = attention_inputs(lm, isolating_mask(position_ids), position_ids)
        output = lm(input_ids=input_ids, position_ids=position_ids, use_cache=False, **attention)
        return output.logits[:, :-1]
    ids, positions = input_ids.reshape(1, -1), position_ids.reshape(1, -1)
    attention = attention_inputs(lm, None, positions)
    output = lm(input_ids=ids, position_ids=positions, use_cache=False, **attention)
    return output.logits.view(*input_ids.shape, -1)[:, :-1]


def takes_positions(lm: PreTrainedModel) -> bool:
    """True for decoders that take the position of each token as an argument."""
    return not lm.config.is_encoder_decoder and "position_ids" in inspect.signature(lm.forward).parameters


def attends_by_mask(lm: PreTrainedModel) -> bool:
    """True for attention that takes any [B, 1, T, T] mask."""
    return lm.config._attn_implementation in ("sdpa", "eager")


def attends_by_lengths(lm: PreTrainedModel) -> bool:
    """True for attention that takes the lengths of the samples in one row instead of a mask.

    The model must pass them on to it, which is judged by its signature.
    """
    parameters = inspect.signature(lm.forward).parameters.values()
    takes_keywords = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)
    # Chunks of attention (Llama 4) would be counted from the row's beginning.
    in_chunks = getattr(lm.config.get_text_config(), "attention_chunk_size", None) is not None
    return is_flash_attention_requested(lm.config) and takes_keywords and not in_chunks


def trial_precision(lm: PreTrainedModel) -> AbstractContextManager[Any]:
    """Autocast for forward passes that only try a model out.

    Flash-attention takes half precision only, also of float32 weights that the training's mixed precision
    casts later.
    """
    is_needed = is_flash_attention_requested(lm.config) and lm.dtype == torch.float32
    return torch.autocast(lm.device.type, torch.bfloat16, enabled=is_needed)


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
    """True for a model whose logits of a row's second sample do not depend on the first.

    Runs the model: its signature does not tell whether it remembers tokens otherwise than by attention.
    """
    one, other = (torch.tensor([[first, 1, 0, 1, 0]], device=lm.device) for first in (0, 1))
    positions = torch.tensor([[0, 1, 0, 1, 2]], device=lm.device)
    with trial_precision(lm):
        first, second = (packed_logits(lm, ids, positions)[:, 2:] for ids in (one, other))
    return torch.equal(first, second)


def sliding_window(config: PretrainedConfig) -> int | None:
    """Tokens that the model's local attention looks back; None where all attention is global."""
    if "local" in getattr(config, "attention_layers", ()):  # GPT-Neo
        return int(config.window_size)
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None)
    is_used = layers is None or "sliding_attention" in layers
    return window if isinstance(window, int) and is_used else None
