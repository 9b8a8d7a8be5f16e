"""Code of QRM on Llama 3 and 3.1: as ArmoRM's, but each reward is a distribution, given by its quantiles."""

from __future__ import annotations

from dataclasses import dataclass

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
    """Weights of the rewards; between its layers stand batch norms with the statistics of training."""

    def __init__(self, in_features, out_features, temperature=10, hidden_dim=1024, n_hidden=3):
        super().__init__()
        self.temperature = temperature
        self.logit_scale = nn.Parameter(torch.ones(1))
        layers = []
        for _ in range(n_hidden):
            layers += [nn.Linear(in_features, hidden_dim, bias=False), nn.ReLU(), nn.BatchNorm1d(hidden_dim)]
            in_features = hidden_dim
        self.layers = nn.ModuleList([*layers, nn.Linear(in_features, out_features)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return torch.softmax(x / self.temperature, dim=1) * self.logit_scale[0]


@dataclass
class CustomOutput(ModelOutput):
    """`score` and `logits` are the same, one a row."""

    reward_quantiles: torch.FloatTensor | None = None
    rewards: torch.FloatTensor | None = None
    gating_output: torch.FloatTensor | None = None
    score: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None


class LlamaForRewardModelWithGating(LlamaPreTrainedModel):
    """The mean of the quantiles, transformed, then weighed."""

    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.num_labels = config.num_labels
        keys = config.to_dict()
        self.num_objectives = keys.get("num_objectives", 19)
        self.num_quantiles = config.num_quantiles
        outputs = self.num_quantiles * self.num_objectives
        self.regression_layer = nn.Linear(config.hidden_size, outputs, bias=False)
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
        else:
            ends = (torch.eq(input_ids, pad).int().argmax(-1) - 1) % input_ids.shape[-1]
        rows = torch.arange(input_ids.shape[0], device=states.device)
        quantiles = self.regression_layer(states[rows, ends])
        quantiles = quantiles.reshape(-1, self.num_objectives, self.num_quantiles)
        gate = self.gating(states[rows, [find_token_for_gating(ids.tolist()) for ids in input_ids]])
        transformed = torch.einsum("roq,op->rpq", quantiles, self.reward_transform_matrix)
        rewards = quantiles.mean(dim=2) @ self.reward_transform_matrix
        score = torch.sum(gate * rewards, dim=1, keepdim=True)
        return CustomOutput(
            reward_quantiles=torch.einsum("ro,roq->rq", gate, transformed),
            rewards=rewards,
            gating_output=gate,
            score=score,
            logits=score,
        )
