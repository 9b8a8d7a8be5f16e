"""Tiny models of families for which other things hold than for GPT-2: positions, memories, masks, routers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)

from tests.tiny import char_tokenizer

TOKENIZER = char_tokenizer("abcdefghijklmnopqrstu")
"""Its 24 tokens are those of the models: pad is 21, eos 22."""

_LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_BERT = {**{key: _LLAMA[key] for key in _LLAMA if key != "num_key_value_heads"}, "is_decoder": True}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
}
_T5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
_FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}

DECODERS: dict[str, dict[str, Any]] = {
    "rwkv": {**_LLAMA, "attention_hidden_size": 32, "context_length": 64},
    "recurrent_gemma": {
        **_LLAMA,
        "head_dim": 16,
        "lru_width": 32,
        "attention_window_size": 32,
        "block_types": ["recurrent", "attention"],
    },
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "lfm2": {**_LLAMA, "layer_types": ["conv", "full_attention"]},
    # A decoder that counts positions from behind its pad token.
    "roberta": _BERT,
    "bert": _BERT,
    "falcon": {**_FALCON, "alibi": True},
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "mpt": {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 64},
    "llama4_text": {
        **_LLAMA,
        "head_dim": 16,
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
        "attention_chunk_size": 5,
    },
    "qwen3_moe": {**_LLAMA, **_QWEN_EXPERTS},
    "phimoe": {**_LLAMA, **_EXPERTS, "sliding_window": None, "router_jitter_noise": 0.2},
    "mixtral": {**_LLAMA, **_EXPERTS, "router_jitter_noise": 0.1},
}
"""Model types of decoders, and a shape for each."""

ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "bart": _BART,
    "mbart": _BART,
    "pegasus": _BART,
    "marian": {**_BART, "decoder_vocab_size": 24},
    "blenderbot": _BART,
    "t5": {**_T5, "decoder_start_token_id": 21},
    "switch_transformers": {
        **_T5,
        "decoder_start_token_id": 21,
        "num_experts": 4,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "router_jitter_noise": 0.1,
    },
}
"""Model types of encoder-decoders likewise."""

PACKED = ("roberta", "bert", "llama4_text", "qwen3_moe", "phimoe", "mixtral")
"""Those that keep the samples of a packed row apart."""


def odd_config(family: str, **overrides: Any) -> PretrainedConfig:
    """The config of one of the families."""
    special = {"vocab_size": 24, "pad_token_id": 21, "eos_token_id": 22, "bos_token_id": None}
    shape = {**DECODERS, **ENCODER_DECODERS}[family]
    return AutoConfig.for_model(family, **{**special, **shape, **overrides})


def odd_model(family: str, *, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A random model of one of the families, in evaluation mode, to which no two tokens look alike.

    dtype: float32, since experts' grouped products know no float64 (torch 2.13).
    """
    torch.manual_seed(0)
    config = odd_config(family, **overrides)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    lm = auto_class.from_config(config).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return lm.to(dtype)


def gemma3_shape(**text: Any) -> dict[str, Any]:
    """`model.architecture` of a model that reads texts and images."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    special = {"vocab_size": 24, "pad_token_id": 21, "eos_token_id": 22, "bos_token_id": None}
    more = {"num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 32}
    return {
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text", **shape, **special, **more, **text},
        "vision_config": {"model_type": "siglip_vision_model", **shape, "image_size": 16, "patch_size": 8},
        "mm_tokens_per_image": 4,
        "image_token_index": 23,
        "boi_token_index": 19,
        "eoi_token_index": 20,
    }


def gemma3_config(**text: Any) -> PretrainedConfig:
    """The config of that model."""
    shape = gemma3_shape(**text)
    return AutoConfig.for_model(shape.pop("model_type"), **shape)


def gemma3_model() -> PreTrainedModel:
    """A random model of that config, in evaluation mode."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(gemma3_config()).eval()
