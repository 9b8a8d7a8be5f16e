"""The reference on servers, as a run begins: shown to be the very policy that training starts from."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from conch.config import ModelConfig, ReferenceConfig
from conch.data.rollout_batch import Sequences
from conch.distributed.train_engine import TrainEngine
from conch.errors import ConchError, ReferenceServerError
from conch.log import get_logger
from conch.models.adapter import has_adapter
from conch.models.attention import rounding_bound
from conch.models.forward import BatchPacker
from conch.models.loading import context_window, vocabulary_size
from conch.models.policy import response_logits
from conch.models.reference import AdapterOffReference
from conch.reference.digest import weights_digest
from conch.reference.protocol import ReferenceHealth
from conch.reference.remote import RemoteReference
from conch.training.setup import eval_mode

_log = get_logger(__name__)

_GOLDEN_COLUMNS = 24
"""Tokens of the longest golden sample, at most."""


def open_reference(
    config: ReferenceConfig, model: ModelConfig, engine: TrainEngine, lm: PreTrainedModel, packer: BatchPacker
) -> RemoteReference:
    """The reference on the servers of `config.urls`. Call it on all ranks, with whole weights, before the
    first update and before a checkpoint is taken up: `lm` must be the policy of the very start.

    Rank 0 compares the weights of each server that answers, and its log-probs of a few samples, with the
    policy's; the others see that they reach one. A server that comes later, or comes back, is known by the
    digest in each of its answers.

    Raises:
        ReferenceUnavailableError: no server answers.
        ReferenceServerError: a server lets us not in, or holds another model.
        ConfigError: settings of access will not do.
    """
    ranks = engine.collectives
    trained_layers = 0 if has_adapter(lm) else model.num_layers_unfrozen
    reference = RemoteReference(config, rank=ranks.rank, trained_layers=trained_layers)
    healths: dict[str, ReferenceHealth] = {}

    def check() -> None:
        for address, health in healths.items():
            _check_model(address, health, lm, reference.digest, packer)
        if ranks.is_main:
            _check_answers(reference, len(healths), engine, lm, packer)

    try:
        ranks.run_on_all_ranks(lambda: healths.update(reference.healths()))
        reference.expect(ranks.broadcast(weights_digest(lm) if ranks.is_main else ""))
        ranks.run_on_all_ranks(check)
    except ConchError:
        reference.close()
        raise
    return reference


def _check_model(
    address: str, health: ReferenceHealth, lm: PreTrainedModel, digest: str, packer: BatchPacker
) -> None:
    """Refuse a server of another model.

    Raises:
        ReferenceServerError: says what differs.
    """
    dtype, size = str(lm.dtype).removeprefix("torch."), vocabulary_size(lm)
    if health.vocabulary != size:
        raise ReferenceServerError(
            f"{address} holds a model of {health.vocabulary} tokens, the policy knows {size}: serve the "
            "folder of `model.path`"
        )
    if health.dtype != dtype:
        raise ReferenceServerError(
            f"{address} holds its weights in {health.dtype}, the policy's are in {dtype}: start it with "
            f"`dtype={dtype}`"
        )
    if health.digest != digest:
        raise ReferenceServerError(
            f"{address} holds another model than the policy that this run starts from (weights "
            f"{health.digest[:12]}, not {digest[:12]}): serve the folder of `model.path`"
        )
    if health.packing != packer.kind:
        _log.warning(
            "reference server %s reads %s rows, the policy %s ones: the first KL is 0 but for rounding; give "
            "both the same kernels of attention",
            *(address, health.packing, packer.kind),
        )


@torch.no_grad()
def _check_answers(
    reference: RemoteReference,
    num_servers: int,
    engine: TrainEngine,
    lm: PreTrainedModel,
    packer: BatchPacker,
) -> None:
    """Compare log-probs of golden samples with the policy's: the same weights may be computed otherwise.

    Raises:
        ReferenceServerError: they differ by more than rounding.
    """
    samples = _golden_samples(lm)
    with eval_mode(lm), engine.autocast():
        pending = reference.request([samples] * num_servers, 1.0)
        expected = _start_logprobs(lm, packer, samples).cpu()
        dtype = torch.get_autocast_dtype(lm.device.type)
        computed = dtype if torch.is_autocast_enabled(lm.device.type) else lm.dtype
    gaps = [float((pending.result(number) - expected).abs().max()) for number in range(num_servers)]
    gap, bound = max(gaps), 10 * rounding_bound(computed)  # of a single token, the bound is of means
    if not gap <= bound:
        raise ReferenceServerError(
            f"the reference servers hold the policy's weights, but their log-probs differ by {gap:.2g} nats: "
            "give them the trainer's versions of torch and transformers, and its kernels"
        )
    if gap:
        _log.info("the reference servers' log-probs differ from the policy's by rounding: %.1g nats", gap)


def _start_logprobs(lm: PreTrainedModel, packer: BatchPacker, samples: Sequences) -> Float[Tensor, "B R"]:
    packed = packer.pack(samples.input_ids, samples.attention_mask, samples.num_response)
    if has_adapter(lm):
        return packed.logprobs(AdapterOffReference(lm).logits(packed.inputs), 1.0)
    return packed.logprobs(response_logits(lm, packed.inputs), 1.0)


def _golden_samples(lm: PreTrainedModel) -> Sequences:
    """Four samples of all parts of the vocabulary, two of which share a prompt, of several lengths."""
    window = context_window(lm.config) or _GOLDEN_COLUMNS
    columns = max(2, min(window, _GOLDEN_COLUMNS))
    num_response = columns // 2
    size = vocabulary_size(lm)
    ids = torch.randint(0, size, (4, columns), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    ids[1, :-num_response] = ids[0, :-num_response]
    mask[2, : columns - num_response - 1] = False  # a prompt of one token
    mask[3, columns - num_response + 1 :] = False  # a response of one token
    ids, mask = ids.to(lm.device), mask.to(lm.device)
    responses = mask[:, -num_response:]
    nothing = torch.zeros(responses.shape, device=lm.device)
    return Sequences(ids, mask, ids[:, -num_response:], responses, nothing)
