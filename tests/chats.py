"""Tiny tokenizers with chat templates in the form of well-known families, in words of our own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from tests.checkpoints import config_of, random_model

LLAMA = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n{{ message.content | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not thinks %}-{% endif %}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ raise_exception('this model has no system turn') }}{% endif %}"
    "<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ message.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
CHATS: dict[str, dict[str, Any]] = {
    "llama": {
        "template": LLAMA,
        "bos": "<|begin_of_text|>",
        "eos": "<|eot_id|>",
        "more": ["<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_0|>"],
        "adds_bos": True,
    },
    "chatml": {
        "template": CHATML,
        "bos": None,
        "eos": "<|im_end|>",
        "more": ["<|im_start|>"],
        "adds_bos": False,
    },
    "gemma": {
        "template": GEMMA,
        "bos": "<bos>",
        "eos": "<eos>",
        "more": ["<start_of_turn>", "<end_of_turn>"],
        "adds_bos": True,
    },
}
"""Family -> its special tokens, whether its tokenizer opens a text with the bos, and its chat template."""

WINDOW = 160


def chat_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A byte a token, then <pad> and the family's special tokens."""
    chat = CHATS[family]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", *([chat["bos"]] if chat["bos"] else []), chat["eos"], *chat["more"]]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if chat["adds_bos"]:
        bos = chat["bos"]
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token=chat["bos"], eos_token=chat["eos"]
    )
    fast.chat_template = chat["template"]
    return fast


def chat_reward_model(folder: Path, family: str, *, seed: int = 0, window: int = WINDOW) -> Any:
    """Save a random classifier with the family's tokenizer; returns it. window: positions that it has."""
    tokenizer = chat_tokenizer(family)
    config = config_of(
        "llama",
        num_labels=1,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        max_position_embeddings=window,
    )
    model = random_model(AutoModelForSequenceClassification, config, seed=seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def qwen_policy(folder: Path, *, window: int) -> None:
    """Save a random Qwen 2 that chats. window: positions that it has."""
    tokenizer = chat_tokenizer("chatml")
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = AutoConfig.for_model(
        "qwen2", vocab_size=len(tokenizer), max_position_embeddings=window, **special, **shape, **heads
    )
    random_model(AutoModelForCausalLM, config, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
