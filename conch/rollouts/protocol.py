"""Messages between trainers and rollout servers, as JSON over HTTP.

    GET  /health     -> Health
    POST /weights    WeightUpdate -> Health, once the weights are loaded
    POST /generate   GenerateRequest -> a line of JSON for each completion, as it ends: CompletionReply;
                                        a last one where sampling failed: Failure

Where the server asks for a secret, every request has a header `authorization: Bearer SECRET`. A server
refuses with `{"detail": one sentence}`: 400 for what it can never do, 401 without the secret or with another,
408 and 413 for a request that is too slow or too large, 409 for weights that it does not hold, 503 where it
has failed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Annotated, Literal

from pydantic import Field, FiniteFloat, NonNegativeInt, model_validator

from conch.config import GenerationConfig, Section
from conch.types import Completion, FinishReason


class WeightVersion(Section):
    """Identity of a policy's weights.

    source: the run that trains the policy.
    version: updates that the policy has seen.
    """

    source: str
    version: int


MAX_LORA_RANK = 512
"""Highest rank of an adapter that goes to a sampler by itself; vLLM can be started for no higher one."""


class LoraCapacity(Section):
    """Adapters that a sampler can take by themselves.

    rank: highest rank.
    modules: last parts of the names of the layers that an adapter may be on.
    """

    rank: int
    modules: tuple[str, ...]


class Health(Section):
    """State of a server that answers.

    weights: version that it samples from; None before it has any.
    max_model_len: longest prompt and completion together, in tokens.
    max_num_seqs: completions sampled at once.
    workers: processes that each hold a part of the weights.
    device: `cpu` or `cuda`.
    lora: adapters that it can take; None where it takes none.
    base: run whose base weights it holds, for that run's adapters; None where it holds none.
    busy_s: seconds in which it sampled something, since it started.
    clock_s: seconds since it started; with `busy_s` it tells which part of the time between two answers was
        idle.
    """

    weights: WeightVersion | None
    max_model_len: int
    max_num_seqs: int
    workers: int
    device: str
    lora: LoraCapacity | None = None
    base: str | None = None
    busy_s: float = 0.0
    clock_s: float = 0.0


class TensorSpec(Section):
    """Name, dtype (as torch names it) and shape of a tensor that is going to be broadcast."""

    name: str
    dtype: str = Field(pattern=r"^(bool|u?int\d+|b?float\d+\w*|complex\d+)$")
    shape: tuple[NonNegativeInt, ...]


Part = Literal["whole", "base", "adapter"]
"""Part of a policy's weights: all; those that its adapter adds to, which never change; the adapter."""


class WeightUpdate(Section):
    """New weights for a server.

    A base cannot be sampled from before an adapter has come. A server that does not hold the base of the same
    source refuses an adapter (409).

    weights: version of these weights.
    part: which of the policy's weights they are.
    goes_on: True lets completions under way go on with the new weights from their next token on; else the
        new weights wait until those have ended.
    handed: True where the tensors come with this message (Ray); needs nothing of what follows.
    path: safetensors file that server and trainer both see; None where the tensors are broadcast.
    host, port: address of the store in which the members of the broadcast meet.
    token: what its members know and strangers do not; made for this broadcast.
    backend: of the broadcast.
    tensors: what is broadcast, in this order.
    """

    weights: WeightVersion
    part: Part = "whole"
    goes_on: bool = False
    handed: bool = False
    path: str | None = None
    host: str = ""
    port: int = Field(default=0, ge=0, le=65535)
    token: str = Field(default="", repr=False)
    backend: Literal["gloo", "nccl"] = "gloo"
    tensors: tuple[TensorSpec, ...] = ()

    @model_validator(mode="after")
    def _has_one_source(self) -> WeightUpdate:
        is_broadcast = bool(self.host and self.port and self.token and self.tensors)
        if [is_broadcast, self.path is not None, self.handed].count(True) != 1:
            raise ValueError("give `path`, or else `host`, `port`, `token` and `tensors`")
        return self


Seed = Annotated[int, Field(ge=0, lt=2**31)]

MAX_COMPLETIONS = 65_536
"""Most completions in a request."""

MAX_REQUEST_TOKENS = 8_000_000
"""Token ids of prompts that a trainer puts into one request, so that it stays below 64 MB."""


class PromptRequest(Section):
    """Request for completions of one prompt, one for each seed."""

    token_ids: tuple[NonNegativeInt, ...] = Field(min_length=1)
    seeds: tuple[Seed, ...] = Field(min_length=1)


class GenerateRequest(Section):
    """Request for completions of several prompts.

    weights: version that all of them are sampled from; a server that holds another refuses (409).
    or_later: True samples from that version or any later one of the same source, as the server holds it when
        a completion begins. The request waits where the server holds none of them yet, and new weights that
        arrive meanwhile go before completions that have not begun.
    generation: sampling settings.
    greedy: takes the likeliest tokens.
    eos_id: token that ends a completion, by the trainer's tokenizer.
    prompts: at least one.
    """

    weights: WeightVersion
    or_later: bool = False
    generation: GenerationConfig
    greedy: bool
    eos_id: int
    prompts: tuple[PromptRequest, ...] = Field(min_length=1)


class Failure(Section):
    """The last line of an answer whose completions could not all be sampled. detail: why, in a sentence."""

    detail: str


def version_runs(versions: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """`Rollout.version_runs` of a completion's tokens, each of which has a version."""
    runs = tuple((version, sum(1 for _ in run)) for version, run in groupby(versions))
    return runs if len(runs) > 1 else ()


class CompletionReply(Section):
    """One completion.

    prompt_index: index into `GenerateRequest.prompts`.
    seed_index: index into the seeds of that prompt.
    token_ids, logprobs, text, finish_reason: see `conch.types.Completion`.
    version: of the weights that it was sampled from; of its first token, where they changed meanwhile.
    version_runs: see `conch.types.Rollout`.
    """

    prompt_index: NonNegativeInt
    seed_index: NonNegativeInt
    token_ids: tuple[NonNegativeInt, ...]
    logprobs: tuple[FiniteFloat, ...]
    text: str
    finish_reason: FinishReason
    version: int
    version_runs: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(
        cls,
        completion: Completion,
        prompt_index: int,
        seed_index: int,
        version: int,
        version_runs: tuple[tuple[int, int], ...] = (),
    ) -> CompletionReply:
        """The reply with a completion."""
        return cls(
            prompt_index=prompt_index,
            seed_index=seed_index,
            token_ids=completion.token_ids,
            logprobs=completion.logprobs,
            text=completion.text,
            finish_reason=completion.finish_reason,
            version=version,
            version_runs=version_runs,
        )

    @model_validator(mode="after")
    def _has_a_logprob_for_each_token(self) -> CompletionReply:
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(f"{len(self.token_ids)} tokens have {len(self.logprobs)} log-probs")
        return self
