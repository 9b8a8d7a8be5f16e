"""Which position logits and values are read at, what padding changes (nothing), where values start (at 0)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import GPT2Model

from conch.config import ModelConfig
from conch.errors import ModelError
from conch.models.loading import load_causal_lm
from conch.models.policy import PolicyWithValue, response_logits
from tests.tiny import DECODERS, char_tokenizer, decoder_shape, tiny_decoder, tiny_gpt2_config

PAD = 21
PROMPT, RESPONSE = 5, 4


def a_batch(num_rows: int = 3) -> tuple[Tensor, Tensor]:
    """Rows of 5 prompt and 4 response tokens, all real."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, PAD, (num_rows, PROMPT + RESPONSE), generator=generator)
    return ids, torch.ones_like(ids, dtype=torch.bool)


def padded(ids: Tensor, left: int, right: int) -> tuple[Tensor, Tensor]:
    """The rows with padding on both sides, and a mask of what is real."""
    wide = torch.full((len(ids), left + ids.shape[1] + right), PAD)
    wide[:, left : left + ids.shape[1]] = ids
    mask = torch.zeros_like(wide, dtype=torch.bool)
    mask[:, left : left + ids.shape[1]] = True
    return wide, mask


def awake(policy: PolicyWithValue) -> PolicyWithValue:
    """With a value head that has left its zeros."""
    torch.manual_seed(2)
    torch.nn.init.normal_(policy.value_head.out.weight)
    return policy


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_padding_on_either_side_changes_neither_logits_nor_values(family: str) -> None:
    policy = awake(PolicyWithValue(tiny_decoder(family)))
    ids, mask = a_batch()
    plain = policy(ids, mask, RESPONSE)
    output = policy(*padded(ids, left=4, right=2), RESPONSE + 2)

    torch.testing.assert_close(output.logits[:, :RESPONSE], plain.logits, rtol=0, atol=2e-6)
    torch.testing.assert_close(output.values[:, :RESPONSE], plain.values, rtol=0, atol=2e-6)


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_rows_of_different_lengths_have_the_logits_they_have_alone(family: str) -> None:
    lm = tiny_decoder(family)
    (ids, mask), lengths = a_batch(), (1, 3, 5)
    for row, length in enumerate(lengths):
        ids[row, : PROMPT - length], mask[row, : PROMPT - length] = PAD, False
    together = response_logits(lm, ids, mask, RESPONSE)

    for row, length in enumerate(lengths):
        alone = lm(ids[row : row + 1, PROMPT - length :]).logits[:, length - 1 : -1]
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=2e-6)


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_logits_and_values_are_read_at_the_token_before_the_action(family: str) -> None:
    lm = tiny_decoder(family)
    policy = awake(PolicyWithValue(lm))
    ids, mask = a_batch()
    output = policy(ids, mask, RESPONSE)

    for action in range(RESPONSE):
        before = lm(ids[:, : PROMPT + action], output_hidden_states=True)
        value = policy.value_head(before.hidden_states[-1][:, -1:])[:, 0]
        torch.testing.assert_close(output.logits[:, action], before.logits[:, -1], rtol=0, atol=2e-6)
        torch.testing.assert_close(output.values[:, action], value, rtol=0, atol=2e-6)


@torch.no_grad()
def test_value_does_not_see_its_action_but_sees_the_token_before() -> None:
    policy = awake(PolicyWithValue(tiny_decoder("gpt2")))
    ids, mask = a_batch()
    values = policy(ids, mask, RESPONSE).values
    for action in range(RESPONSE):
        changed = ids.clone()
        changed[:, PROMPT + action] = (changed[:, PROMPT + action] + 1) % PAD
        moved = policy(changed, mask, RESPONSE).values != values

        assert not moved[:, : action + 1].any()
        assert moved[:, action + 1 :].all()


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_first_values_are_exactly_zero(family: str) -> None:
    values = PolicyWithValue(tiny_decoder(family))(*a_batch(), RESPONSE).values

    assert values.shape == (3, RESPONSE) and (values == 0).all()


def test_value_head_learns_from_its_zeros() -> None:
    policy = PolicyWithValue(tiny_decoder("gpt2"))
    for _ in range(2):  # the first step moves the zeros of the last layer, the second what lies below
        (policy(*a_batch(), RESPONSE).values - 1).square().mean().backward()
        torch.optim.SGD(policy.parameters(), lr=0.1).step()
    trunk = policy.lm.get_input_embeddings().weight

    assert (policy(*a_batch(), RESPONSE).values > 0).all()
    assert trunk.grad is not None and trunk.grad.abs().sum() > 0


def test_value_head_shares_no_parameter_with_the_language_model() -> None:
    policy = PolicyWithValue(tiny_decoder("gpt2"))
    head = {p.data_ptr() for p in policy.value_head.parameters()}

    assert not head & {p.data_ptr() for p in policy.lm.parameters()}
    assert len(list(policy.parameters())) == len(list(policy.lm.parameters())) + 4


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_two_forwards_are_equal_in_training_mode(family: str) -> None:
    config = ModelConfig(architecture=decoder_shape(family))
    policy = awake(PolicyWithValue(load_causal_lm(config))).train()
    first, second = policy(*a_batch(), RESPONSE), policy(*a_batch(), RESPONSE)

    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.values, second.values)


@torch.no_grad()
def test_values_of_a_bfloat16_policy_are_float32() -> None:
    exact = awake(PolicyWithValue(tiny_decoder("gpt2")))
    values = copy.deepcopy(exact).to(torch.bfloat16)(*a_batch(), RESPONSE).values

    assert values.dtype == torch.float32
    torch.testing.assert_close(values, exact(*a_batch(), RESPONSE).values, rtol=0, atol=0.1)


def test_model_without_a_language_model_head_is_refused() -> None:
    policy = PolicyWithValue(GPT2Model(tiny_gpt2_config(char_tokenizer("abc"))))

    with pytest.raises(ModelError, match="GPT2Model has no language-model head"):
        policy(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.bool), 2)
