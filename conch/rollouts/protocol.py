"""What trainers and rollout servers say to each other, as JSON over HTTP.

    GET  /health     -> Health
    POST /weights    Given -> Health, once the weights are in
    POST /generate   Asked -> one line of JSON for each completion, as it ends: Line

A server refuses with `{"detail": one sentence}`: 400 what it can never do, 409 weights that it does not hold.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from conch.config import GenerationConfig, Section
from conch.types import FinishReason


class WeightVersion(Section):
    """Which weights. source: the run that they are of. version: updates that its policy had seen."""

    source: str
    version: int


HIGHEST_RANK = 512
"""Of an adapter that vLLM can be told to make room for."""


class LoraRoom(Section):
    """What of an adapter vLLM can take. rank: the highest. modules: last parts of the names of the layers
    that it may be on."""

    rank: int
    modules: tuple[str, ...]


class Health(Section):
    """A server that can be asked.

    stamp: None before it was given any weights.
    max_model_len: longest prompt and completion together, in tokens.
    max_num_seqs: completions sampled at once.
    workers: processes that each hold a part of the weights. device: `cpu` or `cuda`.
    lora: None where it takes no adapter. base: the run whose base it holds, for its adapters; None where it
        holds none.
    """

    stamp: WeightVersion | None
    max_model_len: int
    max_num_seqs: int
    workers: int
    device: str
    lora: LoraRoom | None = None
    base: str | None = None


class TensorSpec(Section):
    """A tensor that is to come. dtype: its name in torch."""

    name: str
    dtype: str
    shape: tuple[int, ...]


Part = Literal["whole", "base", "adapter"]
"""Of a policy: all of its weights; those that its adapter adds to, which never change; or the adapter."""


class WeightUpdate(Section):
    """New weights. A base cannot be sampled from before an adapter has come; an adapter is refused (409) by a
    server that does not hold the base of its source.

    path: a safetensors file that server and trainer both see; or else host, port, backend: of the group that
        the tensors are broadcast in, in their order.
    """

    stamp: WeightVersion
    part: Part = "whole"
    path: str | None = None
    host: str = ""
    port: int = 0
    backend: Literal["gloo", "nccl"] = "gloo"
    tensors: tuple[TensorSpec, ...] = ()


class PromptRequest(Section):
    """Completions of one prompt, one for each seed."""

    token_ids: tuple[int, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)


class GenerateRequest(Section):
    """Completions of several prompts, all from these weights. eos_id: ends one, by the asker's tokenizer."""

    stamp: WeightVersion
    generation: GenerationConfig
    greedy: bool
    eos_id: int
    wanted: tuple[PromptRequest, ...] = Field(min_length=1)


class CompletionReply(Section):
    """A completion. prompt, sample: its places in `wanted` and in the seeds there. version: of the weights
    that made it."""

    prompt: int
    sample: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: FinishReason
    version: int
