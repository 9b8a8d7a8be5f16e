"""A rollout server whose sampler computes nothing: completions take their time, as on other machines.

    python -m benchmarks.waiting_sampler --model FOLDER --port 8100 --seconds 0.08 --mean-length 41

It is the real server (`conch.rollouts.server`) around a device that samples one completion after the other,
each in the same time, whatever the trainer's cores do. Tokens are drawn by the completion's seed.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from torch import Tensor

from conch.config import TokenizerConfig
from conch.models.loading import load_tokenizer
from conch.rollouts.protocol import CompletionReply, GenerateRequest, WeightUpdate
from conch.rollouts.server import RolloutServer, listen
from conch.rollouts.server_config import ServerConfig
from conch.rollouts.weight_sync import received_tensors
from conch.types import Completion, FinishReason

_SAMPLED = 64
"""Tokens that are drawn: the first of the vocabulary."""


class WaitingSampler:
    """A `conch.rollouts.server.Sampler` that waits.

    seconds: that a completion takes.
    mean_length: of completions, in tokens; their lengths are geometric.
    """

    name = "waiting"
    has_died = False
    workers = 1
    device = "cpu"
    lora = None
    max_model_len = 1024

    def __init__(self, vocabulary: int, eos_id: int, seconds: float, mean_length: float) -> None:
        self.vocabulary = vocabulary
        self.max_num_seqs = 1
        self.busy_s = 0.0
        self._eos_id = eos_id
        self._seconds = seconds
        self._mean_length = mean_length
        self._free_at = 0.0

    async def load(self, update: WeightUpdate, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Read new weights and keep none."""
        if update.path is None and tensors is None:
            await asyncio.to_thread(lambda: [*received_tensors(update, 1, 2, 60.0)])

    async def completions(self, request: GenerateRequest, version: int) -> AsyncIterator[CompletionReply]:
        """Yield completions as their time comes."""
        longest = request.generation.max_new_tokens
        for prompt_index, prompt in enumerate(request.prompts):
            for seed_index, seed in enumerate(prompt.seeds):
                self._free_at = max(self._free_at, time.monotonic()) + self._seconds
                self.busy_s += self._seconds
                await asyncio.sleep(self._free_at - time.monotonic())
                yield CompletionReply.of(self._completion(seed, longest), prompt_index, seed_index, version)

    def _completion(self, seed: int, longest: int) -> Completion:
        draw = random.Random(seed)
        length = 1 + int(math.log(1 - draw.random()) / math.log(1 - 1 / self._mean_length))
        tokens = [token for token in range(_SAMPLED) if token != self._eos_id]
        ids = draw.choices(tokens, k=min(length, longest))
        reason: FinishReason = "length"
        if length <= longest:
            ids[-1], reason = self._eos_id, "eos"
        return Completion("", tuple(ids), (-math.log(self.vocabulary),) * len(ids), reason)


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.waiting_sampler")
    parser.add_argument("--model", required=True, help="folder of the policy")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="that a completion takes")
    parser.add_argument("--mean-length", type=float, required=True, help="of completions, in tokens")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(TokenizerConfig(), arguments.model)
    eos_id = tokenizer.eos_token_id
    assert isinstance(eos_id, int)
    sampler = WaitingSampler(len(tokenizer), eos_id, arguments.seconds, arguments.mean_length)
    with tempfile.TemporaryDirectory() as folder:
        config = ServerConfig(
            engine="transformers", model=arguments.model, port=arguments.port, weights_dir=Path(folder)
        )
        asyncio.run(listen(RolloutServer(sampler, tokenizer, Path("/dev/shm")), config))


if __name__ == "__main__":
    main()
