"""Rollouts become padded tensors.

Legend: B rollouts, P prompt tokens (padded left), R response tokens (padded right), T = P + R.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from conch.types import Rollout


@dataclass(frozen=True)
class Sequences:
    """Prompts and responses as the model reads them. No mask here is derived from a token id.

    input_ids [B, T]: prompt and response. attention_mask [B, T]: True at real tokens.
    response_ids [B, R]: the last R columns of `input_ids`.
    response_mask [B, R]: True at sampled tokens, eos included.
    sampling_logprobs [B, R]: log-probs reported by the sampler, 0 at padding.
    """

    input_ids: Int[Tensor, "B T"]
    attention_mask: Bool[Tensor, "B T"]
    response_ids: Int[Tensor, "B R"]
    response_mask: Bool[Tensor, "B R"]
    sampling_logprobs: Float[Tensor, "B R"]

    @property
    def num_response(self) -> int:
        """R, the columns that hold responses."""
        return self.response_ids.shape[1]


def collate(rollouts: Sequence[Rollout], pad_token_id: int, device: torch.device | str = "cpu") -> Sequences:
    """Pad rollouts into one batch; R is at least 1, so that a batch of empty responses still has a shape."""
    prompts = torch.tensor([len(rollout.prompt.token_ids) for rollout in rollouts])
    responses = torch.tensor([len(rollout.completion.token_ids) for rollout in rollouts])
    longest_prompt, longest_response = int(prompts.max()), max(1, int(responses.max()))
    columns = torch.arange(longest_prompt + longest_response) - longest_prompt
    real = (columns >= -prompts.unsqueeze(1)) & (columns < responses.unsqueeze(1))
    ids = torch.full(real.shape, pad_token_id, dtype=torch.long)
    tokens = [token for each in rollouts for token in (*each.prompt.token_ids, *each.completion.token_ids)]
    ids[real] = torch.tensor(tokens, dtype=torch.long)
    logprobs = torch.zeros(len(rollouts), longest_response)
    known = torch.tensor([len(rollout.completion.logprobs) for rollout in rollouts])
    logprobs[torch.arange(longest_response) < known.unsqueeze(1)] = torch.tensor(
        [logprob for each in rollouts for logprob in each.completion.logprobs], dtype=torch.float32
    )
    return Sequences(
        input_ids=ids.to(device),
        attention_mask=real.to(device),
        response_ids=ids[:, longest_prompt:].to(device),
        response_mask=real[:, longest_prompt:].to(device),
        sampling_logprobs=logprobs.to(device),
    )


BatchT = TypeVar("BatchT")


def take_rows(batch: BatchT, rows: Int[Tensor, " N"]) -> BatchT:
    """The given rows of a dataclass of tensors (and of such dataclasses), as another of the same kind.

    None and numbers hold for all rows and stay.
    """
    assert is_dataclass(batch)

    def taken(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value[rows.to(value.device)]
        return take_rows(value, rows) if is_dataclass(value) else value

    return type(batch)(**{field.name: taken(getattr(batch, field.name)) for field in fields(batch)})
