"""Pairwise models: which of two answers is better; an answer by itself gets no score, so they are refused."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.integration.reward_models.custom import llama_tokenizer
from tests.integration.reward_models.parts import (
    config_of,
    named_tensors,
    save_config,
    save_tensors,
    scattered,
    unigram,
)
from tests.integration.reward_models.replica import Messages, Pipeline, Replica


def deberta_tokenizer(*more: str) -> PreTrainedTokenizerFast:
    """Like that of DeBERTa v3; `more` special tokens."""
    return unigram(
        ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", *more),
        frame="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        mask_token="[MASK]",
    )


def _no_score(messages: Messages) -> list[float]:
    raise AssertionError("this model compares two answers and scores none")


def pairrm(folder: Path) -> Pipeline:
    """PairRM-hf and Better-PairRM: prompt and both answers are one text, each behind a token of its own."""
    more = ("<|source|>", "<|candidate|>", "<|candidate1|>", "<|candidate2|>")
    tokenizer = deberta_tokenizer(*more)
    config = config_of("deberta-v2", tokenizer)
    trunk = scattered(AutoModel.from_config(config))
    width = config.hidden_size
    head = nn.ModuleDict({"1": nn.Linear(2 * width, width), "4": nn.Linear(width, 3)})
    save_tensors(
        folder,
        {
            **named_tensors("pretrained_model.", trunk),
            **named_tensors("head_layer.", scattered(head, seed=1)),
        },
    )
    ids = tokenizer.convert_tokens_to_ids(list(more))
    names = ("source_prefix_id", "cand_prefix_id", "cand1_prefix_id", "cand2_prefix_id")
    keys = {"n_tasks": 3, "drop_out": 0.05, "sep_token_id": tokenizer.sep_token_id}
    places = dict(zip(names, ids, strict=True))
    save_config(folder, config, architectures=["DebertaV2PairRM"], **keys, **places)
    tokenizer.save_pretrained(folder)
    return _no_score


def steamshp(folder: Path) -> Pipeline:
    """SteamSHP-flan-t5: reads a post and two answers, and writes the letter of the better."""
    tokenizer = unigram(
        ("<pad>", "</s>", "[UNK]"),
        frame="$A </s>",
        pair="$A </s> $B </s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="[UNK]",
    )
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    scattered(T5ForConditionalGeneration(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return _no_score


def pair_preference(folder: Path) -> Pipeline:
    """pair-preference-model-LLaMA3-8B: a chat model that reads two answers, and writes A or B."""
    tokenizer = llama_tokenizer()
    model = scattered(AutoModelForCausalLM.from_config(config_of("llama", tokenizer)))
    save_tensors(folder, named_tensors("", model))
    save_config(folder, model.config, architectures=["LlamaForCausalLM"])
    tokenizer.save_pretrained(folder)
    return _no_score


PAIRWISE: tuple[Replica, ...] = (
    Replica("PairRM", pairrm, refused="(?i)pair", source="reward-bench pairrm.py, betterpairrm.py"),
    Replica("SteamSHP", steamshp, refused="(?i)pair", source="reward-bench shp.py"),
    Replica(
        "pair-preference-model", pair_preference, refused="(?i)pair", source="reward-bench slicpairpm.py"
    ),
)
