"""Log-probs of sampled completions under the policy and its reference, before any of them is learned from.

Legend: B rollouts, R response tokens.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from conch.data.rollout_batch import Sequences, take_rows
from conch.distributed.train_engine import TrainEngine
from conch.models.forward import BatchPacker, ForwardBatch
from conch.models.reference import Reference
from conch.ops import entropy
from conch.reference.remote import PendingLogprobs, RemoteReference
from conch.training.setup import eval_mode


@dataclass(frozen=True)
class LogprobOutputs:
    """Outputs of the models for one step's rollouts.

    sequences: the rollouts as padded rows.
    logprobs: of each response token under the policy; None where the policy was not asked.
    entropy: of the policy's distribution at each response token, in nats; None likewise.
    values: of the value head; None where there is none or the policy was not asked.
    ref_logprobs: of each response token under the reference; None without a reference.
    reference_wait_s: seconds in which nothing was done but wait for reference servers; None where none are
        asked.
    """

    sequences: Sequences
    logprobs: Float[Tensor, "B R"] | None = None
    entropy: Float[Tensor, "B R"] | None = None
    values: Float[Tensor, "B R"] | None = None
    ref_logprobs: Float[Tensor, "B R"] | None = None
    reference_wait_s: float | None = None

    @property
    def waits(self) -> dict[str, float]:
        """`reference_wait_s` as a metric, where it was measured."""
        return {} if self.reference_wait_s is None else {"time/reference_s": self.reference_wait_s}


def pack(packer: BatchPacker, sequences: Sequences) -> ForwardBatch:
    """Rows that the models read for these rollouts."""
    return packer.pack(sequences.input_ids, sequences.attention_mask, sequences.num_response)


@torch.no_grad()
def logprob_outputs(
    engine: TrainEngine,
    policy: nn.Module,
    reference: Reference | RemoteReference | None,
    packer: BatchPacker,
    sequences: Sequences,
    *,
    temperature: float,
    batch_size: int,
    policy_too: bool = True,
) -> LogprobOutputs:
    """Run policy and reference over `sequences`, `batch_size` rows at a time, without gradient or dropout.

    A reference on servers is asked for all rows first, and computes them while the policy runs here.

    policy: the trained module as it was before the engine wrapped it.
    policy_too: False asks the reference alone.
    """
    if not policy_too and reference is None:
        return LogprobOutputs(sequences)
    parts = [take_rows(sequences, rows) for rows in torch.arange(len(sequences.input_ids)).split(batch_size)]
    columns: list[tuple[Tensor | None, ...]] = []
    pending: PendingLogprobs | None = None
    with eval_mode(policy), engine.autocast():
        if isinstance(reference, RemoteReference):
            pending, reference = reference.request(parts, temperature), None
        for part in parts if policy_too or reference is not None else []:
            packed = pack(packer, part)
            logprobs = entropies = values = ref_logprobs = None
            if policy_too:
                with nullcontext() if reference is None else reference.recording():
                    output = engine.module(packed.inputs)
                logprobs = packed.logprobs(output.logits, temperature)
                entropies = packed.unpack(entropy(output.logits, temperature))
                values = None if output.values is None else packed.unpack(output.values)
            if reference is not None:
                ref_logprobs = packed.logprobs(reference.logits(packed.inputs), temperature)
            columns.append((logprobs, entropies, values, ref_logprobs))
    joined = [_concatenated(column) for column in zip(*columns, strict=True)] or [None] * 4
    outputs = LogprobOutputs(sequences, joined[0], joined[1], joined[2], joined[3])
    return outputs if pending is None else _with_reference(outputs, pending, len(parts))


def _with_reference(outputs: LogprobOutputs, pending: PendingLogprobs, num_parts: int) -> LogprobOutputs:
    """The outputs, once servers have answered all parts."""
    device = outputs.sequences.input_ids.device
    ref_logprobs = torch.cat([pending.result(number) for number in range(num_parts)]).to(device)
    return replace(outputs, ref_logprobs=ref_logprobs, reference_wait_s=pending.wait_s)


def _concatenated(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None
