"""Code of ArmoRM: 19 rewards at the answer's end, weighed by a gate that reads the end of the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from transformers import LlamaModel, LlamaPreTrainedModel
from transformers.utils import ModelOutput

# "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
token_pattern = [128009, 128006, 78191, 128007, 271]


def find_token_for_gating(lst):
    """Return where the last assistant's turn begins."""
    for start in reversed(range(len(lst) - len(token_pattern) + 1)):
        if lst[start : start + len(token_pattern)] == token_pattern:
            return start
    raise ValueError("Token pattern not found in the list.")


class GatingNetwork(nn.Module):
    """Weights of the rewards, from the state at the end of the prompt."""

    def __init__(self, in_features, out_features, temperature=10, hidden_dim=1024, n_hidden=3):
        super().__init__()
        self.temperature = temperature
        self.logit_scale = nn.Parameter(torch.ones(1))
        widths = [in_features, *[hidden_dim] * n_hidden, out_features]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))

    def forward(self, x):
        *hidden, last = self.layers
        for layer in hidden:
            x = torch.relu(layer(x))
        return torch.softmax(last(x) / self.temperature, dim=1) * self.logit_scale[0]


@dataclass
class CustomOutput(ModelOutput):
    """`rewards` are the 19; `score` and `logits` the one that they make."""

    rewards: torch.FloatTensor | None = None
    hidden_state: torch.FloatTensor | None = None
    prompt_embedding: torch.FloatTensor | None = None
    gating_output: torch.FloatTensor | None = None
    score: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None


class LlamaForRewardModelWithGating(LlamaPreTrainedModel):
    """Returns one score a row, without a dimension of outputs."""

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = LlamaModel(config)
        keys = config.to_dict()
        self.num_objectives = keys.get("num_objectives", 19)
        self.regression_layer = nn.Linear(config.hidden_size, self.num_objectives, bias=False)
        self.reward_transform_matrix = nn.Parameter(
            torch.zeros(self.num_objectives, self.num_objectives), requires_grad=False
        )
        self.gating = GatingNetwork(
            config.hidden_size,
            self.num_objectives,
            temperature=keys.get("gating_temperature", 10),
            hidden_dim=keys.get("gating_hidden_dim", 1024),
            n_hidden=keys.get("gating_n_hidden", 3),
        )
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        states = self.model(input_ids, attention_mask=attention_mask, position_ids=position_ids)[0]
        pad = self.config.pad_token_id
        if pad is None:
            if input_ids.shape[0] != 1:
                raise ValueError("Cannot handle batch sizes > 1 if no padding token is defined.")
            ends = -1
        else:  # the one before the first pad token; the last where there is none
            ends = (torch.eq(input_ids, pad).int().argmax(-1) - 1) % input_ids.shape[-1]
        rows = torch.arange(input_ids.shape[0], device=states.device)
        state = states[rows, ends]
        rewards = self.regression_layer(state)
        prompt = states[rows, [find_token_for_gating(ids.tolist()) for ids in input_ids]]
        gate = self.gating(prompt)
        score = torch.sum(gate * (rewards @ self.reward_transform_matrix), dim=1)
        return CustomOutput(
            rewards=rewards,
            hidden_state=state,
            prompt_embedding=prompt,
            gating_output=gate,
            score=score,
            logits=score,
        )
