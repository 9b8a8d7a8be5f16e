"""Code of Ziya-LLaMA-7B-Reward: a linear head at the last token, and a bare tensor for an answer."""

from __future__ import annotations

from torch import nn
from transformers import LlamaConfig, LlamaModel, LlamaPreTrainedModel


class LlamaRewardModel(LlamaPreTrainedModel):
    """One number a row."""

    config_class = LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = 1
        self.model = LlamaModel(config)
        self.value_head = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def forward(
        self,
        input_ids=None,
        past_key_values=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        return_dict=False,
    ):
        states = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
        )[0]
        values = self.value_head(states).squeeze(-1)
        if attention_mask is None:
            return values[:, -1]
        ends = attention_mask.long().sum(dim=1, keepdim=True) - 1
        return values.gather(1, ends).squeeze(1)
