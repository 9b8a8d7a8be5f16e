"""Code of URM: five rewards, each a mean and a spread, weighed by a network of the same state."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaModel, LlamaPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast


class LlamaForSequenceClassificationWithNormal_Weights(LlamaPreTrainedModel):  # noqa: N801
    """Ten outputs, which are five pairs of mean and spread; the means make the score."""

    class Weights(nn.Module):
        """How much each of the five rewards counts."""

        def __init__(self, hidden_size, num_label):
            super().__init__()
            self.fc = nn.Sequential(
                nn.Linear(hidden_size, hidden_size),
                nn.SELU(),
                nn.Linear(hidden_size, hidden_size),
                nn.SELU(),
                nn.Linear(hidden_size, num_label // 2),
            )

        def forward(self, x):
            return self.fc(x)

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = LlamaModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.weights = self.Weights(config.hidden_size, self.num_labels)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
    ):
        states = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
        )[0]
        pad = self.config.pad_token_id
        if pad is None and input_ids.shape[0] != 1:
            raise ValueError("Cannot handle batch sizes > 1 if no padding token is defined.")
        ends = -1 if pad is None else (torch.eq(input_ids, pad).int().argmax(-1) - 1) % input_ids.shape[-1]
        state = states[torch.arange(input_ids.shape[0], device=states.device), ends]
        means = self.score(state).view(-1, self.num_labels // 2, 2)[:, :, 0]
        logits = (means * self.weights(state)).sum(dim=-1, keepdim=True)
        if return_dict is False:
            return (logits,)
        return SequenceClassifierOutputWithPast(logits=logits)
