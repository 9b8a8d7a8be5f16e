"""Code of InternLM2-reward: a trunk of its own, and a linear head that reads the reward token."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, SequenceClassifierOutputWithPast

from .configuration_internlm2 import InternLM2Config  # noqa: TID252 -- as code in a checkpoint must


class InternLM2RMSNorm(nn.Module):
    """Divides by the root of the mean square."""

    def __init__(self, hidden_size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def _turned(x, positions, theta):
    """Rotary positions: the halves of a head's width are turned against each other."""
    half = x.shape[-1] // 2
    frequencies = theta ** -(torch.arange(half, device=x.device).float() / half)
    angles = positions[:, None, :, None].float() * frequencies
    first, second = x[..., :half], x[..., half:]
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


class InternLM2Attention(nn.Module):
    """One matrix makes queries, keys and values, group by group of heads that share a key."""

    def __init__(self, config):
        super().__init__()
        self.theta = config.rope_theta
        self.width = config.hidden_size // config.num_attention_heads
        self.groups = config.num_key_value_heads
        self.shared = config.num_attention_heads // self.groups
        heads = config.num_attention_heads + 2 * self.groups
        self.wqkv = nn.Linear(config.hidden_size, heads * self.width, bias=config.bias)
        self.wo = nn.Linear(config.num_attention_heads * self.width, config.hidden_size, bias=config.bias)

    def forward(self, x, mask, positions):
        rows, length, _ = x.shape
        parts = self.wqkv(x).view(rows, length, self.groups, self.shared + 2, self.width)
        query = parts[..., : self.shared, :].reshape(rows, length, -1, self.width).transpose(1, 2)
        key, value = (parts[..., self.shared + number, :].transpose(1, 2) for number in (0, 1))
        query, key = (_turned(each, positions, self.theta) for each in (query, key))
        key, value = (each.repeat_interleave(self.shared, dim=1) for each in (key, value))
        scores = query @ key.transpose(2, 3) / self.width**0.5 + mask
        mixed = scores.softmax(dim=-1) @ value
        return self.wo(mixed.transpose(1, 2).reshape(rows, length, -1))


class InternLM2MLP(nn.Module):
    """A gated layer."""

    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class InternLM2DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind its norm and beside a residual."""

    def __init__(self, config):
        super().__init__()
        self.attention = InternLM2Attention(config)
        self.feed_forward = InternLM2MLP(config)
        self.attention_norm = InternLM2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = InternLM2RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, mask, positions):
        x = x + self.attention(self.attention_norm(x), mask, positions)
        return x + self.feed_forward(self.ffn_norm(x))


class InternLM2PreTrainedModel(PreTrainedModel):
    """What all of them share."""

    config_class = InternLM2Config
    base_model_prefix = "model"
    _no_split_modules = ("InternLM2DecoderLayer",)


class InternLM2Model(InternLM2PreTrainedModel):
    """The trunk."""

    def __init__(self, config):
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(InternLM2DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = InternLM2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self):
        return self.tok_embeddings

    def set_input_embeddings(self, value):
        self.tok_embeddings = value

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, **kwargs):
        x = self.tok_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        rows, length, _ = x.shape
        if position_ids is None:
            position_ids = torch.arange(length, device=x.device).expand(rows, -1)
        seen = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()[None, None]
        if attention_mask is not None:
            seen = seen & attention_mask.bool()[:, None, None, :]
        mask = torch.zeros(seen.shape, dtype=x.dtype, device=x.device)
        mask = mask.masked_fill(~seen, torch.finfo(x.dtype).min)
        for layer in self.layers:
            x = layer(x, mask, position_ids)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x))


class InternLM2ForRewardModel(InternLM2PreTrainedModel):
    """The score stands at the reward token, which must be each row's last."""

    def __init__(self, config):
        super().__init__(config)
        self.model = InternLM2Model(config)
        self.vocab_size = config.vocab_size
        self.v_head = nn.Linear(config.hidden_size, 1, bias=False)
        self.reward_token_id = config.reward_token_id
        self.post_init()

    def get_input_embeddings(self):
        return self.model.tok_embeddings

    def set_input_embeddings(self, value):
        self.model.tok_embeddings = value

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
        ends = attention_mask.size(1) - 1 - attention_mask.long().fliplr().argmax(dim=1, keepdim=True)
        last = input_ids.gather(1, ends).squeeze(1)
        assert torch.all(last == self.reward_token_id).item(), "the last token must be the reward token"
        states = self.model(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds
        )[0]
        scores = self.v_head(states).squeeze(-1).gather(1, ends).squeeze(1)
        if return_dict is False:
            return (scores,)
        return SequenceClassifierOutputWithPast(logits=scores)

    @torch.no_grad()
    def get_score(self, tokenizer, conversation, **kwargs):
        """Score one dialogue."""
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=False)
        ids = [*tokenizer.encode(text, add_special_tokens=False), self.reward_token_id]
        input_ids = torch.tensor([ids], device=self.device)
        return self.forward(input_ids, attention_mask=torch.ones_like(input_ids), **kwargs)[0].item()
