"""Code of QRM on Gemma 2: five rewards of 19 quantiles, and no matrix between rewards and gate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import Gemma2Model, Gemma2PreTrainedModel
from transformers.utils import ModelOutput

# "<end_of_turn>\n<start_of_turn>model\n"
token_pattern = [107, 108, 106, 2516, 108]


def find_token_for_gating(lst):
    """Return where the last model's turn begins."""
    for start in reversed(range(len(lst) - len(token_pattern) + 1)):
        if lst[start : start + len(token_pattern)] == token_pattern:
            return start
    raise ValueError("Token pattern not found in the list.")


class GatingNetwork(nn.Module):
    """Weights of the rewards; a dropout follows each batch norm but the last."""

    def __init__(self, in_features, out_features, temperature=1, hidden_dim=1024, n_hidden=3, dropout=0.2):
        super().__init__()
        self.temperature = temperature
        self.logit_scale = nn.Parameter(torch.ones(1))
        layers = []
        for number in range(n_hidden):
            layers += [nn.Linear(in_features, hidden_dim, bias=False), nn.ReLU(), nn.BatchNorm1d(hidden_dim)]
            if number < n_hidden - 1:
                layers.append(nn.Dropout(dropout))
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


class Gemma2ForQuantileSequenceClassification(Gemma2PreTrainedModel):
    """The mean of the quantiles, weighed."""

    def __init__(self, config):
        super().__init__(config)
        keys = config.to_dict()
        self.num_objectives = keys.get("num_objectives", 5)
        self.num_quantiles = keys.get("num_quantiles", 19)
        self.model = Gemma2Model(config)
        outputs = self.num_objectives * self.num_quantiles
        self.regression_layer = nn.Linear(config.hidden_size, outputs, bias=False)
        self.gating = GatingNetwork(
            config.hidden_size,
            self.num_objectives,
            temperature=keys.get("gating_temperature", 1),
            hidden_dim=keys.get("gating_hidden_dim", 1024),
            n_hidden=keys.get("gating_n_hidden", 3),
        )
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        states = self.model(input_ids, attention_mask=attention_mask, position_ids=position_ids)[0]
        pad = self.config.pad_token_id
        ends = -1 if pad is None else (torch.eq(input_ids, pad).int().argmax(-1) - 1) % input_ids.shape[-1]
        rows = torch.arange(input_ids.shape[0], device=states.device)
        quantiles = self.regression_layer(states[rows, ends])
        quantiles = quantiles.reshape(-1, self.num_objectives, self.num_quantiles)
        gate = self.gating(states[rows, [find_token_for_gating(ids.tolist()) for ids in input_ids]])
        rewards = quantiles.mean(dim=2)
        score = torch.sum(gate * rewards, dim=1, keepdim=True)
        return CustomOutput(
            reward_quantiles=torch.einsum("ro,roq->rq", gate, quantiles),
            rewards=rewards,
            gating_output=gate,
            score=score,
            logits=score,
        )
