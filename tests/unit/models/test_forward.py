"""Packed rows, with prompts that responses share, give what padded rows give: outputs, gradients, updates."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from conch.models.forward import (
    BatchPacker,
    ForwardBatch,
    Piece,
    RowCost,
    best_layout,
    padded_rows,
    row_cost,
)
from conch.models.freezing import freeze_trunk
from conch.models.policy import PolicyWithValue
from conch.models.reference import build_reference
from conch.ops import logprobs_of_labels
from tests.numerics import family_rounding, network_rounding
from tests.runs import LINEAR_ADAM, batch_of, grpo_trainer, parameters, policy, ppo_trainer
from tests.tiny import DECODERS, padded_batch, tiny_decoder

PAD = 21
PROMPTS = [[1, 2, 3, 4], [5, 6], [1, 2, 3, 4], [1, 2, 3, 4], [7, 8, 9], [2]]
RESPONSES = [[10, 11, 12], [13, 14, 15, 16, 17], [18, 17], [], [19, 20], [3, 3, 3, 3]]
"""One prompt has three responses, one of them empty."""


def a_batch(
    prompts: list[list[int]] = PROMPTS, responses: list[list[int]] = RESPONSES
) -> tuple[Tensor, Tensor, int]:
    return padded_batch(prompts, responses, PAD)


def awake(policy: PolicyWithValue) -> PolicyWithValue:
    torch.manual_seed(2)
    for parameter in policy.value_head.parameters():
        torch.nn.init.normal_(parameter)
    return policy


def found(policy: PolicyWithValue, rows: ForwardBatch) -> tuple[Tensor, Tensor]:
    output = policy(rows.inputs)
    return rows.unpack(logprobs_of_labels(output.logits, rows.labels, 0.7)), rows.unpack(output.values)


@pytest.mark.parametrize("value_layers", [0, 2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", DECODERS)
def test_packed_rows_give_the_outputs_and_gradients_of_padded_ones(
    family: str, attention: str, value_layers: int
) -> None:
    # Eager attention takes its softmax in float32, where the least float64 of a mask becomes -inf.
    is_exact = attention == "sdpa"
    lm = tiny_decoder(family, dtype=torch.float64 if is_exact else torch.float32)
    lm.set_attn_implementation(attention)
    packer = BatchPacker(lm)
    assert packer.packs
    outputs, gradients = [], []
    for rows in (padded_rows(*a_batch()), packer.pack(*a_batch())):
        module = awake(PolicyWithValue(lm, num_value_layers=value_layers))
        logprobs, values = found(module, rows)
        module.zero_grad()
        (
            (logprobs * torch.linspace(1, 2, logprobs.numel()).view_as(logprobs)).sum()
            + values.square().sum()
        ).backward()
        outputs.append(torch.stack([logprobs, values]).detach())
        gradients.append({name: p.grad for name, p in module.named_parameters() if p.grad is not None})
    bound = family_rounding(family, outputs[0]) if is_exact else network_rounding(outputs[0])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=bound)
    assert (outputs[0][:, ~a_batch()[1][:, -a_batch()[2] :]] == 0).all()
    assert gradients[0].keys() == gradients[1].keys()
    largest = max(float(gradient.abs().max()) for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=bound * largest)


@pytest.mark.parametrize("unfrozen", [-1, 1])
@torch.no_grad()
def test_references_read_packed_rows_and_start_as_the_policy(unfrozen: int) -> None:
    lm = tiny_decoder("llama")
    freeze_trunk(lm, unfrozen)
    policy, reference, rows = (
        PolicyWithValue(lm),
        build_reference(lm, unfrozen),
        BatchPacker(lm).pack(*a_batch()),
    )
    with reference.recording():
        logits = policy(rows.inputs).logits
    assert torch.equal(reference.logits(rows.inputs), logits)
    assert logits.shape[:2] == (1, sum(map(len, RESPONSES)))


def test_a_prompt_is_read_once_for_its_responses_and_last_tokens_not_at_all() -> None:
    ids, _, chosen_at, positions = BatchPacker(tiny_decoder("gpt2")).pack(*a_batch()).inputs
    # Pieces of 7, 6, 4 and 4 columns. Last tokens (12, 17, ...) are not read.
    assert ids.tolist() == [
        [1, 2, 3, 4, 10, 11, 18, 7, 8, 9, 19],
        [5, 6, 13, 14, 15, 16, 2, 3, 3, 3, 0],
    ]
    responses = [3, 4, 5], [12, 13, 14, 15, 16], [3, 6], [9, 10], [17, 18, 19, 20]
    assert isinstance(chosen_at, Tensor) and chosen_at.tolist() == [
        column for each in responses for column in each
    ]
    assert positions is not None and positions[0].tolist() == [0, 1, 2, 3, 4, 5, 4, 0, 1, 2, 3]


def test_responses_to_one_prompt_share_it_beyond_its_own_length() -> None:
    prompts, responses = [[1, 2, 3, 4, 5, 6]] * 5, [[7, 8, 9]] * 5
    ids = BatchPacker(tiny_decoder("gpt2")).pack(*a_batch(prompts, responses)).inputs.input_ids
    # With D = 32, 16 columns at 6 * 32 + 2 * 16 each cost less than two rows of 12 at 6 * 32 + 2 * 12.
    assert ids.tolist() == [[1, 2, 3, 4, 5, 6, *[7, 8] * 5]]


def test_short_samples_stand_in_one_row() -> None:
    prompts, responses = [[1, 2, 3, 4], [5], [6]], [[7, 8, 9], [10, 11], [12, 13]]
    ids = BatchPacker(tiny_decoder("gpt2")).pack(*a_batch(prompts, responses)).inputs.input_ids
    assert ids.tolist() == [[1, 2, 3, 4, 7, 8, 5, 10, 6, 12]]


def test_a_gpu_shares_a_prompt_up_to_its_own_length() -> None:
    """The cost of rows was measured on CPUs."""
    lm: Any = tiny_decoder("gpt2")
    assert row_cost(lm.to("meta")) is None
    layout = best_layout([group(6, [2] * 5)], None, None)
    assert layout is not None and (layout.pieces, layout.width) == ([(0, 3), (0, 2)], 12)


def test_a_prompt_is_shared_where_that_costs_less_than_reading_it_again() -> None:
    # One row of 16 columns costs 16 * (6 D + 2 * 16), three of 8 cost 24 * (6 D + 2 * 8): equal at D = 8 / 3.
    narrow, wide = (best_layout([group(4, [4] * 3)], RowCost(size), None) for size in (2, 3))
    assert narrow is not None and (narrow.contents, narrow.width) == ([[0], [1], [2]], 8)
    assert wide is not None and (wide.contents, wide.width) == ([[0]], 16)


def test_eager_attention_weighs_a_column_once_for_each_head() -> None:
    lm = tiny_decoder("gpt2", n_head=4)
    lm.set_attn_implementation("eager")
    assert row_cost(lm) == RowCost(32, 4)
    lm.set_attn_implementation("sdpa")
    assert row_cost(lm) == RowCost(32, 2)


def group(prompt_length: int, read_tokens: Sequence[int], first: int = 0) -> Piece:
    """A prompt with responses of which so many tokens are read."""
    return Piece(first, prompt_length, list(enumerate(read_tokens, start=first)))


def test_no_row_of_several_samples_is_wider_than_the_limits() -> None:
    many, cost = [group(100, [20] * 200)], RowCost(10**6)  # so dear that one row of 4100 would be the best
    layout = best_layout(many, cost, None)
    assert layout is not None and len(layout.contents) > 1 and layout.width <= 4096
    layout = best_layout(many, cost, 512)
    assert layout is not None and (len(layout.contents), layout.width) == (10, 500)
    alone = best_layout([group(8000, [500, 500])], cost, None)
    assert alone is not None and alone.width == 9000, "as without a cost, and no narrower row holds more"
    assert best_layout([group(8000, [500, 500])], cost, 8499) is None
    fits = best_layout([group(8000, [500, 500])], cost, 8500)
    assert fits is not None and (len(fits.contents), fits.width) == (2, 8500)


def test_layouts_hold_each_response_once_and_cost_no_more_than_those_of_a_gpu() -> None:
    draw = random.Random(0)
    for _ in range(200):
        size = draw.choice([1, 8, 64, 512])
        groups = [
            group(draw.randint(1, 80), [draw.randint(0, 60) for _ in range(draw.randint(1, 8))], 8 * number)
            for number in range(draw.randint(1, 6))
        ]
        layouts = [best_layout(groups, cost, None) for cost in (RowCost(size), None)]
        costs = []
        for layout in layouts:
            assert layout is not None
            rows = layout.rows(groups)
            responses = [each for row in rows for piece in row for each in piece.responses]
            assert sorted(responses) == sorted(each for family in groups for each in family.responses)
            assert layout.width == max(sum(piece.length for piece in row) for row in rows)
            costs.append(RowCost(size).of_rows(len(rows), layout.width))
        assert costs[0] <= costs[1]


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_one_row_of_many_samples_gives_the_outputs_of_padded_ones(family: str) -> None:
    """Their row is wider than the positions that the model has."""
    prompts, responses = [[1, 2, 3, 4, 5, 6]] * 8, [[10, number, 12, 13, 14] for number in range(8)]
    lm = tiny_decoder(family)
    rows, padded = (
        BatchPacker(lm).pack(*a_batch(prompts, responses)),
        padded_rows(*a_batch(prompts, responses)),
    )
    assert rows.inputs.input_ids.shape == (1, 6 + 8 * 4)
    module = awake(PolicyWithValue(lm))
    outputs, expected = (torch.stack(found(module, each)) for each in (rows, padded))
    torch.testing.assert_close(outputs, expected, rtol=0, atol=family_rounding(family, expected))


@torch.no_grad()
def test_no_row_is_wider_than_a_causal_mask_of_fixed_size() -> None:
    shape = {"hidden_size": 32, "num_heads": 2, "num_layers": 2, "attention_types": [[["global"], 2]]}
    config = AutoConfig.for_model(
        "gpt_neo", vocab_size=24, pad_token_id=21, eos_token_id=22, max_position_embeddings=10, **shape
    )
    lm = AutoModelForCausalLM.from_config(config).eval().double()
    rows, padded = BatchPacker(lm).pack(*a_batch()), padded_rows(*a_batch())
    assert rows.inputs.position_ids is not None and rows.inputs.input_ids.shape == (3, 8)
    module = PolicyWithValue(lm)
    expected = found(module, padded)[0]
    torch.testing.assert_close(
        found(module, rows)[0], expected, rtol=0, atol=family_rounding("gpt_neo", expected)
    )


def test_responses_without_a_token_still_run_the_model() -> None:
    """DDP waits for a gradient of every parameter."""
    policy, rows = awake(PolicyWithValue(tiny_decoder("gpt2"))), None
    rows = BatchPacker(policy.lm).pack(*a_batch([[1, 2], [3]], [[], []]))
    logprobs, values = found(policy, rows)
    (logprobs.sum() + values.sum()).backward()
    assert logprobs.shape == (2, 2) and (logprobs == 0).all()
    assert all(p.grad is not None and not p.grad.any() for p in policy.parameters())


def bloom() -> Any:
    config = AutoConfig.for_model("bloom", vocab_size=24, hidden_size=32, n_layer=2, n_head=2)
    return AutoModelForCausalLM.from_config(config).eval()


def forgetful() -> Any:
    lm = policy()
    wrapped = lm.forward

    def forward(position_ids: Any = None, attention_mask: Any = None, **inputs: Any) -> Any:
        return wrapped(**inputs)

    lm.forward = forward  # pyright: ignore[reportAttributeAccessIssue]
    return lm


@pytest.mark.parametrize("made", [bloom, lambda: tiny_decoder("t5"), forgetful])
def test_models_that_take_no_packed_rows_read_padded_ones(made: Any) -> None:
    packer = BatchPacker(made())
    assert not packer.packs
    ids, mask, num_response, _ = packer.pack(*a_batch()).inputs
    assert ids.shape == (6, 4 + 6) and num_response == 6, "columns before the longest prompt are gone"
    assert torch.equal(ids[mask], a_batch()[0][a_batch()[1]])


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 5}),
        (
            "gpt_neo",
            {"attention_types": [[["global", "local"], 1]], "window_size": 5, "num_layers": 2},
        ),
    ],
)
@torch.no_grad()
def test_rows_longer_than_a_local_attention_sees_are_padded(family: str, settings: dict[str, Any]) -> None:
    """Their mask would let tokens look further back than the model ever did."""
    shape = {"hidden_size": 32, "num_heads": 2, "max_position_embeddings": 32, "bos_token_id": None}
    settings = {**settings, **(shape if family == "gpt_neo" else {})}
    if family == "gpt_neo":
        config = AutoConfig.for_model("gpt_neo", vocab_size=24, pad_token_id=21, eos_token_id=22, **settings)
        lm = AutoModelForCausalLM.from_config(config).eval()
    else:
        lm = tiny_decoder(family, **settings)
    packer = BatchPacker(lm)
    assert packer.pack(*a_batch()).inputs.position_ids is None
    short = a_batch([[1, 2], [3]], [[4, 5, 6], [7]])
    rows, padded = packer.pack(*short), padded_rows(*short)
    assert rows.inputs.position_ids is not None
    module = PolicyWithValue(lm)
    wanted = found(module, padded)[0]
    torch.testing.assert_close(found(module, rows)[0], wanted, rtol=0, atol=family_rounding(family, wanted))


@pytest.mark.parametrize("make", [ppo_trainer, grpo_trainer])
def test_an_update_on_packed_rows_is_that_on_padded_ones(tmp_path: Path, make: Any) -> None:
    moved, metrics = [], []
    for packs in (False, True):
        trainer = make(
            tmp_path / str(packs),
            lm=policy(),
            optimizer=LINEAR_ADAM,
            train={"gradient_accumulation_steps": 2},
        )
        assert trainer.packer.packs
        trainer.packer.packs = packs
        rollouts = trainer.rollout(trainer.prompts[:2] if make is grpo_trainer else trainer.prompts[:8])
        batch = batch_of(trainer, rollouts, trainer.score(rollouts))
        metrics.append(trainer.update(batch)["train/loss"])
        moved.append(parameters(trainer.policy))
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-9, atol=1e-11)
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-6, abs=1e-9)
