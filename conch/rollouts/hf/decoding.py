"""How `transformers.generate` decodes a model's prompts right: padded together or by length, with a cache or
without.

Some architectures see padding before a prompt (RWKV, RecurrentGemma; MiniMax in cached steps alone), or mix
up the rows of a batch in what they remember between steps (RWKV of transformers 5). A trial finds that out,
and a slower way is taken.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from conch.errors import ModelError, first_line
from conch.log import get_logger
from conch.models.attention import (
    architecture_key,
    is_rounding,
    takes_left_padding,
    trial_ids,
    trial_precision,
)
from conch.models.policy import decoder_start, plain_generation

_log = get_logger(__name__)


class Decoding(NamedTuple):
    """How a model is sampled from.

    pads: True where prompts of several lengths stand in one batch.
    caches: True where keys, values or states are kept from one token to the next.
    """

    pads: bool
    caches: bool


_known: dict[str, Decoding] = {}
"""What this process has found out, by `architecture_key`."""


@torch.no_grad()
def decoding_of(lm: PreTrainedModel) -> Decoding:
    """The fastest decoding that samples from what the model's forward pass gives. Runs the model, once for an
    architecture, in evaluation mode.

    Raises:
        ModelError: transformers cannot sample from it.
    """
    key = architecture_key(lm)
    if key not in _known:
        _known[key] = _tried(lm)
    return _known[key]


def _tried(lm: PreTrainedModel) -> Decoding:
    pads, name = takes_left_padding(lm), type(lm).__name__
    paddings = [True, False] if pads else [False]
    ways = [Decoding(padded, cached) for padded in paddings for cached in (True, False)]
    failures: list[Exception] = []
    way = next((way for way in ways if _is_right(lm, way, failures)), None)
    if way is None and len(failures) == len(ways):
        raise ModelError(
            f"{name} cannot be trained by sampling: transformers fails to generate from it "
            f"({type(failures[0]).__name__}: {first_line(failures[0])}); take another architecture, or train "
            "it by SFT without evaluation prompts"
        ) from failures[0]
    if way is None:
        _log.warning(
            "transformers samples %s from other probabilities than its forward pass gives: watch "
            "`rollout/logprob_diff`",
            name,
        )
        return Decoding(pads, True)
    if not way.caches:
        _log.warning("%s is sampled without a cache, which is slow: its cached steps are wrong", name)
    if not way.pads:
        _log.warning("%s sees padding: prompts of one length are sampled together, others apart", name)
    return way


def _is_right(lm: PreTrainedModel, way: Decoding, failures: list[Exception]) -> bool:
    """Whether logits of sampling are those of forward passes. failures: gets what transformers raises."""
    # Single tokens come last: before them some architectures do not forget what they remember of a batch.
    prompts = [ids.view(2, -1).to(lm.device) for ids in trial_ids(lm, (4, 2))]
    with trial_precision(lm), plain_generation(lm):
        try:
            sampled = [_sampled(lm, ids, torch.ones_like(ids), way) for ids in prompts]
            sequences = [ids for ids, _ in sampled]
            expected = [_expected(lm, *pair) for pair in zip(prompts, sequences, strict=True)]
            if way.pads and not lm.config.is_encoder_decoder:
                padded, alone = _padded(lm, way)
                sampled.append(padded)
                expected.append(alone)
        except Exception as error:  # an architecture's own code may fail in any way
            failures.append(error)
            return False
    return all(is_rounding(logits, each) for (_, logits), each in zip(sampled, expected, strict=True))


def _padded(
    lm: PreTrainedModel, way: Decoding
) -> tuple[tuple[Int[Tensor, "1 T"], Float[Tensor, "1 R V"]], Float[Tensor, "1 R V"]]:
    """What is sampled behind a prompt that is padded beside a longer one; and the logits of it alone."""
    short, long = (ids.view(1, -1).to(lm.device) for ids in trial_ids(lm, (2, 5)))
    filled = torch.cat([long[:, : long.shape[1] - short.shape[1]], short], dim=1)
    prompts = torch.cat([filled, long])
    mask = torch.ones_like(prompts)
    mask[0, : long.shape[1] - short.shape[1]] = 0
    sequences, logits = _sampled(lm, prompts, mask, way)
    own = sequences[:1, long.shape[1] - short.shape[1] :]
    return (own, logits[:1]), _expected(lm, short, own)


def _sampled(
    lm: PreTrainedModel, prompts: Int[Tensor, "B P"], mask: Int[Tensor, "B P"], way: Decoding
) -> tuple[Int[Tensor, "B T"], Float[Tensor, "B R V"]]:
    """Sequences with three new tokens, and the logits that these were taken from.

    mask: 0 at padding.
    """
    start = {"decoder_input_ids": decoder_start(lm, len(prompts))} if lm.config.is_encoder_decoder else {}
    output = lm.generate(  # pyright: ignore[reportCallIssue]  typed as a Tensor attribute
        prompts,
        attention_mask=mask,
        max_new_tokens=3,
        do_sample=False,
        use_cache=way.caches,
        output_logits=True,
        return_dict_in_generate=True,
        **start,
    )
    return output.sequences, torch.stack(output.logits, dim=1)


def _expected(
    lm: PreTrainedModel, prompts: Int[Tensor, "B P"], sequences: Int[Tensor, "B T"]
) -> Float[Tensor, "B R V"]:
    """Logits of the last three tokens by one forward pass."""
    inputs = {"input_ids": sequences}
    if lm.config.is_encoder_decoder:
        inputs = {"input_ids": prompts, "decoder_input_ids": sequences}
    return lm(**inputs, use_cache=False).logits[:, -4:-1]
