"""What one request asks of a server: prompts with their seeds, split evenly, and what is still missing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby

from conch.rollouts.protocol import MAX_COMPLETIONS, MAX_REQUEST_TOKENS, PromptRequest
from conch.types import Prompt


@dataclass(eq=False)
class PromptBatch:
    """The prompts of one request.

    requests: prompts with their seeds.
    indices: for each prompt, the index of each of its completions among all that are to be sampled.
    """

    requests: list[PromptRequest]
    indices: list[list[int]]

    @property
    def num_completions(self) -> int:
        return sum(len(column) for column in self.indices)

    def max_tokens(self, max_new_tokens: int) -> int:
        """Prompt and completion tokens, at most."""
        return sum(
            len(column) * (len(request.token_ids) + max_new_tokens)
            for request, column in zip(self.requests, self.indices, strict=True)
        )


def batch_size(prompts: Sequence[Prompt], num_servers: int, requests_per_server: int = 4) -> int:
    """Completions of a request: few requests for each server, none that it would find too large."""
    even = -(-len(prompts) // (num_servers * requests_per_server))
    return max(1, min(even, largest_batch(prompts)))


def largest_batch(prompts: Sequence[Prompt]) -> int:
    """Most completions in a request for some of these prompts."""
    longest = max((len(prompt.token_ids) for prompt in prompts), default=1)
    return max(1, min(MAX_COMPLETIONS, MAX_REQUEST_TOKENS // max(1, longest)))


def split_prompts(
    prompts: Sequence[Prompt], indices: Sequence[int], seeds: Sequence[int], size: int
) -> list[PromptBatch]:
    """Split prompts into batches of about `size` completions.

    indices: of the completions, one for each prompt, among all that are to be sampled.

    Equal prompts in a row become one request with several seeds, and stay in one batch: a server computes
    what they share once.
    """
    batches = [PromptBatch([], [])]
    previous_ids: tuple[int, ...] | None = None
    for prompt, index, seed in zip(prompts, indices, seeds, strict=True):
        batch, ids = batches[-1], prompt.token_ids
        if ids == previous_ids:
            batch.requests[-1] = PromptRequest(token_ids=ids, seeds=(*batch.requests[-1].seeds, seed))
            batch.indices[-1].append(index)
            continue
        if batch.num_completions >= size:
            batch = PromptBatch([], [])
            batches.append(batch)
        batch.requests.append(PromptRequest(token_ids=ids, seeds=(seed,)))
        batch.indices.append([index])
        previous_ids = ids
    return [batch for batch in batches if batch.requests]


def even_blocks(
    prompts: Sequence[Prompt], indices: Sequence[int], seeds: Sequence[int], count: int
) -> list[PromptBatch]:
    """Split prompts into at most `count` blocks of prompts in a row, as even as equal prompts that stay
    together allow: one request for each server.

    The same prompts give the same blocks, so that the same rows are computed together. A block that a server
    would find too large is split.
    """
    runs = [list(run) for _, run in groupby(range(len(prompts)), lambda place: prompts[place].token_ids)]
    blocks: list[list[int]] = [[] for _ in range(count)]
    for run in runs:
        blocks[run[0] * count // len(prompts)] += run
    return [
        batch
        for block in blocks
        if block
        for batch in split_prompts(
            [prompts[place] for place in block],
            [indices[place] for place in block],
            [seeds[place] for place in block],
            largest_batch(prompts),
        )
    ]


def missing_part(batch: PromptBatch, missing: Collection[int]) -> PromptBatch | None:
    """The part of a batch whose completions are in `missing`, with their seeds; None where it is empty."""
    rest = PromptBatch([], [])
    for request, column in zip(batch.requests, batch.indices, strict=True):
        pairs = [(index, seed) for index, seed in zip(column, request.seeds, strict=True) if index in missing]
        if pairs:
            seeds = tuple(seed for _, seed in pairs)
            rest.indices.append([index for index, _ in pairs])
            rest.requests.append(PromptRequest(token_ids=request.token_ids, seeds=seeds))
    return rest if rest.requests else None
