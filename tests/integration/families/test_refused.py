"""Families that no policy can be made of are refused by name, in one sentence, before anything is trained."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from conch.errors import ConchError
from conch.rollouts.hf.decoding import Decoding, decoding_of
from tests.integration.families import tokenizers
from tests.integration.families.models import random_model
from tests.integration.families.runs import FamilyRuns
from tests.integration.families.table import FAMILIES, Family

_BERT_LIKE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@dataclass(frozen=True)
class Refusal:
    """A family, why no policy can be made of it, and what the sentence says of that."""

    family: Family
    why: str
    sentence: str


REFUSED = (
    Refusal(
        Family("bert_encoder", "dense", "bert", tokenizers.bert, _BERT_LIKE),
        "without `is_decoder` each token sees those behind it: SFT would learn to copy",
        r"BertLMHeadModel .*later tokens",
    ),
    Refusal(
        Family(
            "roberta_encoder",
            "dense",
            "roberta",
            tokenizers.roberta,
            {**_BERT_LIKE, "max_position_embeddings": 258},
        ),
        "the same",
        r"RobertaForCausalLM .*later tokens",
    ),
    Refusal(
        Family(
            "xlnet",
            "dense",
            "xlnet",
            tokenizers.gpt_neox,
            {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24},
        ),
        "it predicts tokens in any order, and sees all others",
        r"XLNetLMHeadModel .*later tokens",
    ),
    Refusal(
        Family(
            "xlm",
            "dense",
            "xlm",
            tokenizers.gpt_neox,
            {"emb_dim": 16, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 256},
        ),
        "without `causal` each token sees those behind it",
        r"XLMWithLMHeadModel .*later tokens",
    ),
    Refusal(
        Family(
            "reformer",
            "dense",
            "reformer",
            tokenizers.gpt_neox,
            {
                "hidden_size": 16,
                "num_attention_heads": 2,
                "attention_head_size": 8,
                "feed_forward_size": 24,
                "attn_layers": ["local", "local"],
                "local_attn_chunk_length": 8,
                "axial_pos_shape": [16, 16],
                "axial_pos_embds_dim": [8, 8],
                "is_decoder": True,
                "max_position_embeddings": 256,
            },
        ),
        "its positions want texts of one length, and its gradients training mode",
        r"ReformerModelWithLMHead cannot be trained",
    ),
    Refusal(
        Family(
            "prophetnet",
            "encoder-decoder",
            "prophetnet",
            tokenizers.bert,
            {
                "hidden_size": 16,
                **{f"{end}_ffn_dim": 24 for end in ("encoder", "decoder")},
                **{f"num_{end}_layers": 2 for end in ("encoder", "decoder")},
                **{f"num_{end}_attention_heads": 2 for end in ("encoder", "decoder")},
                "max_position_embeddings": 256,
                "ngram": 2,
                "num_buckets": 8,
                "relative_max_distance": 16,
            },
        ),
        "its logits of a token change once others follow",
        r"ProphetNetForConditionalGeneration .*later tokens",
    ),
    Refusal(
        Family(
            "fsmt",
            "encoder-decoder",
            "fsmt",
            tokenizers.marian,
            {
                "d_model": 16,
                **{f"{end}_layers": 2 for end in ("encoder", "decoder")},
                **{f"{end}_ffn_dim": 24 for end in ("encoder", "decoder")},
                **{f"{end}_attention_heads": 2 for end in ("encoder", "decoder")},
                **{f"{end}_vocab_size": 108 for end in ("src", "tgt")},
                "max_position_embeddings": 256,
                "langs": ["en", "de"],
            },
        ),
        "it scores a padded answer otherwise, and its head is no layer but the decoder's embeddings",
        r"FSMTForConditionalGeneration (scores a padded sample otherwise|has its decoder's embeddings)",
    ),
    Refusal(
        Family(
            "nllb_moe",
            "encoder-decoder",
            "nllb-moe",
            tokenizers.m2m100,
            {
                "d_model": 16,
                **{f"{end}_layers": 2 for end in ("encoder", "decoder")},
                **{f"{end}_ffn_dim": 24 for end in ("encoder", "decoder")},
                **{f"{end}_attention_heads": 2 for end in ("encoder", "decoder")},
                **{f"{end}_sparse_step": 2 for end in ("encoder", "decoder")},
                "max_position_embeddings": 256,
                "num_experts": 4,
            },
        ),
        "the experts' capacity in training is that of the evaluation pass before it",
        r"NllbMoeForConditionalGeneration leaves tokens out of experts that are full",
    ),
)


@pytest.mark.parametrize("algorithm", ["sft", "ppo", "grpo"])
@pytest.mark.parametrize("refusal", REFUSED, ids=lambda refusal: refusal.family.name)
def test_family_is_refused_by_name(refusal: Refusal, algorithm: str, tmp_path: Path) -> None:
    runs = FamilyRuns(refusal.family, tmp_path, lively=False)
    with pytest.raises(ConchError) as error:
        getattr(runs, algorithm)
    message = str(error.value)
    assert re.search(refusal.sentence, message)
    assert "\n" not in message and not (tmp_path / algorithm / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "way"), [("minimax", Decoding(True, False)), ("xlstm", Decoding(False, True))]
)
def test_family_is_sampled_in_the_slower_way_that_is_right(name: str, way: Decoding) -> None:
    """MiniMax's steps from a cache give other logits than a whole pass; xLSTM reads padding."""
    family = FAMILIES[name]
    assert decoding_of(random_model(family, family.tokenizer())) == way
