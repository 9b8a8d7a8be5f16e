"""Between the messages of clients and the records of the ledger."""

from __future__ import annotations

import re

from conch.service.leases.records import Handout, Post
from conch.service.protocol import CompletionsResponse, RewardsRequest, token_hash
from conch.service.refusals import NOT_FOUND, UNPROCESSABLE, RefusedError

_SAMPLE_ID = re.compile(r"([\w-]+)\.(\d{1,15})\.(\d{1,9})")


def sample_id(run_id: str, number: int, place: int) -> str:
    """Id of a sample. number: of its group. place: in the group."""
    return f"{run_id}.{number}.{place}"


def handout_reply(run_id: str, handout: Handout, lease_s: float) -> CompletionsResponse:
    """What a client reads of the samples that it was handed."""
    group = handout.group
    samples = [group.samples[place] for place in handout.places]
    completions = [sample.completion for sample in samples]
    return CompletionsResponse(
        prompt=group.prompt.text,
        completions=[completion.text for completion in completions],
        completion_tokens=[[*group.prompt.token_ids, *each.token_ids] for each in completions],
        model_version=(run_id, group.version),
        sample_ids=[sample_id(run_id, group.number, place) for place in handout.places],
        token_hashes=[sample.hash for sample in samples],
        finish_reasons=[completion.finish_reason for completion in completions],
        lease_s=lease_s,
    )


def post_of(request: RewardsRequest, run_id: str) -> Post:
    """What a request rewards.

    Raises:
        RefusedError: it does not say which tokens, or names samples of another run.
    """
    hashes = request.token_hashes
    if request.completion_tokens is not None:
        hashes = [token_hash(ids) for ids in request.completion_tokens]
        if request.token_hashes not in (None, hashes):
            raise RefusedError(UNPROCESSABLE, "`token_hashes` are not those of `completion_tokens`")
    if hashes is None:
        raise RefusedError(
            UNPROCESSABLE,
            "which tokens are rewarded? Send `token_hashes` or `completion_tokens` as they came",
        )
    samples = None
    if request.sample_ids is not None:
        samples = tuple(_place_of(each, run_id) for each in request.sample_ids)
    return Post(request.client_id, samples, tuple(hashes), tuple(request.rewards))


def _place_of(identifier: str, run_id: str) -> tuple[int, int]:
    match = _SAMPLE_ID.fullmatch(identifier)
    if match is None:
        raise RefusedError(NOT_FOUND, f"{identifier[:80]!r} is no id of a sample")
    if match[1] != run_id:
        raise RefusedError(NOT_FOUND, f"sample {identifier[:80]} is of another run than {run_id}")
    return int(match[2]), int(match[3])
