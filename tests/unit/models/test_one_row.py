"""Attention that takes lengths instead of masks (flash-attention's) reads all samples in one row, and gives
what padded rows give."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.models.gptj import modeling_gptj

from conch.data.packing import collate_packed
from conch.data.samples import TokenizedSample, collate
from conch.errors import ConfigError
from conch.models.adapter import add_adapter
from conch.models.attention import attention_inputs, check_packing
from conch.models.forward import BatchPacker, padded_rows, takes_packed_rows
from conch.models.freezing import checkpoint_activations, freeze_trunk
from conch.models.policy import PolicyWithValue
from conch.models.reference import build_reference
from conch.ops import entropy
from conch.trainers.sft import token_loss_sum
from tests.runs import (
    LINEAR_ADAM,
    batch_of,
    grpo_trainer,
    parameters,
    policy,
    ppo_trainer,
    sft_trainer,
)
from tests.tiny import DECODERS, decoder_shape, padded_batch, tiny_decoder
from tests.varlen import NAME, reference_kernels

PAD = 21
PROMPTS = [[1, 2, 3, 4], [5, 6], [1, 2, 3, 4], [1, 2, 3, 4], [7, 8, 9], [2]]
RESPONSES = [[10, 11, 12], [13, 14, 15, 16, 17], [18, 17], [], [19, 20], [3]]
QWEN3 = {**DECODERS["llama"], "head_dim": 16, "num_key_value_heads": 1}
TAKERS = ("gpt2", "llama", "qwen2", "qwen3", "gpt_neox", "opt")
"""Families whose models hand lengths on to their attention."""


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    with reference_kernels():
        yield


def decoder(family: str, **overrides: Any) -> PreTrainedModel:
    """In float64; its attention is sdpa."""
    if family != "qwen3":
        return tiny_decoder(family, **overrides)
    torch.manual_seed(0)
    shape = {"vocab_size": 24, "pad_token_id": PAD, "eos_token_id": 22, **QWEN3, **overrides}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **shape)).eval().double()


def reading_lengths(lm: PreTrainedModel) -> PreTrainedModel:
    lm.set_attn_implementation(NAME)
    assert lm.config._attn_implementation == NAME
    return lm


def a_batch(
    prompts: list[list[int]] = PROMPTS, responses: list[list[int]] = RESPONSES
) -> tuple[Tensor, Tensor, int]:
    return padded_batch(prompts, responses, PAD)


def awake(module: PolicyWithValue) -> PolicyWithValue:
    torch.manual_seed(2)
    for parameter in module.value_head.parameters():
        torch.nn.init.normal_(parameter)
    return module.double()


def measured(module: PolicyWithValue, rows: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs, values and entropies, [3, B, R], and the gradients of a loss of the first two."""
    output = module(rows.inputs)
    logprobs, values = rows.logprobs(output.logits, 0.7), rows.unpack(output.values)
    module.zero_grad()
    weights = torch.linspace(1, 2, logprobs.numel()).view_as(logprobs)
    ((logprobs * weights).sum() + values.square().sum()).backward()
    spread = rows.unpack(entropy(output.logits.detach(), 0.7))
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return torch.stack([logprobs.detach(), values.detach(), spread]), gradients


BATCHES = [
    (PROMPTS, RESPONSES),
    ([[4, 5, 6]], [[7, 8]]),
    ([[4, 5, 6]], [[7]]),
    ([[1], [2]], [[3, 4, 5, 6], []]),
]


@pytest.mark.parametrize("value_layers", [0, 2])
@pytest.mark.parametrize("family", TAKERS)
def test_one_row_gives_the_outputs_and_gradients_of_padded_ones(family: str, value_layers: int) -> None:
    expected = []
    lm = decoder(family)
    for batch in BATCHES:
        module = awake(PolicyWithValue(lm, num_value_layers=value_layers))
        expected.append(measured(module, padded_rows(*a_batch(*batch))))
    packer = BatchPacker(reading_lengths(lm))
    assert packer.packs and not takes_packed_rows(lm)
    for batch, (outputs, gradients) in zip(BATCHES, expected, strict=True):
        rows = packer.pack(*a_batch(*batch))
        assert rows.inputs.attention_mask is None, "there is no mask"
        found, moved = measured(awake(PolicyWithValue(lm, num_value_layers=value_layers)), rows)
        torch.testing.assert_close(found, outputs, rtol=1e-9, atol=1e-9)
        assert moved.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(moved[name], gradient, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_padded_rows_of_such_attention_are_those_of_any_other(family: str) -> None:
    lm = decoder(family)
    expected, _ = measured(awake(PolicyWithValue(lm)), padded_rows(*a_batch()))
    found, _ = measured(awake(PolicyWithValue(reading_lengths(lm))), padded_rows(*a_batch()))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_each_sample_stands_in_the_row_with_its_own_prompt_and_without_its_last_token() -> None:
    prompts, responses = [[1, 2, 3], [1, 2, 3], [4], [5]], [[6, 7], [8], [], [9, 10, 11]]
    ids, mask, chosen, positions = (
        BatchPacker(reading_lengths(decoder("llama"))).pack(*a_batch(prompts, responses)).inputs
    )
    assert mask is None
    assert ids.tolist() == [[1, 2, 3, 6, 1, 2, 3, 5, 9, 10]]
    assert positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 2]]
    assert chosen.tolist() == [2, 3, 6, 7, 8, 9]


def test_lengths_are_found_once_for_all_blocks_and_are_plain_numbers() -> None:
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 0, 1]])
    told = attention_inputs(reading_lengths(decoder("llama")), None, positions)
    assert told.keys() == {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
    assert told["cu_seq_lens_q"].tolist() == told["cu_seq_lens_k"].tolist() == [0, 4, 7, 8, 10]
    assert told["max_length_q"] == told["max_length_k"] == 4 and isinstance(told["max_length_q"], int)


@pytest.mark.parametrize("kind", ["full", "trunk", "adapter"])
@torch.no_grad()
def test_references_read_the_row_and_start_as_the_policy(kind: str) -> None:
    unfrozen = 1 if kind == "trunk" else -1
    lm = decoder("llama")
    freeze_trunk(lm, unfrozen)
    if kind == "adapter":
        lm.name_or_path = "somewhere"
        add_adapter(lm, {"r": 2, "target_modules": ["q_proj"]}, merged_when_saved=True)
    reference = build_reference(lm, unfrozen)
    padded = padded_rows(*a_batch())
    with reference.recording():
        lm(input_ids=padded.inputs.input_ids, attention_mask=padded.inputs.attention_mask.long())
        expected = PolicyWithValue(lm)(padded.inputs)
    expected = padded.logprobs(expected.logits, 1.0)
    module = PolicyWithValue(reading_lengths(lm))
    reference, rows = build_reference(lm, unfrozen), BatchPacker(lm).pack(*a_batch())
    assert rows.inputs.attention_mask is None
    with reference.recording():
        logits = module(rows.inputs).logits
    found = reference.logits(rows.inputs)
    assert torch.equal(found, logits)
    torch.testing.assert_close(rows.logprobs(found, 1.0), expected, rtol=1e-9, atol=1e-9)


def test_checkpointed_blocks_are_told_the_lengths_again() -> None:
    lm = reading_lengths(decoder("qwen2"))
    rows = BatchPacker(lm).pack(*a_batch())
    _, expected = measured(awake(PolicyWithValue(lm)), rows)
    expected = {name: gradient.clone() for name, gradient in expected.items()}
    checkpoint_activations(lm)
    _, found = measured(awake(PolicyWithValue(lm)).train(), rows)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_a_sliding_window_is_kept_to_within_each_sample() -> None:
    """Whatever their lengths; a mask over the row could not."""
    lm = decoder("qwen2", use_sliding_window=True, max_window_layers=1, sliding_window=4)
    padded = padded_rows(*a_batch())
    expected = padded.logprobs(PolicyWithValue(lm)(padded.inputs).logits, 1.0)
    rows = BatchPacker(reading_lengths(lm)).pack(*a_batch())
    assert rows.inputs.attention_mask is None
    found = rows.logprobs(PolicyWithValue(lm)(rows.inputs).logits, 1.0)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    check_packing(lm, 12)


def test_responses_without_a_token_still_run_the_model() -> None:
    """DDP waits for a gradient of every parameter."""
    module = awake(PolicyWithValue(reading_lengths(decoder("gpt2"))))
    rows = BatchPacker(module.lm).pack(*a_batch([[1, 2], [3]], [[], []]))
    outputs, gradients = measured(module, rows)
    assert not outputs.any() and len(gradients) == len(list(module.parameters()))


# ------------------------------------------------------------------------------------- what is padded still


def closed(lm: PreTrainedModel) -> PreTrainedModel:
    """Its forward pass has no room for lengths."""
    wrapped = lm.forward

    def forward(
        input_ids: Any, attention_mask: Any = None, position_ids: Any = None, use_cache: Any = None
    ) -> Any:
        return wrapped(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache
        )

    lm.forward = forward  # pyright: ignore[reportAttributeAccessIssue]
    return lm


def deaf(lm: PreTrainedModel) -> PreTrainedModel:
    """It takes lengths, and hands neither them nor positions on."""
    wrapped = lm.forward

    def forward(input_ids: Any, position_ids: Any = None, attention_mask: Any = None, **_: Any) -> Any:
        return wrapped(input_ids, attention_mask=attention_mask)

    lm.forward = forward  # pyright: ignore[reportAttributeAccessIssue]
    return lm


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        (closed, r"`sft.packing` needs attention that takes a mask"),
        (deaf, r"`sft.packing` is not possible: GPT2LMHeadModel looks from one sample at another"),
    ],
)
def test_models_that_do_not_hand_lengths_on_read_padded_rows(change: Any, refusal: str) -> None:
    packer = BatchPacker(change(reading_lengths(decoder("llama"))))
    assert not packer.packs
    assert packer.pack(*a_batch()).inputs.positions == 6
    with pytest.raises(ConfigError, match=refusal):
        check_packing(change(reading_lengths(policy())), 8)


def test_attention_in_chunks_is_padded() -> None:
    """Chunks are counted from the beginning of the row."""
    lm = reading_lengths(decoder("llama"))
    lm.config.attention_chunk_size = 4
    assert not BatchPacker(lm).packs


def test_encoder_decoders_are_padded() -> None:
    lm = tiny_decoder("t5")
    lm.config._attn_implementation = NAME
    assert not BatchPacker(lm).packs


def test_gptj_whose_flash_attention_takes_no_lengths_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its module imports it where flash-attention is installed.
    monkeypatch.setattr(modeling_gptj, "_flash_attention_forward", _flash_attention_forward, raising=False)
    shape = decoder_shape("gptj")
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    lm = AutoModelForCausalLM.from_config(config, attn_implementation=NAME).eval().double()
    assert type(lm.transformer.h[0].attn).__name__ == "GPTJFlashAttention2"
    assert not BatchPacker(lm).packs


# ------------------------------------------------------------------------------------------------- trainers


@pytest.mark.parametrize("make", [ppo_trainer, grpo_trainer])
@pytest.mark.parametrize("model", [{}, {"num_layers_unfrozen": 1}])
def test_an_update_on_one_row_is_that_on_padded_ones(
    tmp_path: Path, make: Any, model: dict[str, Any]
) -> None:
    moved, metrics, rollouts = [], [], None
    for lm in (policy(), reading_lengths(policy())):
        trainer = make(
            tmp_path / lm.config._attn_implementation,
            lm=lm,
            model=model,
            optimizer=LINEAR_ADAM,
            train={"gradient_accumulation_steps": 2},
        )
        assert trainer.packer.packs
        count = 2 if make is grpo_trainer else 8
        sampled = trainer.rollout(trainer.prompts[:count])
        rewards = trainer.score(sampled)
        # The same samples for both: these samplers add up in another order.
        rollouts = rollouts or (sampled, rewards)
        batch = batch_of(trainer, *rollouts)
        metrics.append(trainer.update(batch)["train/loss"])
        moved.append(parameters(trainer.policy))
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-9, atol=1e-11)
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-6, abs=1e-9)


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("settings", [{}, {"ppo": {"num_value_layers_unfrozen": 1}}])
def test_float32_weights_train_by_mixed_precision(tmp_path: Path, settings: dict[str, Any]) -> None:
    """The kernels take half precision only, also where the model is tried out."""
    trainer = ppo_trainer(
        tmp_path, lm=reading_lengths(policy()), train={"mixed_precision": "bf16"}, **settings
    )
    assert trainer.packer.packs and trainer.engine.precision == "bf16"
    before = parameters(trainer.policy)
    assert trainer.step()["rollout/logprob_diff"] < 0.05
    assert not torch.equal(parameters(trainer.policy), before)


# ------------------------------------------------------------------------------------------------------ SFT


@pytest.mark.parametrize("family", TAKERS)
def test_packed_samples_of_sft_learn_what_they_learn_side_by_side(family: str) -> None:
    samples = [
        TokenizedSample(tuple(range(1, 1 + length)), (True,) * length) for length in (1, 9, 4, 2, 7, 12, 3)
    ]
    lm = decoder(family)
    expected = token_loss_sum(lm, collate(samples, PAD))
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}
    lm.zero_grad()
    check_packing(reading_lengths(lm), 12)
    packed = collate_packed(samples, PAD, capacity=14)
    assert packed.input_ids.shape == (3, 14)
    loss = token_loss_sum(lm, packed)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    for name, parameter in lm.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-7, atol=1e-9)


@pytest.mark.usefixtures("fresh_accelerate")
def test_packed_sft_runs_by_mixed_precision(tmp_path: Path) -> None:
    lm, settings = reading_lengths(policy()), {"packing": True, "batch_size": 3}
    trainer = sft_trainer(
        tmp_path, ["abc", "hg", "de"], lm=lm, sft=settings, train={"mixed_precision": "bf16"}
    )
    assert torch.isfinite(torch.tensor(trainer.step()["train/loss"]))
