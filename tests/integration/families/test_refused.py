"""Families that no policy can be made of are refused by name, in one sentence, before anything is trained."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from conch.errors import ConchError
from tests.integration.families import tokenizers
from tests.integration.families.runs import FamilyRuns
from tests.integration.families.table import Family

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
