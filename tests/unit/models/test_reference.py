"""The reference gives the logits of the start: exactly, before and after the policy has learned."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from conch.models.forward import ForwardInputs
from conch.models.freezing import freeze_trunk
from conch.models.loading import decoder_layers
from conch.models.policy import PolicyWithValue, response_logits
from conch.models.reference import FullCopyReference, Reference, SharedTrunkReference, build_reference
from tests.tiny import LANGUAGE_MODELS, tiny_decoder

PRODUCTS = {getattr(torch.ops.aten, name).default for name in ("mm", "bmm", "addmm", "baddbmm")}
RESPONSE = 4
UNFROZEN = [-1, 1, 2, 3]


def a_batch(seed: int = 1) -> ForwardInputs:
    """Rows with 3, 0 and 2 pads on the left and 0, 1 and 2 on the right."""
    ids = torch.randint(0, 21, (3, 10), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids, dtype=torch.bool)
    for row, (left, right) in enumerate([(3, 0), (0, 1), (2, 2)]):
        mask[row, :left] = False
        mask[row, 10 - right :] = False
    return ForwardInputs(ids.masked_fill(~mask, 21), mask, RESPONSE)


@torch.no_grad()
def policy_and_reference(policy: PolicyWithValue, reference: Reference, seed: int) -> tuple[Tensor, Tensor]:
    with reference.recording():
        output = policy(a_batch(seed))
    return output.logits, reference.logits(a_batch(seed))


def learn(policy: PolicyWithValue, steps: int = 2) -> None:
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        output = policy(a_batch())
        (output.logits.square().mean() + (output.values - 1).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


def real_positions() -> Tensor:
    """[B, R], True where a response token is real."""
    return a_batch()[1][:, -RESPONSE:]


@pytest.mark.parametrize("unfrozen", UNFROZEN)
@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_reference_is_the_start_before_and_after_training(family: str, unfrozen: int) -> None:
    lm = tiny_decoder(family)
    start = copy.deepcopy(lm)
    freeze_trunk(lm, unfrozen)
    policy, reference = PolicyWithValue(lm), build_reference(lm, unfrozen)

    logits, reference_logits = policy_and_reference(policy, reference, seed=1)
    assert torch.equal(logits, reference_logits), "KL must be exactly 0 at first"
    learn(policy)
    logits, reference_logits = policy_and_reference(policy, reference, seed=2)
    with torch.no_grad():
        wanted = response_logits(start, a_batch(2))
    assert torch.equal(reference_logits[real_positions()], wanted[real_positions()])
    assert not torch.isclose(logits[real_positions()], wanted[real_positions()]).all(), (
        "the policy learned nothing"
    )


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_reference_is_exact_for_a_bfloat16_model(family: str) -> None:
    lm = tiny_decoder(family).to(torch.bfloat16)
    freeze_trunk(lm, 1)
    logits, reference_logits = policy_and_reference(PolicyWithValue(lm), build_reference(lm, 1), seed=1)

    assert torch.equal(logits, reference_logits)


@pytest.mark.parametrize(
    ("unfrozen", "kind"), [(-1, FullCopyReference), (3, FullCopyReference), (2, SharedTrunkReference)]
)
def test_cheapest_exact_reference_is_built(unfrozen: int, kind: type) -> None:
    lm = tiny_decoder("gpt2")
    freeze_trunk(lm, unfrozen)

    assert type(build_reference(lm, unfrozen)) is kind


def reference_model(reference: Reference) -> PreTrainedModel:
    assert isinstance(reference, FullCopyReference | SharedTrunkReference)
    return reference._lm


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_shared_trunk_copies_the_trainable_blocks_and_shares_the_rest(family: str) -> None:
    lm = tiny_decoder(family)
    freeze_trunk(lm, 1)
    model = reference_model(build_reference(lm, 1))
    theirs = {p.data_ptr() for p in model.parameters()}
    trainable = {p.data_ptr() for p in lm.parameters() if p.requires_grad}
    frozen = {p.data_ptr() for p in lm.parameters() if not p.requires_grad}
    shared = [*decoder_layers(lm)[:2], *([lm.get_encoder()] if lm.config.is_encoder_decoder else [])]
    embeddings = {p.data_ptr() for p in lm.get_input_embeddings().parameters()}
    bottom = {p.data_ptr() for module in shared for p in module.parameters()} - embeddings

    assert not theirs & trainable
    assert len(theirs - frozen) == len(trainable), "one copy of each trainable tensor, and no other"
    assert frozen - bottom <= theirs
    assert not theirs & bottom, "the shared blocks are not counted twice"


@pytest.mark.parametrize("unfrozen", UNFROZEN)
def test_nothing_of_the_reference_is_trainable_and_its_mode_is_evaluation(unfrozen: int) -> None:
    lm = tiny_decoder("gpt2").train()
    freeze_trunk(lm, unfrozen)
    was_trainable = [p.requires_grad for p in lm.parameters()]
    reference = build_reference(lm, unfrozen)
    with reference.recording():
        response_logits(lm, a_batch())

    assert not reference.logits(a_batch()).requires_grad
    assert not any(module.training for module in reference_model(reference).modules())
    assert [p.requires_grad for p in lm.parameters()] == was_trainable and lm.training


class Operations(TorchDispatchMode):
    """Collects the operations that run inside, each with the shapes and strides of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        self.found.append((func, *((each.shape, each.stride(), each.dtype) for each in tensors)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
@torch.no_grad()
def test_full_copy_runs_the_operations_of_the_policy(family: str) -> None:
    """Equal on every processor, not only where two kernels happen to round alike."""
    lm = tiny_decoder(family)
    reference, ran = build_reference(lm, -1), []
    for run in (lambda: response_logits(lm, a_batch()), lambda: reference.logits(a_batch())):
        with Operations() as operations:
            run()
        ran.append(operations.found)

    assert len(ran[0]) > 20 and ran[0] == ran[1]


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
@torch.no_grad()
def test_shared_trunk_ends_in_the_operations_of_the_policy(family: str) -> None:
    lm = tiny_decoder(family)
    freeze_trunk(lm, 1)
    reference = build_reference(lm, 1)
    with reference.recording(), Operations() as whole:
        response_logits(lm, a_batch())
    with Operations() as top:
        reference.logits(a_batch())
    products = [[each for each in operations.found if each[0] in PRODUCTS] for operations in (whole, top)]

    assert len(products[0]) > len(products[1]) >= 4, "attention, perceptron and head of one block"
    assert products[0][-len(products[1]) :] == products[1]


def test_encoder_of_the_trunk_runs_once_for_policy_and_reference() -> None:
    lm, runs = tiny_decoder("t5"), []
    lm.get_encoder().register_forward_hook(lambda *_: runs.append(1))  # a copy would count its runs, too
    freeze_trunk(lm, 1)
    policy, reference = PolicyWithValue(lm), build_reference(lm, 1)
    policy_and_reference(policy, reference, seed=1)

    assert len(runs) == 1


def test_reference_leaves_no_trace_in_the_policy() -> None:
    lm = tiny_decoder("gpt2")
    before = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    freeze_trunk(lm, 1)
    policy, reference = PolicyWithValue(lm), build_reference(lm, 1)
    policy_and_reference(policy, reference, seed=1)

    assert list(lm.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in policy.modules())


def test_shared_trunk_refuses_a_batch_that_was_not_recorded() -> None:
    lm = tiny_decoder("gpt2")
    freeze_trunk(lm, 1)
    policy, reference = PolicyWithValue(lm), build_reference(lm, 1)
    policy_and_reference(policy, reference, seed=1)
    with torch.no_grad():
        policy(a_batch(2))

    with pytest.raises(AssertionError, match="no forward pass was recorded"):
        reference.logits(a_batch(2))
