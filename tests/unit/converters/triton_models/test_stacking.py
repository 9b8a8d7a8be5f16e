"""Networks of real families as one: every member's scores, in any batch, are those of the member alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from conch.converters.triton_models.stacking import StackedNetwork, UnstackableError

MEMBERS = 3
_LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 66,
}
_GROUPED = {**_LLAMA, "num_key_value_heads": 1}
_HEADS = {**_GROUPED, "head_dim": 16}
_GPT = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": _HEADS,
    "gemma": _HEADS,
    "gemma2": {**_HEADS, "query_pre_attn_scalar": 16},
    "gemma3_text": {**_HEADS, "query_pre_attn_scalar": 16},
    "gpt_neox": _LLAMA,
    "gpt2": _GPT,
    "gptj": {**_GPT, "rotary_dim": 8},
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_dim": 48,
        "max_position_embeddings": 32,
    },
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "mixtral": {**_GROUPED, "num_local_experts": 4},
    "bert": _LLAMA,
    "roberta": _LLAMA,
    "albert": {**_LLAMA, "embedding_size": 16},
    "modernbert": {**_LLAMA, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8},
}
# Their attention reads weights past the modules that hold them.
UNSTACKABLE: dict[str, dict[str, Any]] = {
    "deberta-v2": {
        **_LLAMA,
        "relative_attention": True,
        "position_buckets": 16,
        "pos_att_type": ["p2c", "c2p"],
        "max_relative_positions": -1,
        "position_biased_input": False,
    },
    "t5": {
        "d_model": 32,
        "d_kv": 16,
        "d_ff": 48,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 2,
        "decoder_start_token_id": 0,
    },
}


def networks(family: str, shape: dict[str, Any], count: int = MEMBERS) -> list[Any]:
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(family, num_labels=1, vocab_size=40, **{**special, **shape})
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        network = AutoModelForSequenceClassification.from_config(config).eval()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        made.append(network.requires_grad_(False))
    return made


def batch(rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Ids and mask; each row is two tokens shorter than the one before."""
    ids = torch.randint(3, 40, (rows, length), generator=torch.Generator().manual_seed(rows * length))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        cut = max(1, length - 2 * row)
        mask[row, cut:] = ids[row, cut:] = 0
    return ids, mask


def together(stacked: StackedNetwork, ids: Tensor, mask: Tensor) -> Tensor:
    """Scores [members, rows]."""
    outputs = stacked.network(input_ids=stacked.repeated(ids), attention_mask=stacked.repeated(mask))
    return outputs.logits[:, 0].view(MEMBERS, len(ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_each_member_scores_what_it_scores_alone_whatever_the_padding(family: str) -> None:
    members = networks(family, FAMILIES[family])
    batches = [batch(rows, length) for rows, length in ((1, 1), (1, 7), (1, 12), (2, 5), (4, 9), (5, 16))]
    own = [
        torch.stack([member(input_ids=ids, attention_mask=mask).logits[:, 0] for member in members])
        for ids, mask in batches
    ]
    stacked = StackedNetwork(members)

    for (ids, mask), expected in zip(batches, own, strict=True):
        found = together(stacked, ids, mask)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)
        for row in range(len(ids)):
            length = int(mask[row].sum())
            alone = together(stacked, ids[row : row + 1, :length], mask[row : row + 1, :length])
            torch.testing.assert_close(alone[:, 0], found[:, row], rtol=1e-5, atol=2e-6)
    assert own[-1].std(dim=0).min() > 0.01  # or one member's weights would do for all


@pytest.mark.parametrize("family", UNSTACKABLE)
def test_families_that_read_weights_past_their_modules_fail_and_never_score_wrong(family: str) -> None:
    stacked = StackedNetwork(networks(family, UNSTACKABLE[family]))
    for rows, length in ((1, 7), (4, 9)):
        ids, mask = batch(rows, length)
        ids[:, -1] = 2  # an eos, which T5 looks for
        deberta = family == "deberta-v2"
        said = "code reads `weight` of its Embedding itself" if deberta else "shape|which has no rows"
        with pytest.raises((AttributeError, RuntimeError, UnstackableError), match=said):
            together(stacked, ids, mask)


def test_members_and_stack_share_their_weights_so_that_there_is_one_copy() -> None:
    members = networks("llama", FAMILIES["llama"])
    stacked = StackedNetwork(members)

    places = {member_parameter.data_ptr() for member in members for member_parameter in member.parameters()}
    assert len(places) == sum(len(list(member.parameters())) for member in members)
    layers: list[Any] = [each for each in stacked.network.modules() if hasattr(each, "_matrices")]
    assert len(layers) == 2 * 7 + 1
    for layer in layers:
        assert {matrix.data_ptr() for matrix in layer.weight} <= places
    bytes_held = sum(
        storage.nbytes() for storage in {p.untyped_storage() for m in members for p in m.parameters()}
    )
    single = sum(p.numel() * p.element_size() for m in members for p in m.parameters())
    assert bytes_held == single


def test_a_change_of_one_members_weights_changes_its_scores_alone() -> None:
    members = networks("qwen2", FAMILIES["qwen2"])
    stacked = StackedNetwork(members)
    ids, mask = batch(2, 8)
    before = together(stacked, ids, mask)
    members[1].model.layers[0].mlp.up_proj.weight.data.mul_(2)
    after = together(stacked, ids, mask)

    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert (before[1] - after[1]).abs().min() > 1e-4


def test_networks_of_other_shapes_buffers_or_classes_are_refused_by_name() -> None:
    (first,) = networks("llama", FAMILIES["llama"], count=1)
    (wide,) = networks("llama", {**FAMILIES["llama"], "intermediate_size": 64}, count=1)
    with pytest.raises(UnstackableError, match=r"mlp.gate_proj.weight is .*48.* and .*64"):
        StackedNetwork([first, wide])
    (other,) = networks("gpt2", FAMILIES["gpt2"], count=1)
    with pytest.raises(UnstackableError, match="LlamaForSequenceClassification and GPT2For"):
        StackedNetwork([first, other])
    (turned,) = networks("llama", FAMILIES["llama"], count=1)
    turned.model.rotary_emb.inv_freq.mul_(2)
    with pytest.raises(UnstackableError, match=r"buffers .*inv_freq differ"):
        StackedNetwork([first, turned])


def test_a_module_of_an_unknown_kind_runs_member_by_member() -> None:
    class Scaled(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor([scale]), requires_grad=False)

        def forward(self, values: Tensor, pair: tuple[Tensor, Tensor], shift: Tensor | None = None) -> Any:
            return values * self.scale, (pair[0] + self.scale, None if shift is None else shift * self.scale)

    class Outer(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scaled = Scaled(scale)

        def forward(self, values: Tensor) -> Any:
            return self.scaled(values, (values[:1] * 0, values), shift=values)

    stacked = StackedNetwork([Outer(2.0), Outer(3.0)])
    values = torch.tensor([[1.0], [10.0], [100.0]])
    scaled, (shifted, named) = stacked.network(stacked.repeated(values))

    assert scaled[:, 0].tolist() == [2.0, 20.0, 200.0, 3.0, 30.0, 300.0]
    assert named.tolist() == scaled.tolist()
    assert shifted[:, 0].tolist() == [2.0] * 3 + [3.0] * 3


def test_a_module_that_reads_what_has_no_rows_is_refused() -> None:
    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, values: Tensor) -> Tensor:
            return values + self.layer(torch.arange(7.0)[:, None])[:1]

    stacked = StackedNetwork([Places(), Places()])
    with pytest.raises(UnstackableError, match=r"\[7, 1\], which has no rows"):
        stacked.network(stacked.repeated(torch.zeros(2, 1)))
