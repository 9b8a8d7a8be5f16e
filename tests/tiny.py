"""Tiny models and tokenizers that tests build in milliseconds, and checkpoints that load like real ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)


def char_tokenizer(letters: str) -> PreTrainedTokenizerFast:
    """One token a letter, ids from 0 in order; then <pad>, <eos>, <unk>."""
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    for special in ("<pad>", "<eos>", "<unk>"):
        vocabulary[special] = len(vocabulary)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def tiny_gpt2_config(tokenizer: PreTrainedTokenizerFast, **overrides: Any) -> GPT2Config:
    """Two layers of width 32 over a window of 16 tokens, without dropout."""
    shape = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 16}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    return GPT2Config(**{"vocab_size": len(tokenizer), **shape, **no_dropout, **special, **overrides})


def reward_checkpoint(
    folder: Path,
    *,
    letters: str = "abcdefghijklmnopqrstu",
    seed: int = 0,
    reward_model: dict[str, Any] | None = None,
    **overrides: Any,
) -> Path:
    """Save a random GPT-2 classifier, scores spread over about +-3, with its tokenizer.

    reward_model: content of `reward_model.json`; None writes none. overrides: of the model's config.
    """
    tokenizer = char_tokenizer(letters)
    torch.manual_seed(seed)
    model = GPT2ForSequenceClassification(tiny_gpt2_config(tokenizer, **{"num_labels": 1, **overrides}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if reward_model is not None:
        (folder / "reward_model.json").write_text(json.dumps(reward_model))
    return folder


_LLAMA_LIKE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
}
_GPT_LIKE = {"n_layer": 3, "n_embd": 32, "n_head": 2, "n_positions": 32}

DECODERS: dict[str, dict[str, Any]] = {
    "gpt2": _GPT_LIKE,
    "gptj": {**_GPT_LIKE, "rotary_dim": 8},
    "gpt_neox": _LLAMA_LIKE,
    "llama": {**_LLAMA_LIKE, "num_key_value_heads": 1},
    "qwen2": {**_LLAMA_LIKE, "num_key_value_heads": 1},
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "ffn_dim": 48,
        "max_position_embeddings": 32,
    },
}
"""Families of decoders, and a shape of three layers of width 32 over a window of 32 tokens for each."""

ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "t5": {
        "d_model": 32,
        "d_kv": 16,
        "d_ff": 48,
        "num_layers": 4,
        "num_decoder_layers": 3,
        "num_heads": 2,
        "decoder_start_token_id": 21,
    },
}
"""Families of encoder-decoders, with three decoder layers of width 32 each."""

FLOAT32_INSIDE = frozenset({"llama", "qwen2", "t5", "gptj", "bloom", "gpt_neo"})
"""Families that compute norms or attention in float32 whatever their dtype."""

LANGUAGE_MODELS = {**DECODERS, **ENCODER_DECODERS}
"""All of them."""


def decoder_shape(family: str, **overrides: Any) -> dict[str, Any]:
    """`model.architecture` of a tiny language model over 24 tokens, the last three pad, eos and unk."""
    special: dict[str, Any] = {"vocab_size": 24, "pad_token_id": 21, "eos_token_id": 22}
    if family in DECODERS:
        special["bos_token_id"] = None
    return {"model_type": family, **special, **LANGUAGE_MODELS[family], **overrides}


def tiny_decoder(
    family: str, *, seed: int = 0, dtype: torch.dtype = torch.float64, **overrides: Any
) -> PreTrainedModel:
    """A language model with random weights, large enough that no two tokens look alike to it; in evaluation
    mode.

    dtype: float64 unless a test is about another precision: what holds exactly for a formula then holds to
    1e-10 with any processor's kernels, and a bound need not be fitted to those of one.
    """
    torch.manual_seed(seed)
    shape = decoder_shape(family, **overrides)
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    lm = auto_class.from_config(config).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return lm.to(dtype)


def constant_decoder(logits: list[float], tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A GPT-2 that gives these logits to the first tokens, and -1e4 to the others, whatever it reads."""
    lm = GPT2LMHeadModel(tiny_gpt2_config(tokenizer, tie_word_embeddings=False)).eval()
    with torch.no_grad():
        lm.transformer.ln_f.weight.zero_()
        lm.transformer.ln_f.bias.zero_()[0] = 1.0
        lm.lm_head.weight.zero_()[:, 0] = -1e4
        lm.lm_head.weight[: len(logits), 0] = torch.tensor(logits)
    return lm


def cycle_decoder(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A GPT-2 that goes from each letter of a `char_tokenizer` to the next, and from the last to eos."""
    size = len(tokenizer)
    pad, eos, unk = size - 3, size - 2, size - 1
    order = torch.tensor([*range(size - 3), eos, pad, unk])
    lm = GPT2LMHeadModel(tiny_gpt2_config(tokenizer, n_embd=size, n_head=1, tie_word_embeddings=False)).eval()
    with torch.no_grad():
        for parameter in lm.transformer.h.parameters():
            parameter.zero_()  # the blocks add nothing: the head reads the embedding of the last token alone
        lm.transformer.wpe.weight.zero_()
        lm.transformer.wte.weight.copy_(torch.eye(size))
        lm.lm_head.weight.zero_()[order.roll(-1), order] = 100.0
    return lm


def padded_batch(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int
) -> tuple[Tensor, Tensor, int]:
    """Ids and mask [B, T] of prompts padded left and responses padded right, wider than need be on both
    sides, and the columns of responses."""
    wide, long = max(map(len, prompts)) + 2, max(1, *map(len, responses)) + 1
    ids = torch.full((len(prompts), wide + long), pad_id)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        place = slice(wide - len(prompt), wide + len(response))
        ids[row, place], mask[row, place] = torch.tensor([*prompt, *response]), True
    return ids, mask, long
