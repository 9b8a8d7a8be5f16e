"""A decoder with a value head on its trunk.

Legend: B sequences, T tokens (prompt padded left, response padded right), R response positions (the last R of
T), V vocabulary, D hidden size. Position r of an output always speaks of response token r and is read at the
token before it: the state in which that token was chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from conch.errors import ModelError
from conch.ops import at_least_float32, position_ids


@dataclass(frozen=True)
class PolicyOutput:
    """logits: [B, R, V], of each response token given all before it. values: [B, R], float32."""

    logits: Float[Tensor, "B R V"]
    values: Float[Tensor, "B R"]


class ValueHead(nn.Module):
    """Two-layer perceptron whose last layer starts at zero, so that every first value is exactly 0."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(hidden_size, 2 * hidden_size)
        self.out = nn.Linear(2 * hidden_size, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, states: Float[Tensor, "B R D"]) -> Float[Tensor, "B R"]:
        """One value per state, in float32."""
        values = self.out(torch.relu(self.hidden(states.to(self.hidden.weight.dtype)))).squeeze(-1)
        return at_least_float32(values)


class PolicyWithValue(nn.Module):
    """The one trained module of PPO: language model and value head on a shared trunk."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm
        self.value_head = ValueHead(lm.config.get_text_config().hidden_size)

    def forward(
        self, input_ids: Int[Tensor, "B T"], attention_mask: Bool[Tensor, "B T"], num_response: int
    ) -> PolicyOutput:
        """Logits and values of the last `num_response` positions.

        attention_mask: True at real tokens, False at padding on either side.
        """
        logits, states = response_logits_and_states(self.lm, input_ids, attention_mask, num_response)
        return PolicyOutput(logits, self.value_head(states))


def response_logits(
    lm: PreTrainedModel, input_ids: Int[Tensor, "B T"], attention_mask: Bool[Tensor, "B T"], num_response: int
) -> Float[Tensor, "B R V"]:
    """Logits that chose each of the last `num_response` tokens; the head runs on those positions only."""
    output = lm(
        input_ids=input_ids,
        attention_mask=attention_mask.long(),
        position_ids=position_ids(attention_mask),
        logits_to_keep=num_response + 1,
        use_cache=False,
    )
    return output.logits[:, -num_response - 1 : -1]


def response_logits_and_states(
    lm: PreTrainedModel, input_ids: Int[Tensor, "B T"], attention_mask: Bool[Tensor, "B T"], num_response: int
) -> tuple[Float[Tensor, "B R V"], Float[Tensor, "B R D"]]:
    """As `response_logits`, with the hidden states that these logits were computed from."""
    with captured_head_input(lm) as captured:
        logits = response_logits(lm, input_ids, attention_mask, num_response)
    return logits, captured[0][:, -num_response - 1 : -1]


@contextmanager
def captured_head_input(lm: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collect what the language-model head reads: the trunk's last hidden states, final norm included.

    Reading them here instead of through `output_hidden_states` keeps one layer's states instead of all.
    """
    head = lm.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise ModelError(f"{type(lm).__name__} has no language-model head to read hidden states from")
    captured: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _module, args: captured.append(args[0]))
    try:
        yield captured
    finally:
        handle.remove()
