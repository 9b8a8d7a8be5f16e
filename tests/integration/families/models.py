"""Tiny random models of many families, saved as folders that load like the families' own checkpoints.

    folder = save_family(FAMILIES["llama3"], tmp_path)      config, weights, tokenizer, generation_config.json

Random weights are larger than usual, so that logits differ, and those of the tokens that end a turn larger
still, so that completions end here and there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tests.integration.families.table import Family

TEXTS = ("the boats", "why does the moon look larger when it", "two and two are", "she wrote a")
"""Prompts that are texts."""

LONGEST = 12
"""Tokens of the longest completion."""

QUESTION = ({"role": "user", "content": "is the harbour quiet?"},)
FOLLOW_UP = (
    {"role": "user", "content": "tell me a story"},
    {"role": "assistant", "content": "about a fox?"},
    {"role": "user", "content": "no, about a bridge"},
)
"""Prompts that are dialogues."""

_START_TOKENS = {
    "bart": "</s>",
    "mbart": "de_DE",
    "mbart_forced": "de_DE",
    "m2m_100": "</s>",
    "blenderbot": "<s>",
}
"""What the decoder reads first, where that is not the pad token."""


# ------------------------------------------------------------------------------------------------- building


def model_config(family: Family, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The family's config for this tokenizer, as its checkpoints have it."""
    special: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": _end_ids(family, tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family.kind == "encoder-decoder":
        start = _START_TOKENS.get(family.name, tokenizer.pad_token)
        special["decoder_start_token_id"] = tokenizer.convert_tokens_to_ids(start)
    special["vocab_size"] = len(tokenizer) + family.spare_rows
    shape = dict(family.shape)
    if "text_config" in shape:  # of a model that reads images as well
        shape["text_config"] = {**special, **shape["text_config"]}
    return AutoConfig.for_model(family.model_type, **special, **shape)


def random_model(family: Family, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0) -> PreTrainedModel:
    """A language model of the family, in float32 and evaluation mode."""
    config = model_config(family, tokenizer)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    torch.manual_seed(seed)
    lm = auto_class.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    embeddings = lm.get_input_embeddings().weight
    with torch.no_grad():
        for parameter in lm.parameters():
            of_this = 0.1 if parameter is embeddings else family.noise
            parameter.add_(of_this * torch.randn(parameter.shape, generator=generator))
        head = lm.get_output_embeddings()
        assert isinstance(head, (nn.Linear, nn.Embedding))
        head.weight.add_(0.2 * torch.randn(head.weight.shape, generator=generator))
        ends = _end_ids(family, tokenizer)
        head.weight[ends if isinstance(ends, list) else [ends]] *= 3.0
    generation = (
        {"decoder_start_token_id": config.decoder_start_token_id} if config.is_encoder_decoder else {}
    )
    if "forced_bos_token_id" in family.shape:
        generation["forced_bos_token_id"] = family.shape["forced_bos_token_id"]
    lm.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=_end_ids(family, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        **generation,
    )
    return lm


def save_family(family: Family, folder: Path, *, lively: bool = True) -> Path:
    """Write the family's checkpoint: config, weights, tokenizer and generation settings.

    lively: whether the likeliest completions of `TEXTS` have to end in different places; the weights are the
        first random ones of which that is true.
    """
    tokenizer = family.tokenizer()
    seeds = range(family.seed, family.seed + 100)
    models = (random_model(family, tokenizer, seed=seed) for seed in seeds)
    lm = next((lm for lm in models if not lively or _ends_here_and_there(lm, tokenizer)), None)
    assert lm is not None, f"no random {family.name} ends its completions in different places"
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _ends_here_and_there(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """True where one completion ends by the first end id after some tokens, and another elsewhere."""
    ends = lm.generation_config.eos_token_id
    first = ends[0] if isinstance(ends, list) else ends
    reader = "encoder" if lm.config.is_encoder_decoder else "decoder"
    completions = [greedy_completion(lm, prompt_ids(tokenizer, text, reader), LONGEST) for text in TEXTS]
    lengths = {len(completion) for completion in completions}
    return any(1 < len(ids) < LONGEST and ids[-1] == first for ids in completions) and len(lengths) > 1


def greedy_completion(lm: PreTrainedModel, ids: Sequence[int], max_new_tokens: int) -> list[int]:
    """What `transformers.generate` gives by the model's own generation_config, alone in its batch."""
    inputs = torch.tensor([list(ids)])
    output = lm.generate(  # pyright: ignore[reportCallIssue]
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=max_new_tokens + len(forced_ids(lm)),
        do_sample=False,
    )
    assert isinstance(output, torch.Tensor)
    return output[0, 1 + len(forced_ids(lm)) if lm.config.is_encoder_decoder else len(ids) :].tolist()


def forced_ids(lm: PreTrainedModel) -> list[int]:
    """What the decoder is made to begin with, behind its start token: a language, or nothing."""
    forced = lm.generation_config.forced_bos_token_id  # pyright: ignore[reportOptionalMemberAccess]
    return [] if forced is None else [int(forced)]


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Mapping[str, str]],
    reader: Literal["encoder", "decoder"],
) -> list[int]:
    """Ids of a prompt, by transformers alone: a text with the special tokens that its tokenizer adds, a
    dialogue with those that its template writes.

    reader: what reads them; nothing closes what a decoder goes on with.
    """
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
        return ids[:-1] if reader == "decoder" and ids[-1] == tokenizer.eos_token_id else ids
    rendered = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=True)
    return list(rendered["input_ids"])


def _end_ids(family: Family, tokenizer: PreTrainedTokenizerBase) -> int | list[int] | None:
    if not family.ends:
        return tokenizer.eos_token_id
    ids = [tokenizer.convert_tokens_to_ids(token) for token in family.ends]
    return ids[0] if len(ids) == 1 else ids
