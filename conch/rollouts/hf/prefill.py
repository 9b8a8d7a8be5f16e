"""Which prompts are prefilled in one forward pass, and how they are padded there.

Prompts of one pass are padded to the longest of them, and padding is computed as tokens are: half of all that
prompts of Helpful & Harmless would take in one pass. So prompts of like length share a pass.

Legend: B prompts, W columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

_CORE_PASS_TOKENS = 32
"""What a pass costs one core beside its tokens, in tokens: it calls each layer and reads all weights.

Measured are 21 to 32, on GPT-2 shapes of 2 to 124 million weights in float32. More cores compute tokens
faster and call layers no faster: on two it was 49.
"""

_GPU_PASS_TOKENS = 4096
"""The same of a GPU, which computes thousands of tokens of a small model while a pass is launched, ten
milliseconds and more. Of a large model it computes fewer, and some padding stays that could go.
"""


def pass_cost(device: torch.device) -> int:
    """What one more forward pass costs beside its tokens, in tokens that are computed in that time."""
    if device.type == "cpu":
        return _CORE_PASS_TOKENS * torch.get_num_threads()
    return _GPU_PASS_TOKENS


def prefill_passes(lengths: Sequence[int], cost: int) -> list[list[int]]:
    """Split prompts into passes of like length, as long as one more pass saves more padding than it costs.

    lengths: tokens of each prompt.
    cost: of one more pass, in tokens.

    Returns:
        The indices of the prompts of each pass, the longest prompts first.
    """
    by_length = sorted(range(len(lengths)), key=lambda index: lengths[index])
    unsplit, passes = [by_length] if by_length else [], []
    while unsplit:
        together = unsplit.pop()
        longest = lengths[together[-1]]
        # Padding that is saved where the first `count` prompts have a pass of their own.
        saved = [count * (longest - lengths[together[count - 1]]) for count in range(1, len(together))]
        most = max(saved, default=0)
        if most > cost:
            count = 1 + saved.index(most)
            unsplit += [together[:count], together[count:]]
        else:
            passes.append(sorted(together))
    return passes


def pad_left(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Int[Tensor, "B W"], Bool[Tensor, "B W"]]:
    """Token ids padded on the left, and a mask that is True at real tokens."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (longest - len(row)) + list(row) for row in rows])
    lengths = torch.tensor([[len(row)] for row in rows])
    return ids.to(device), (torch.arange(longest) >= longest - lengths).to(device)
