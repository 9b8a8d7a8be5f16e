"""Tiny checkpoints of every kind and family that the converter takes, as other tools save them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedTokenizerFast,
)

from tests.tiny import DECODERS, char_tokenizer, decoder_shape

LETTERS = "abcdefghijklmnopqrs;."
"""Of the tokenizer, ids from 0; then <pad>, <eos>, <unk>."""

PAD, EOS, UNK = 21, 22, 23
WINDOW = 32

_BERT_LIKE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": WINDOW,
}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": _BERT_LIKE,
    # RoBERTa counts positions from its pad id + 1 on.
    "roberta": {**_BERT_LIKE, "max_position_embeddings": WINDOW + PAD + 1},
    "deberta-v2": {
        **_BERT_LIKE,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
    },
}
"""Families of encoders, two layers of width 32 over a window of 32 tokens."""

FAMILIES = (*DECODERS, *ENCODERS)

# Keeps a factor in a buffer, which in half precision is rounded.
GEMMA = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 48,
}


def tokenizer_for(family: str) -> PreTrainedTokenizerFast:
    """A letter a token; an encoder's opens every text with `a` and closes it with `b`."""
    tokenizer = char_tokenizer(LETTERS)
    if family in ENCODERS:
        tokenizer.add_special_tokens({"cls_token": "a", "sep_token": "b"})
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="a $A b", special_tokens=[("a", 0), ("b", 1)]
        )
    return tokenizer


def config_of(family: str, **overrides: Any) -> Any:
    """Configuration of a tiny model of that family."""
    if family == "gemma2":
        special = {"vocab_size": 24, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None}
        return AutoConfig.for_model(family, **special, **GEMMA, **overrides)
    if family in DECODERS:
        shape = decoder_shape(family, **overrides)
    else:
        shape = {"model_type": family, "vocab_size": 24, "pad_token_id": PAD, **ENCODERS[family], **overrides}
    return AutoConfig.for_model(shape.pop("model_type"), **shape)


def random_model(auto_class: Any, config: Any, *, seed: int = 0) -> Any:
    """A model whose scores differ from sample to sample."""
    torch.manual_seed(seed)
    model = auto_class.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def classifier(folder: Path, family: str, *, dtype: str = "float32", **overrides: Any) -> Any:
    """Save a sequence classifier in that precision, with its tokenizer. Returns it as float32 reads it."""
    config = config_of(family, **{"num_labels": 1, **overrides})
    _saved(random_model(AutoModelForSequenceClassification, config).to(getattr(torch, dtype)), folder, family)
    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte a token, ids from 0 in the order of GPT-2's alphabet of bytes; then <pad>, <eos>, <unk>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def process_reward(folder: Path, family: str, *, num_labels: int = 2, **overrides: Any) -> Any:
    """Save a token classifier, as process rewards are."""
    config = config_of(family, num_labels=num_labels, **overrides)
    return _saved(random_model(AutoModelForTokenClassification, config), folder, family)


def base_model(folder: Path, family: str, **overrides: Any) -> Any:
    """Save a language model, which rewards build on."""
    return _saved(random_model(AutoModelForCausalLM, config_of(family, **overrides)), folder, family)


def value_head_tensors(base: Any, *, seed: int = 1) -> dict[str, torch.Tensor]:
    """The trunk of another random model of that shape, as `transformer.*`, and a head."""
    other = random_model(AutoModelForCausalLM, base.config, seed=seed)
    trunk = {f"transformer.{name}": tensor for name, tensor in other.base_model.state_dict().items()}
    head = torch.randn(1, base.config.hidden_size)
    return {**{name: tensor.clone() for name, tensor in trunk.items()}, "v_head.weight": head}


def save_value_head(folder: Path, tensors: dict[str, torch.Tensor], how: str) -> Path:
    """Save them the way `how` says: `pt`, `bin`, `safetensors`, or `sharded` with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    if how == "pt":
        torch.save(tensors, folder / "hf_ckpt.pt")
    elif how == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    elif how == "safetensors":
        save_file(tensors, folder / "model.safetensors")
    else:
        _save_sharded(folder, tensors)
    return folder


def _save_sharded(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    import json

    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, inside in shards.items():
        save_file({name: tensors[name] for name in inside}, folder / file)
    index = {"weight_map": {name: file for file, inside in shards.items() for name in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _saved(model: Any, folder: Path, family: str) -> Any:
    model.save_pretrained(folder)
    tokenizer_for(family).save_pretrained(folder)
    return model
