"""How long the samples may be on which a conversion compares scores."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

WINDOW_COMPARED = 2048
"""Tokens. Scores of samples up to this length are compared whatever that takes."""

_BUDGET = 3e11
"""Floating-point operations for all longer samples: seconds of a small model on two cores."""

# The original and the served model each score a long sample once.
_PASSES = 2
# Of one entry of one head's matrix of attention, beside the two products: mask, softmax, memory.
_PER_ENTRY = 40
_ALL_LENGTHS_UP_TO = 16
_STEP = 1.6


def ladder(limit: int) -> list[int]:
    """Return every length up to 16, a ladder with a factor of about 1.6, and the last two up to the limit."""
    lengths = set(range(1, min(limit, _ALL_LENGTHS_UP_TO) + 1)) | {max(1, limit - 1), limit}
    step = float(_ALL_LENGTHS_UP_TO)
    while step < limit:
        lengths.add(int(step))
        step *= _STEP
    return sorted(lengths)


def longest_compared(model: PreTrainedModel, limit: int) -> int:
    """Return the tokens of the longest sample on which scores are compared; the same for equal models.

    limit: tokens that a sample may have.
    """
    affordable = WINDOW_COMPARED
    for length in [*ladder(limit), limit]:
        if length > affordable and _cost(model, _above(ladder(length))) <= _BUDGET:
            affordable = length
    return min(limit, affordable)


def _above(lengths: Sequence[int]) -> list[int]:
    return [length for length in lengths if length > WINDOW_COMPARED]


def _cost(model: PreTrainedModel, lengths: Sequence[int]) -> float:
    """Estimate the floating-point operations of the comparison on one sample of each length."""
    config = model.config.get_text_config()
    embeddings = model.get_input_embeddings()
    embedded = 0 if embeddings is None else sum(each.numel() for each in embeddings.parameters())
    parameters = sum(each.numel() for each in model.parameters()) - embedded
    layers, width = getattr(config, "num_hidden_layers", 1), getattr(config, "hidden_size", 1)
    heads = getattr(config, "num_attention_heads", None) or 1
    per_entry = layers * (4 * width + _PER_ENTRY * heads)
    return _PASSES * sum(2.0 * parameters * length + per_entry * length**2 for length in lengths)
