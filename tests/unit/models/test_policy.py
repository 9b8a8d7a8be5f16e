"""Which position logits and values are read at, what padding changes (nothing), where values start (at 0)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Model, PreTrainedModel

from conch.config import ModelConfig
from conch.errors import ModelError
from conch.models.forward import ForwardInputs
from conch.models.loading import load_lm
from conch.models.policy import PolicyWithValue, response_logits
from tests.numerics import family_rounding, network_rounding
from tests.tiny import LANGUAGE_MODELS, char_tokenizer, decoder_shape, tiny_decoder, tiny_gpt2_config

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


def next_alone(lm: PreTrainedModel, prompt: Tensor, response: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, V] of the token after `prompt | response`, and the states [B, D] that the head reads, from
    a forward pass over real tokens alone."""
    if lm.config.is_encoder_decoder:
        start = torch.full_like(prompt[:, :1], lm.config.decoder_start_token_id)
        ids = torch.cat([start, response], dim=1)
        output = lm(input_ids=prompt, decoder_input_ids=ids, output_hidden_states=True)
        # T5 with shared embeddings scales what its head reads.
        return output.logits[:, -1], output.decoder_hidden_states[-1][:, -1] / 32**0.5
    output = lm(torch.cat([prompt, response], dim=1), output_hidden_states=True)
    return output.logits[:, -1], output.hidden_states[-1][:, -1]


def awake(policy: PolicyWithValue) -> PolicyWithValue:
    """With a value head that has left its zeros."""
    torch.manual_seed(2)
    torch.nn.init.normal_(policy.value_head.out.weight)
    return policy


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
@torch.no_grad()
def test_padding_on_either_side_changes_neither_logits_nor_values(family: str) -> None:
    policy = awake(PolicyWithValue(tiny_decoder(family)))
    ids, mask = a_batch()
    plain = policy(ForwardInputs(ids, mask, RESPONSE))
    output = policy(ForwardInputs(*padded(ids, left=4, right=2), RESPONSE + 2))

    for found, wanted in ((output.logits, plain.logits), (output.values, plain.values)):
        bound = family_rounding(family, wanted)
        torch.testing.assert_close(found[:, :RESPONSE], wanted, rtol=0, atol=bound)


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
@torch.no_grad()
def test_rows_of_different_lengths_have_the_logits_they_have_alone(family: str) -> None:
    lm = tiny_decoder(family)
    (ids, mask), lengths = a_batch(), (1, 3, 5)
    for row, length in enumerate(lengths):
        ids[row, : PROMPT - length], mask[row, : PROMPT - length] = PAD, False
    together = response_logits(lm, ForwardInputs(ids, mask, RESPONSE))

    for row, length in enumerate(lengths):
        prompt, response = ids[row : row + 1, PROMPT - length : PROMPT], ids[row : row + 1, PROMPT:]
        for action in range(RESPONSE):
            alone, _ = next_alone(lm, prompt, response[:, :action])
            bound = family_rounding(family, alone)
            torch.testing.assert_close(together[row : row + 1, action], alone, rtol=0, atol=bound)


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
@torch.no_grad()
def test_logits_and_values_are_read_at_the_token_before_the_action(family: str) -> None:
    lm = tiny_decoder(family)
    policy = awake(PolicyWithValue(lm))
    ids, mask = a_batch()
    output = policy(ForwardInputs(ids, mask, RESPONSE))

    for action in range(RESPONSE):
        logits, states = next_alone(lm, ids[:, :PROMPT], ids[:, PROMPT : PROMPT + action])
        value = policy.value_head(states.unsqueeze(1))[:, 0]
        for found, wanted in ((output.logits, logits), (output.values, value)):
            bound = family_rounding(family, wanted)
            torch.testing.assert_close(found[:, action], wanted, rtol=0, atol=bound)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
@torch.no_grad()
def test_value_does_not_see_its_action_but_sees_the_token_before(family: str) -> None:
    policy = awake(PolicyWithValue(tiny_decoder(family)))
    ids, mask = a_batch()
    values = policy(ForwardInputs(ids, mask, RESPONSE)).values
    for action in range(RESPONSE):
        changed = ids.clone()
        changed[:, PROMPT + action] = (changed[:, PROMPT + action] + 1) % PAD
        moved = policy(ForwardInputs(changed, mask, RESPONSE)).values != values

        assert not moved[:, : action + 1].any()
        assert moved[:, action + 1 :].all()


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
@torch.no_grad()
def test_first_values_are_exactly_zero(family: str) -> None:
    values = PolicyWithValue(tiny_decoder(family))(ForwardInputs(*a_batch(), RESPONSE)).values

    assert values.shape == (3, RESPONSE) and (values == 0).all()


def test_value_head_learns_from_its_zeros() -> None:
    policy = PolicyWithValue(tiny_decoder("gpt2"))
    for _ in range(2):  # the first step moves the zeros of the last layer, the second what lies below
        (policy(ForwardInputs(*a_batch(), RESPONSE)).values - 1).square().mean().backward()
        torch.optim.SGD(policy.parameters(), lr=0.1).step()
    trunk = policy.lm.get_input_embeddings().weight

    assert (policy(ForwardInputs(*a_batch(), RESPONSE)).values > 0).all()
    assert trunk.grad is not None and trunk.grad.abs().sum() > 0


def test_value_head_shares_no_parameter_with_the_language_model() -> None:
    policy = PolicyWithValue(tiny_decoder("gpt2"))
    head = {p.data_ptr() for p in policy.value_head.parameters()}

    assert not head & {p.data_ptr() for p in policy.lm.parameters()}
    assert len(list(policy.parameters())) == len(list(policy.lm.parameters())) + 4


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
@torch.no_grad()
def test_two_forwards_are_equal_in_training_mode(family: str) -> None:
    config = ModelConfig(architecture=decoder_shape(family))
    policy = awake(PolicyWithValue(load_lm(config))).train()
    first, second = policy(ForwardInputs(*a_batch(), RESPONSE)), policy(ForwardInputs(*a_batch(), RESPONSE))

    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.values, second.values)


@torch.no_grad()
def test_values_of_a_bfloat16_policy_are_float32() -> None:
    exact = awake(PolicyWithValue(tiny_decoder("gpt2")))
    values = copy.deepcopy(exact).to(torch.bfloat16)(ForwardInputs(*a_batch(), RESPONSE)).values

    assert values.dtype == torch.float32
    torch.testing.assert_close(
        values.double(), exact(ForwardInputs(*a_batch(), RESPONSE)).values, rtol=0, atol=0.1
    )


def test_model_without_a_language_model_head_is_refused() -> None:
    with pytest.raises(ModelError, match="GPT2Model has no language-model head"):
        PolicyWithValue(GPT2Model(tiny_gpt2_config(char_tokenizer("abc"))))


@torch.no_grad()
def test_decoder_that_takes_no_position_ids_sees_its_padding_in_the_mask() -> None:
    """BLOOM's positions are relative (ALiBi)."""
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("bloom", vocab_size=24, hidden_size=32, n_layer=2, n_head=2)
    ).eval()
    given: set[str] = set()
    lm.register_forward_pre_hook(lambda _module, _args, kwargs: given.update(kwargs), with_kwargs=True)
    read: list[int] = []
    lm.lm_head.register_forward_hook(lambda _module, args, _output: read.append(args[0][..., 0].numel()))
    ids, mask = a_batch()
    plain = response_logits(lm, ForwardInputs(ids, mask, RESPONSE))
    wide = response_logits(lm, ForwardInputs(*padded(ids, left=4, right=2), RESPONSE + 2))

    torch.testing.assert_close(wide[:, :RESPONSE], plain, rtol=0, atol=network_rounding(plain, layers=2))
    assert "position_ids" not in given
    assert read == [len(ids) * RESPONSE, len(ids) * (RESPONSE + 2)], (
        "the head reads the states that chose response tokens"
    )


@torch.no_grad()
def test_head_may_read_states_of_another_width_than_the_blocks() -> None:
    """OPT-350m projects the states of its blocks down before its head."""
    lm = tiny_decoder("opt", word_embed_proj_dim=16)

    assert PolicyWithValue(lm)(ForwardInputs(*a_batch(), RESPONSE)).values.shape == (3, RESPONSE)
