"""Packed samples learn what they learn side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from conch.data.packing import collate_packed
from conch.data.samples import TokenizedSample, collate
from conch.errors import ConfigError
from conch.models.attention import check_packing, isolating_mask, packed_logits
from conch.trainers.sft import token_loss_sum
from tests.numerics import family_rounding, network_rounding
from tests.runs import LINEAR_ADAM, parameters, policy, sft_trainer
from tests.tiny import DECODERS, tiny_decoder

PAD = 21
LENGTHS = (1, 9, 4, 2, 7, 12, 3, 3)
# Between 4 and 12 tokens: strings, pairs, and one that fills a row by itself.
TEXTS = [
    "abcdefghabc",
    "gh",
    {"prompt": "abc", "completion": "de"},
    "hgf",
    {"prompt": "", "completion": "cab"},
    "ab",
]


def some_samples() -> list[TokenizedSample]:
    """Of many lengths, with prompts and with gaps in what is learned."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for length in LENGTHS:
        ids = torch.randint(0, PAD, (length,), generator=generator).tolist()
        learned = torch.rand(length, generator=generator) < 0.6
        made.append(TokenizedSample(tuple(ids), tuple(learned.tolist())))
    return made


def gradient(lm: PreTrainedModel, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    lm.zero_grad()
    loss = token_loss_sum(lm, batch)
    loss.backward()
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in lm.parameters()]
    return loss.detach(), torch.cat([grad.flatten() for grad in grads])


@pytest.mark.parametrize("family", DECODERS)
def test_packing_changes_neither_loss_nor_gradient(family: str) -> None:
    lm, samples = tiny_decoder(family), some_samples()
    loss, expected = gradient(lm, collate(samples, PAD))
    packed = collate_packed(samples, PAD, capacity=14)
    assert packed.input_ids.shape == (3, 14)
    found_loss, found = gradient(lm, packed)
    torch.testing.assert_close(found_loss, loss, rtol=0, atol=family_rounding(family, loss))
    torch.testing.assert_close(found, expected, rtol=0, atol=family_rounding(family, expected))


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_packing_changes_nothing_where_attention_is_plain(family: str) -> None:
    lm, samples = tiny_decoder(family), some_samples()
    loss, expected = gradient(lm, collate(samples, PAD))
    lm.set_attn_implementation("eager")
    found_loss, found = gradient(lm, collate_packed(samples, PAD, capacity=14))
    # Eager attention takes its softmax in float32.
    torch.testing.assert_close(found_loss, loss, rtol=0, atol=network_rounding(loss))
    torch.testing.assert_close(found, expected, rtol=0, atol=network_rounding(expected))


@pytest.mark.parametrize("family", DECODERS)
def test_packing_leaves_a_bfloat16_loss_where_it_was(family: str) -> None:
    # autocast leaves float64 as it is
    lm, samples = tiny_decoder(family, dtype=torch.float32), some_samples()
    exact, _ = gradient(lm, collate(samples, PAD))
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = gradient(lm, collate_packed(samples, PAD, capacity=14))
    assert found != exact
    torch.testing.assert_close(found, exact, rtol=1e-2, atol=0)


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_packed_samples_have_the_logits_that_they_have_alone(family: str) -> None:
    lm = tiny_decoder(family)
    check_packing(lm, 32)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, PAD, PAD]])
    positions = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3, 0, 0]])
    logits = packed_logits(lm, ids, positions)
    assert logits.isfinite().all()
    for start, end in ((0, 3), (3, 4), (4, 8)):
        alone = lm(input_ids=ids[:, start:end]).logits
        torch.testing.assert_close(logits[:, start:end], alone, rtol=1e-6, atol=1e-7)


def test_the_mask_is_causal_within_samples_and_padding_sees_itself() -> None:
    mask = isolating_mask(torch.tensor([[0, 1, 0, 1, 2, 0, 0]]))[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_a_packed_update_is_the_unpacked_one_however_it_is_accumulated(tmp_path: Path, steps: int) -> None:
    found = []
    for packing, accumulation in ((False, 1), (True, steps)):
        trainer = sft_trainer(
            tmp_path / str(packing),
            TEXTS,
            lm=policy(),
            eval_samples=TEXTS,
            sft={"batch_size": 6, "packing": packing, "max_length": 12},
            optimizer=LINEAR_ADAM,
            train={"gradient_accumulation_steps": accumulation},
        )
        batches = trainer.experience(trainer.samples)
        assert len(batches) == accumulation and all(batch.loss_mask.any() for batch in batches)
        metrics = trainer.update(batches)
        found.append((parameters(trainer.lm), metrics, trainer.evaluate()["eval/loss"]))
    (expected, plain, plain_loss), (moved, packed, packed_loss) = found
    torch.testing.assert_close(moved, expected, rtol=1e-10, atol=1e-12)
    assert packed["train/loss"] == pytest.approx(plain["train/loss"], rel=1e-6)
    assert packed_loss == pytest.approx(plain_loss, rel=1e-9)
    if steps == 1:  # 32 tokens in rows of 12, of 6 + 4, and of 4 + 3 + 3; side by side, 6 rows of 3 + 11
        assert packed["train/padding_fraction"] == pytest.approx(1 - 32 / 36)
        assert plain["train/padding_fraction"] == pytest.approx(1 - 32 / 84)


def test_packing_goes_with_gradient_checkpointing(tmp_path: Path) -> None:
    found = []
    for name, settings in (("plain", {}), ("packed", {"model": {"gradient_checkpointing": True}})):
        trainer = sft_trainer(
            tmp_path / name,
            TEXTS,
            lm=policy(),
            sft={"batch_size": 6, "packing": name == "packed"},
            optimizer=LINEAR_ADAM,
            **settings,
        )
        trainer.step()
        found.append(parameters(trainer.lm))
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)


def test_packed_runs_learn(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "sft": {"batch_size": 6, "packing": True},
        "optimizer": {"learning_rate": 0.01},
        "eval_samples": TEXTS,
    }
    trainer = sft_trainer(tmp_path / "run", TEXTS, **settings)
    before = trainer.evaluate()["eval/loss"]
    for _ in range(20):
        trainer.step()
    assert trainer.evaluate()["eval/loss"] < 0.5 * before


def test_models_that_cannot_keep_samples_apart_are_refused(tmp_path: Path) -> None:
    packing = {"sft": {"packing": True}}
    t5 = T5Config(vocab_size=24, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    with pytest.raises(ConfigError, match="T5ForConditionalGeneration does not: turn it off"):
        check_packing(T5ForConditionalGeneration(t5), 8)
    qwen = tiny_decoder("qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=1)
    with pytest.raises(ConfigError, match=r"sliding window of 6 tokens.*set `sft.max_length` to at most 6"):
        check_packing(qwen, 7)
    check_packing(qwen, 6)
    forgetful = policy()
    wrapped = forgetful.forward

    def forward(position_ids: Any = None, attention_mask: Any = None, **inputs: Any) -> Any:
        return wrapped(**inputs)

    forgetful.forward = forward  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ConfigError, match="GPT2LMHeadModel looks from one sample at another"):
        sft_trainer(tmp_path / "run", ["a"], lm=forgetful, **packing)
