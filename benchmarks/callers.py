"""Ways to get rewards for a list of samples: ours, and two that others use, each as small as it can be.

Every way takes a share of the samples, as one rank of a run has it, and says of each what its score is and
after how many seconds it was known: since the share was handed in, or where samples are asked for one by one
since this one was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import numpy as np
from tritonclient.grpc import InferInput

from benchmarks.limit import Work
from conch.config import RewardClientConfig, RewardConfig
from conch.errors import ConchError
from conch.rewards.served import TritonReward
from conch.triton.channel import Access, open_client

FIXED_BATCH = 24

Scored = list[tuple[float, float]]
"""Score, and seconds from the call until it was known, of each sample."""

Way = Callable[[Sequence[int]], Scored]
"""Takes places in the list of samples."""


def conch_way(url: str, work: Work) -> tuple[Way, Callable[[], None]]:
    """Our client, one for all callers, as a process has one; and what closes it."""
    rollouts = work.rollouts()
    # Nothing is remembered: every round asks for the same samples.
    source = TritonReward(url, RewardConfig(client=RewardClientConfig(cache_size=0, deadline_s=300.0)))

    def score(places: Sequence[int]) -> Scored:
        scored = []
        for result in source.submit([rollouts[place] for place in places]).result():
            if not result.ok:
                raise ConchError(f"a sample was not scored: {result.detail}")
            scored.append((result.scores["reward"], result.latency_s))
        return scored

    return score, source.close


def fixed_batches(url: str, work: Work, *, masked: bool) -> tuple[Way, Callable[[], None]]:
    """One request after the other, each with 24 samples in the order given, padded to the longest of all.

    masked: False as trlX does it, which sends no mask: the model then computes the padding, too.
    """
    address, model = url.split("/")
    client = open_client(address, Access())

    def score(places: Sequence[int]) -> Scored:
        started, scored = time.perf_counter(), []
        longest = max(len(work.ids[place]) for place in places)
        for first in range(0, len(places), FIXED_BATCH):
            rows = [work.ids[place] for place in places[first : first + FIXED_BATCH]]
            ids = np.array([row + [work.pad] * (longest - len(row)) for row in rows], np.int64)
            mask = np.array([[not masked or place < len(row) for place in range(longest)] for row in rows])
            inputs = [
                InferInput(name, list(ids.shape), "INT64").set_data_from_numpy(values.astype(np.int64))
                for name, values in (("input_ids", ids), ("attention_mask", mask))
            ]
            reply: Any = client.infer(model, inputs)
            rewards = reply.as_numpy("rewards")
            scored += [(float(reward), time.perf_counter() - started) for reward in rewards[:, 0]]
        return scored

    return score, client.close


def one_a_post(url: str, work: Work) -> tuple[Way, Callable[[], None]]:
    """One POST a sample, one after the other; callers share a pool of connections that stay open.

    The seconds of a sample are those of its own POST. The body is OpenRLHF's.

    url: reads {"query": [text], ...} and answers {"rewards": [number], ...}.
    """
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    client = httpx2.Client(timeout=300.0, limits=limits, trust_env=False)

    def score(places: Sequence[int]) -> Scored:
        scored = []
        for place in places:
            started = time.perf_counter()
            body = {"query": [work.texts[place]], "prompts": [""], "labels": [""]}
            reply = client.post(url, json=body).raise_for_status()
            scored.append((reply.json()["rewards"][0], time.perf_counter() - started))
        return scored

    return score, client.close


def ask_all(way: Way, callers: int, samples: int) -> tuple[Scored, float]:
    """Each caller asks for its share, all at once; what came, in order, and the seconds of the slowest."""
    shares = [range(caller, samples, callers) for caller in range(callers)]
    scored: Scored = [(0.0, 0.0)] * samples
    with ThreadPoolExecutor(callers) as pool:
        started = time.perf_counter()
        for share, of_share in zip(shares, pool.map(way, shares), strict=True):
            for place, one in zip(share, of_share, strict=True):
                scored[place] = one
        return scored, time.perf_counter() - started
