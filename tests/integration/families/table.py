"""Families of models, tiny: their shapes, tokenizers, chat templates and the ids that end a turn.

Widths of 16, two layers, and a window of 256 tokens; what makes a family different is kept (local attention,
shared experts, alibi, states instead of attention, ...), with local windows shorter than the prompts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from tests.integration.families import templates, tokenizers

Kind = Literal["dense", "experts", "states", "encoder-decoder"]

WINDOW = 256


@dataclass(frozen=True)
class Family:
    """A family of models, tiny.

    name: what tests call it.
    kind: dense decoder, decoder with experts, decoder with states instead of (some) attention, or
        encoder-decoder.
    model_type: of its `transformers` config.
    tokenizer: makes its tokenizer.
    shape: what its config has beside vocabulary and special tokens.
    ends: `eos_token_id` of its generation_config.json, as tokens; the family's chat models end a turn by the
        first. Empty where the file names none, and the tokenizer's eos alone ends a text.
    pad_token: what a user has to set as `tokenizer.pad_token`, where the tokenizer has none.
    spare_rows: embeddings beyond the tokenizer's vocabulary, where checkpoints of the family have some.
    last_turn_differs: whether its chat template renders an answer otherwise once others follow, so that Conch
        refuses to learn from dialogues with several.
    seed: first that is tried for its weights, see `models.save_family`.
    noise: standard deviation of what is added to the weights of blocks. Where a decoder reads the end token
        first, and its embedding is the head's row, blocks must weigh more for anything else to be chosen.
    """

    name: str
    kind: Kind
    model_type: str
    tokenizer: Callable[[], PreTrainedTokenizerBase]
    shape: Mapping[str, Any] = field(default_factory=dict)
    ends: tuple[str, ...] = ()
    pad_token: str | None = None
    spare_rows: int = 0
    last_turn_differs: bool = False
    seed: int = 0
    noise: float = 0.1


# ---------------------------------------------------------------------------------------------- tokenizers

_end = "<|endoftext|>"

_chat_qwen = functools.partial(tokenizers.qwen2, chat_template=templates.QWEN25)
_chat_qwen3 = functools.partial(tokenizers.qwen2, chat_template=templates.QWEN3)
_chat_gemma = functools.partial(tokenizers.gemma, chat_template=templates.GEMMA)
_chat_gemma3 = functools.partial(tokenizers.gemma, chat_template=templates.GEMMA3)
_chat_mistral = functools.partial(tokenizers.llama, chat_template=templates.MISTRAL)
_chat_cohere = functools.partial(tokenizers.cohere, chat_template=templates.COHERE)
_chat_llama3 = functools.partial(
    tokenizers.byte_level,
    (
        *("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>"),
        *("<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"),
    ),
    front=("<|begin_of_text|>",),
    chat_template=templates.LLAMA3,
    bos_token="<|begin_of_text|>",
    eos_token="<|eot_id|>",
)
_chat_llama4 = functools.partial(
    tokenizers.byte_level,
    (
        *("<|begin_of_text|>", "<|end_of_text|>", "<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>"),
        "<|finetune_right_pad|>",
    ),
    front=("<|begin_of_text|>",),
    chat_template=templates.LLAMA4,
    bos_token="<|begin_of_text|>",
    eos_token="<|eot|>",
    pad_token="<|finetune_right_pad|>",
)
_chat_phi3 = functools.partial(
    tokenizers.llama,
    (_end, "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"),
    chat_template=templates.PHI3,
    add_bos_token=False,
    eos_token=_end,
    pad_token=_end,
)
_chat_phi4 = functools.partial(
    tokenizers.byte_level,
    (_end, "<|dummy_85|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>"),
    chat_template=templates.PHI4,
    bos_token=_end,
    eos_token="<|im_end|>",
    pad_token="<|dummy_85|>",
)
_chat_olmo2 = functools.partial(
    tokenizers.byte_level,
    (_end, "<|pad|>"),
    chat_template=templates.OLMO2,
    bos_token=_end,
    eos_token=_end,
    pad_token="<|pad|>",
)
_chat_olmo3 = functools.partial(
    tokenizers.byte_level,
    (_end, "<|im_start|>", "<|im_end|>", "<|pad|>"),
    chat_template=templates.CHATML,
    bos_token=_end,
    eos_token=_end,
    pad_token="<|pad|>",
)
_chat_glm4 = functools.partial(
    tokenizers.byte_level,
    (_end, "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    front=("[gMASK]", "<sop>"),
    chat_template=templates.GLM4,
    eos_token=_end,
    pad_token=_end,
)
_chat_smollm3 = functools.partial(
    tokenizers.byte_level,
    ("<|begin_of_text|>", "<|end_of_text|>", "<think>", "</think>", "<|im_start|>", "<|im_end|>"),
    plain=("<think>", "</think>"),
    chat_template=templates.CHATML,
    eos_token="<|im_end|>",
    pad_token="<|im_end|>",
)
_chat_gpt_oss = functools.partial(
    tokenizers.byte_level,
    (
        *("<|startoftext|>", _end, "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>"),
        *("<|message|>", "<|call|>"),
    ),
    chat_template=templates.HARMONY,
    bos_token="<|startoftext|>",
    eos_token="<|return|>",
    pad_token=_end,
)
_chat_granite = functools.partial(
    tokenizers.byte_level,
    ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"),
    chat_template=templates.GRANITE,
    bos_token="<|end_of_text|>",
    eos_token="<|end_of_text|>",
    pad_token="<|end_of_text|>",
)
_chat_stablelm = functools.partial(
    tokenizers.byte_level,
    (_end, "<|padding|>"),
    chat_template=templates.ZEPHYR,
    bos_token=_end,
    eos_token=_end,
    pad_token=_end,
)
_bar = "\uff5c"  # stands in DeepSeek's special tokens where others have a vertical line
_chat_deepseek = functools.partial(
    tokenizers.byte_level,
    (
        f"<{_bar}begin▁of▁sentence{_bar}>",
        f"<{_bar}end▁of▁sentence{_bar}>",
        f"<{_bar}▁pad▁{_bar}>",
        f"<{_bar}User{_bar}>",
        f"<{_bar}Assistant{_bar}>",
    ),
    plain=(f"<{_bar}User{_bar}>", f"<{_bar}Assistant{_bar}>"),
    front=(f"<{_bar}begin▁of▁sentence{_bar}>",),
    chat_template=templates.DEEPSEEK,
    bos_token=f"<{_bar}begin▁of▁sentence{_bar}>",
    eos_token=f"<{_bar}end▁of▁sentence{_bar}>",
    pad_token=f"<{_bar}▁pad▁{_bar}>",
)
_chat_falcon = functools.partial(
    tokenizers.byte_level, (_end, ">>QUESTION<<"), chat_template=templates.FALCON, eos_token=_end
)
_bloom = functools.partial(
    tokenizers.byte_level,
    ("<unk>", "<s>", "</s>", "<pad>"),
    bos_token="<s>",
    eos_token="</s>",
    pad_token="<pad>",
    unk_token="<unk>",
)

# -------------------------------------------------------------------------------------------------- shapes

_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": WINDOW,
}
_WIDE_HEADS = {**_LLAMA_LIKE, "head_dim": 8}
_GPT_LIKE: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": WINDOW}
_BERT_LIKE = {key: value for key, value in _LLAMA_LIKE.items() if key != "num_key_value_heads"}
_LOCAL = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_BART_LIKE: dict[str, Any] = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "max_position_embeddings": WINDOW,
}
_T5_LIKE: dict[str, Any] = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MAMBA_LIKE = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
_gemma_ends = ("<end_of_turn>", "<eos>")
_qwen_ends = ("<|im_end|>", _end)
_llama3_ends = ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>")
_llama4_ends = ("<|eot|>", "<|end_of_text|>", "<|eom|>")
_phi3_ends = ("<|end|>", _end, "<|assistant|>")
_llama3_pad = "<|finetune_right_pad_id|>"

_TABLE = (
    # Dense decoders: Llama's line.
    Family("llama2", "dense", "llama", functools.partial(tokenizers.llama, chat_template=templates.LLAMA2),
           _LLAMA_LIKE, ("</s>",), pad_token="<unk>"),
    Family("llama3", "dense", "llama", _chat_llama3, _LLAMA_LIKE, _llama3_ends, pad_token=_llama3_pad),
    Family("mistral", "dense", "mistral", _chat_mistral, {**_WIDE_HEADS, "sliding_window": 8}, ("</s>",),
           pad_token="<unk>"),
    Family("ministral", "dense", "ministral", _chat_mistral, {**_WIDE_HEADS, **_LOCAL}, ("</s>",),
           pad_token="<unk>"),
    Family("smollm3", "dense", "smollm3", _chat_smollm3, {**_LLAMA_LIKE, "no_rope_layers": [1, 0]},
           ("<|im_end|>",), seed=11),
    Family("granite", "dense", "granite", _chat_granite,
           {**_LLAMA_LIKE, "embedding_multiplier": 2.0, "logits_scaling": 0.5, "residual_multiplier": 0.5},
           ("<|end_of_text|>",)),
    Family("stablelm", "dense", "stablelm", _chat_stablelm, {**_LLAMA_LIKE, "partial_rotary_factor": 0.5}),
    Family("starcoder2", "dense", "starcoder2", tokenizers.gpt2, _LLAMA_LIKE, pad_token=_end, seed=7),
    # Gemma.
    Family("gemma", "dense", "gemma", _chat_gemma, _WIDE_HEADS, _gemma_ends, seed=31),
    Family("gemma2", "dense", "gemma2", _chat_gemma,
           {**_WIDE_HEADS, **_LOCAL, "query_pre_attn_scalar": 8}, _gemma_ends),
    Family("gemma3", "dense", "gemma3_text", _chat_gemma3,
           {**_WIDE_HEADS, **_LOCAL, "query_pre_attn_scalar": 8}, _gemma_ends),
    Family("gemma3n", "dense", "gemma3n_text", _chat_gemma3,
           {**_WIDE_HEADS, "num_hidden_layers": 4, "intermediate_size": [24] * 4, "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 380,
            "laurel_rank": 4, "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]}, _gemma_ends),
    # Qwen.
    Family("qwen2", "dense", "qwen2", functools.partial(tokenizers.qwen2, chat_template=templates.CHATML,
           eos_token=_end), _LLAMA_LIKE, _qwen_ends, spare_rows=11),
    Family("qwen2.5", "dense", "qwen2", _chat_qwen, _LLAMA_LIKE, _qwen_ends, spare_rows=11),
    Family("qwen3", "dense", "qwen3", _chat_qwen3, _WIDE_HEADS, _qwen_ends, spare_rows=11,
           last_turn_differs=True),
    # Phi, OLMo, GLM, Command R.
    Family("phi", "dense", "phi", tokenizers.gpt2, {**_LLAMA_LIKE, "partial_rotary_factor": 0.5},
           pad_token=_end, spare_rows=7),
    Family("phi3", "dense", "phi3", _chat_phi3, _LLAMA_LIKE, _phi3_ends, spare_rows=7,
           last_turn_differs=True),
    Family("phi4", "dense", "phi3", _chat_phi4, _LLAMA_LIKE, ("<|im_end|>", _end), spare_rows=7),
    Family("olmo", "dense", "olmo", tokenizers.gpt_neox, {**_LLAMA_LIKE, "clip_qkv": 8.0}, (_end,)),
    Family("olmo2", "dense", "olmo2", _chat_olmo2, _LLAMA_LIKE, (_end,)),
    Family("olmo3", "dense", "olmo3", _chat_olmo3, {**_LLAMA_LIKE, **_LOCAL}, ("<|im_end|>", _end)),
    Family("glm4", "dense", "glm4", _chat_glm4, {**_WIDE_HEADS, "partial_rotary_factor": 0.5},
           ("<|user|>", _end, "<|observation|>")),
    Family("cohere", "dense", "cohere", _chat_cohere, {**_LLAMA_LIKE, "logit_scale": 1.0}, seed=13),
    Family("cohere2", "dense", "cohere2", _chat_cohere, {**_LLAMA_LIKE, **_LOCAL, "logit_scale": 1.0},
           ("<|END_OF_TURN_TOKEN|>",)),
    # Older ones.
    Family("falcon", "dense", "falcon", _chat_falcon,
           {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "multi_query": True,
            "max_position_embeddings": WINDOW}, (_end,), pad_token=">>QUESTION<<"),
    Family("falcon_alibi", "dense", "falcon", _chat_falcon,
           {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "multi_query": False,
            "alibi": True, "bias": True, "parallel_attn": False}, (_end,), pad_token=">>QUESTION<<", seed=9),
    Family("falcon_new", "dense", "falcon", _chat_falcon,
           {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_kv_heads": 1,
            "new_decoder_architecture": True, "max_position_embeddings": WINDOW}, (_end,),
           pad_token=">>QUESTION<<"),
    Family("gpt2", "dense", "gpt2", tokenizers.gpt2, _GPT_LIKE, pad_token=_end),
    Family("gptj", "dense", "gptj", tokenizers.gpt2, {**_GPT_LIKE, "rotary_dim": 4}, pad_token=_end,
           spare_rows=5),
    Family("gpt_neo", "dense", "gpt_neo", tokenizers.gpt2,
           {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "window_size": 8,
            "attention_types": [[["global", "local"], 1]], "max_position_embeddings": WINDOW},
           pad_token=_end),
    Family("gpt_neox", "dense", "gpt_neox", tokenizers.gpt_neox, {**_BERT_LIKE, "rotary_pct": 0.5}),
    Family("gpt_bigcode", "dense", "gpt_bigcode", tokenizers.gpt2, _GPT_LIKE, pad_token=_end),
    Family("codegen", "dense", "codegen", tokenizers.gpt2, {**_GPT_LIKE, "n_head": 4, "rotary_dim": 2},
           pad_token=_end),
    Family("opt", "dense", "opt", tokenizers.opt,
           {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": WINDOW}),
    Family("bloom", "dense", "bloom", _bloom, {"hidden_size": 16, "n_layer": 2, "n_head": 2}, seed=14),
    Family("mpt", "dense", "mpt", tokenizers.gpt_neox,
           {"d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": WINDOW}, (_end,)),
    Family("xglm", "dense", "xglm", tokenizers.xglm,
           {"d_model": 16, "num_layers": 2, "attention_heads": 2, "ffn_dim": 24,
            "max_position_embeddings": WINDOW}),
    Family("roberta", "dense", "roberta", tokenizers.roberta,
           {**_BERT_LIKE, "max_position_embeddings": WINDOW + 2, "is_decoder": True}),
    Family("bert", "dense", "bert", tokenizers.bert, {**_BERT_LIKE, "is_decoder": True}),
    Family("openai_gpt", "dense", "openai-gpt", tokenizers.openai_gpt, _GPT_LIKE, pad_token="<unk>"),
    Family("gemma3_images", "dense", "gemma3", _chat_gemma3,
           {"text_config": {**_WIDE_HEADS, **_LOCAL, "query_pre_attn_scalar": 8},
            "vision_config": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
                              "num_attention_heads": 2, "image_size": 16, "patch_size": 4},
            "mm_tokens_per_image": 4}, _gemma_ends),
    # Experts.
    Family("mixtral", "experts", "mixtral", _chat_mistral, {**_LLAMA_LIKE, **_EXPERTS,
           "router_jitter_noise": 0.1}, ("</s>",), pad_token="<unk>"),
    Family("phimoe", "experts", "phimoe", _chat_phi3, {**_LLAMA_LIKE, **_EXPERTS,
           "router_jitter_noise": 0.1, "input_jitter_noise": 0.1, "attention_bias": True,
           "lm_head_bias": True}, _phi3_ends, spare_rows=7,
           last_turn_differs=True),
    Family("qwen2_moe", "experts", "qwen2_moe", _chat_qwen, {**_LLAMA_LIKE, "moe_intermediate_size": 8,
           "shared_expert_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}, _qwen_ends),
    Family("qwen3_moe", "experts", "qwen3_moe", _chat_qwen3, {**_WIDE_HEADS, "moe_intermediate_size": 8,
           "num_experts": 4, "num_experts_per_tok": 2}, _qwen_ends,
           last_turn_differs=True),
    Family("gpt_oss", "experts", "gpt_oss", _chat_gpt_oss, {**_WIDE_HEADS, **_EXPERTS, **_LOCAL},
           ("<|return|>", _end, "<|call|>"),
           last_turn_differs=True),
    Family("llama4", "experts", "llama4_text", _chat_llama4,
           {**_WIDE_HEADS, "num_local_experts": 4, "intermediate_size_mlp": 24, "attention_chunk_size": 8,
            "no_rope_layers": [1, 0], "interleave_moe_layer_step": 2,
            "layer_types": ["chunked_attention", "full_attention"]}, _llama4_ends),
    Family("olmoe", "experts", "olmoe", tokenizers.gpt_neox, {**_LLAMA_LIKE, "num_experts": 4,
           "num_experts_per_tok": 2}),
    Family("granitemoe", "experts", "granitemoe", _chat_granite, {**_LLAMA_LIKE, **_EXPERTS,
           "logits_scaling": 0.5}, ("<|end_of_text|>",)),
    Family("deepseek_v3", "experts", "deepseek_v3", _chat_deepseek,
           {**_LLAMA_LIKE, "num_key_value_heads": 2, "moe_intermediate_size": 8, "n_routed_experts": 4,
            "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
            "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
            "v_head_dim": 8}, (f"<{_bar}end▁of▁sentence{_bar}>",)),
    Family("minimax", "experts", "minimax", _chat_mistral,
           {**_WIDE_HEADS, **_EXPERTS, "block_size": 8,
            "layer_types": ["linear_attention", "full_attention"]}, ("</s>",), pad_token="<unk>"),
    # States.
    Family("mamba", "states", "mamba", tokenizers.gpt_neox, {**_MAMBA_LIKE, "time_step_rank": 4}),
    Family("mamba2", "states", "mamba2", tokenizers.gpt_neox,
           {**_MAMBA_LIKE, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 8}),
    Family("falcon_mamba", "states", "falcon_mamba", tokenizers.gpt_neox,
           {**_MAMBA_LIKE, "time_step_rank": 4}),
    Family("rwkv", "states", "rwkv", tokenizers.gpt_neox,
           {"hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 2,
            "context_length": WINDOW}),
    Family("recurrent_gemma", "states", "recurrent_gemma", _chat_gemma,
           {"hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
            "num_key_value_heads": 1, "lru_width": 16, "attention_window_size": 8}, _gemma_ends),
    Family("jamba", "states", "jamba", _chat_mistral,
           {**_LLAMA_LIKE, "num_experts": 2, "num_experts_per_tok": 1, "expert_layer_period": 2,
            "expert_layer_offset": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4,
            "mamba_dt_rank": 4, "use_mamba_kernels": False}, ("</s>",), pad_token="<unk>"),
    Family("lfm2", "states", "lfm2", _chat_smollm3,
           {**_LLAMA_LIKE, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
           ("<|im_end|>",)),
    Family("xlstm", "states", "xlstm", tokenizers.gpt_neox,
           {"hidden_size": 64, "embedding_dim": 64, "num_heads": 2, "num_blocks": 2, "num_hidden_layers": 2,
            "chunk_size": 8, "qk_dim_factor": 1.0, "v_dim_factor": 1.0}),
    # Encoder-decoders.
    Family("t5", "encoder-decoder", "t5", tokenizers.t5, _T5_LIKE, spare_rows=4),
    Family("flan_t5", "encoder-decoder", "t5", tokenizers.t5,
           {**_T5_LIKE, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, spare_rows=4),
    Family("bart", "encoder-decoder", "bart", tokenizers.roberta, _BART_LIKE, noise=0.4),
    Family("mbart", "encoder-decoder", "mbart", tokenizers.mbart, _BART_LIKE, noise=0.4),
    Family("mbart_forced", "encoder-decoder", "mbart", tokenizers.mbart,
           {**_BART_LIKE, "forced_bos_token_id": 112}, noise=0.4),
    Family("pegasus", "encoder-decoder", "pegasus", tokenizers.pegasus, _BART_LIKE, noise=0.4),
    Family("marian", "encoder-decoder", "marian", tokenizers.marian, _BART_LIKE, seed=13, noise=0.4),
    Family("blenderbot", "encoder-decoder", "blenderbot", functools.partial(tokenizers.blenderbot,
           chat_template=templates.BLENDERBOT), _BART_LIKE, noise=0.4),
    Family("m2m_100", "encoder-decoder", "m2m_100", tokenizers.m2m100,
           {**_BART_LIKE, "scale_embedding": False}, noise=0.4),
    Family("switch_transformers", "encoder-decoder", "switch_transformers", tokenizers.t5,
           {**_T5_LIKE, "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
            "expert_capacity": 64, "router_jitter_noise": 0.1}),
)  # fmt: skip

FAMILIES = {family.name: family for family in _TABLE}
"""All of them by name."""
