"""Value layers of their own: they start as the policy's, share none of its parameters, and learn apart."""

from __future__ import annotations

import copy

import pytest
import torch

from conch.config import ModelConfig
from conch.errors import ConfigError
from conch.models.forward import ForwardInputs
from conch.models.freezing import freeze_layers, freeze_trunk
from conch.models.policy import PolicyWithValue
from tests.tiny import LANGUAGE_MODELS, decoder_shape, tiny_decoder

LAYERS = [1, 2, 3]


def a_batch() -> ForwardInputs:
    """Rows with 3, 0 and 2 pads on the left and 0, 1 and 2 on the right."""
    ids = torch.randint(0, 21, (3, 10), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    for row, (left, right) in enumerate([(3, 0), (0, 1), (2, 2)]):
        mask[row, :left] = False
        mask[row, 10 - right :] = False
    return ForwardInputs(ids.masked_fill(~mask, 21), mask, 4)


def awake(policy: PolicyWithValue) -> PolicyWithValue:
    """With a value head that has left its zeros."""
    torch.manual_seed(2)
    for parameter in policy.value_head.parameters():
        torch.nn.init.normal_(parameter)
    return policy


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("family", LANGUAGE_MODELS)
@torch.no_grad()
def test_branch_starts_as_the_layers_that_it_copies(family: str, layers: int) -> None:
    lm = tiny_decoder(family)
    plain = PolicyWithValue(lm)(a_batch())
    apart = PolicyWithValue(lm, num_value_layers=layers)
    assert (apart(a_batch()).values == 0).all()
    output = awake(apart)(a_batch())

    assert torch.equal(output.logits, plain.logits)
    assert torch.equal(output.values, awake(PolicyWithValue(lm))(a_batch()).values)


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_branch_shares_no_parameter_and_all_of_its_own_learn(family: str, layers: int) -> None:
    policy = awake(PolicyWithValue(tiny_decoder(family), num_value_layers=layers))
    assert policy.value_branch is not None
    of_branch = {p.data_ptr() for p in policy.value_branch.parameters()}
    policy(a_batch()).values.square().sum().backward()

    assert not of_branch & {p.data_ptr() for p in policy.lm.parameters()}
    assert all(p.grad is not None for p in policy.value_branch.parameters())
    assert len(list(policy.parameters())) == len(list(policy.lm.parameters())) + len(of_branch) + 4


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_value_loss_reaches_the_policy_below_the_branch_alone(family: str) -> None:
    lm = tiny_decoder(family)
    policy = awake(PolicyWithValue(lm, num_value_layers=1))
    policy(a_batch()).values.square().sum().backward()
    layers = (
        lm.get_decoder().block
        if family == "t5"
        else [m for m in lm.modules() if type(m).__name__.endswith(("Block", "Layer"))]
    )
    moved = [any(p.grad is not None and p.grad.any() for p in layer.parameters()) for layer in layers]

    assert moved == [True, True, False]


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_value_loss_stops_at_a_frozen_trunk(family: str) -> None:
    lm = tiny_decoder(family)
    freeze_trunk(lm, 1)
    policy = awake(PolicyWithValue(lm, num_value_layers=2))
    policy(a_batch()).values.square().sum().backward()

    assert all(p.grad is None for p in lm.parameters())


def test_learning_values_alone_leaves_the_logits() -> None:
    lm = tiny_decoder("gpt2")
    freeze_trunk(lm, 1)
    policy = awake(PolicyWithValue(lm, num_value_layers=1))
    before = policy(a_batch())
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.1)
    (before.values - 1).square().mean().backward()
    optimizer.step()
    after = policy(a_batch())

    assert torch.equal(after.logits, before.logits)
    assert not torch.isclose(after.values, before.values).any()


def test_branch_is_saved_with_the_value_head() -> None:
    policy = awake(PolicyWithValue(tiny_decoder("gpt2"), num_value_layers=1))
    saved = policy.head_tensors()
    other = PolicyWithValue(tiny_decoder("gpt2"), num_value_layers=1)
    missing, unexpected = other.load_state_dict(saved, strict=False)

    assert not unexpected and all(name.startswith("lm.") for name in missing)
    assert {name.split(".")[0] for name in saved} == {"value_head", "value_branch"}
    assert len(saved) == 4 + 14, "the head, one block of GPT-2, and the final norm"
    with torch.no_grad():
        assert torch.equal(other(a_batch()).values, policy(a_batch()).values)


def test_branch_has_dropout_of_its_own() -> None:
    policy = awake(PolicyWithValue(tiny_decoder("gpt2", resid_pdrop=0.5), num_value_layers=3)).train()
    with torch.no_grad():
        torch.manual_seed(0)
        output = policy(a_batch())
        policy.value_branch.eval()  # pyright: ignore[reportOptionalMemberAccess]
        torch.manual_seed(0)
        calm = policy(a_batch())

    assert torch.equal(calm.logits, output.logits)
    assert not torch.isclose(calm.values, output.values).any()


def test_copy_of_a_policy_has_a_branch_of_its_own() -> None:
    policy = awake(PolicyWithValue(tiny_decoder("gpt2"), num_value_layers=1))
    copied = copy.deepcopy(policy)
    before = policy(a_batch()).values
    assert policy.value_branch is not None
    for parameter in policy.value_branch.parameters():
        parameter.data.zero_()

    torch.testing.assert_close(copied(a_batch()).values, before, rtol=0, atol=1e-10)
    assert not torch.isclose(policy(a_batch()).values, before).any()


def test_layers_between_embeddings_and_blocks_are_frozen_in_the_branch() -> None:
    """Nothing in the branch reads the projection that OPT-350m has there; DDP must not wait for it."""
    policy = PolicyWithValue(tiny_decoder("opt", word_embed_proj_dim=16), num_value_layers=1)
    frozen = [name for name, p in policy.named_parameters() if not p.requires_grad]

    assert [name.rpartition("decoder.")[2] for name in frozen] == ["project_in.weight"]


def test_branch_beside_an_adapter_trains_plain_layers() -> None:
    lm = tiny_decoder("llama")
    config = ModelConfig(architecture=decoder_shape("llama"), peft_config={"r": 2}, merge_adapter=True)
    freeze_layers(lm, config)
    policy = awake(PolicyWithValue(lm, num_value_layers=1))
    policy(a_batch()).values.square().sum().backward()

    assert policy.value_branch is not None
    assert not any("lora" in name for name, _ in policy.value_branch.named_parameters())
    assert all(p.requires_grad and p.grad is not None for p in policy.value_branch.parameters())


def test_more_value_layers_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`ppo\.num_value_layers_unfrozen` is 4; the model has 3 layers"):
        PolicyWithValue(tiny_decoder("gpt2"), num_value_layers=4)
