"""Sample completions with vLLM in the trainer's own process.

vLLM lives in an environment of its own (docs/rollouts.md): this file and the others named `vllm_*` import
it, and only when they are used. The model is built from the policy's configuration, without weights; they are
handed over before each phase of sampling in which the policy is another one than in the last: all of them, or
an adapter alone where vLLM can take it so (`conch.rollouts.weight_sync`).
"""

from __future__ import annotations

import itertools
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conch.config import GenerationConfig, RolloutConfig
from conch.errors import RolloutError
from conch.models.loading import context_window
from conch.rollouts.base import check_lengths, draw_seeds, in_order
from conch.rollouts.protocol import LoraRoom, Part
from conch.rollouts.stopping import StopCondition
from conch.rollouts.vllm.build import (
    adapter_request,
    build,
    check_architecture,
    check_installed,
    knows_lora,
    leave_groups,
    platform,
    quiet_compiler,
    write_config,
)
from conch.rollouts.weight_sync import Handover
from conch.types import OnFinished, Prompt, Rollout


@dataclass(frozen=True, slots=True)
class Sampled:
    """A completion as vLLM gives it, what follows its end included. version: of the weights that made it."""

    token_ids: list[int]
    logprobs: list[float]
    version: int


def sampling_params(
    generation: GenerationConfig, eos_id: int, *, greedy: bool, seed: int, watched: bool
) -> Any:
    """vLLM's settings for one completion. watched: reports after each token, to look for stop strings."""
    from vllm.sampling_params import (  # pyright: ignore[reportMissingImports]
        RequestOutputKind,
        SamplingParams,
    )

    shaping: dict[str, Any] = {"temperature": 0.0}
    if not greedy:
        shaping = {"temperature": generation.temperature, "top_p": generation.top_p, "seed": seed}
        shaping["top_k"] = generation.top_k
    return SamplingParams(
        max_tokens=generation.max_new_tokens,
        stop_token_ids=[eos_id],
        ignore_eos=True,  # of the model's own configuration; the tokenizer's stands above
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.CUMULATIVE if watched else RequestOutputKind.FINAL_ONLY,
        skip_clone=True,  # made for one request
        **shaping,
    )


class ColocatedVLLM:
    """vLLM's engine in this process, with the policy's weights in it.

    lm: called when weights are handed over. several: True where other processes of a launcher hold one, too.

    Raises:
        ConfigError, ModelError, RolloutError: from the constructor: vLLM is not there, cannot serve the
            model, or does not fit into memory.
    """

    def __init__(
        self, lm: Callable[[], PreTrainedModel], config: RolloutConfig, dtype: torch.dtype, *, several: bool
    ) -> None:
        check_installed()
        # Has the engine's core in this process: its tensors are then at hand, and so are ours.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        check_architecture(type(lm()).__name__)
        merge = platform().is_cpu() if config.merge_adapter is None else config.merge_adapter
        self._handover = Handover(lm, merge=merge)
        self._config = config
        self._several = several
        self._loaded: int | None = None
        self._has_base = False
        self._adapter: Any = None
        self._names = itertools.count()
        self.max_model_len = config.max_model_len or context_window(lm().config)
        with tempfile.TemporaryDirectory() as folder, _generators_untouched():
            room = self._handover.room_wanted() if knows_lora(type(lm()).__name__) else None
            self._engine = build(write_config(lm(), folder), config, dtype, several=several, lora=room)
        self._takes_adapter = self._handover.adapter_alone(room and self._room())
        self._can_sleep = config.sleep_level > 0 and platform().is_sleep_mode_available()

    def refit(self, version: int) -> None:
        """Hold the policy's weights, which have this version; does nothing where vLLM has them already."""
        if self._can_sleep and self._engine.is_sleeping():
            self._engine.wake_up(tags=["weights"])
        if self._loaded != version:
            self._hand_over(version)
        if self._can_sleep:
            self._engine.wake_up()

    def _room(self) -> LoraRoom:
        return LoraRoom.model_validate(self._engine.collective_rpc("lora_room")[0])

    def _hand_over(self, version: int) -> None:
        if self._takes_adapter:
            if not self._has_base:
                self._give("base")
                self._has_base = True
            self._give("adapter")
            self._adapter = adapter_request(version)
        else:
            self._give("whole")
        if not self._engine.reset_prefix_cache():
            raise RolloutError("vLLM still samples while it gets new weights: finish one generation first")
        self._engine.engine_core.set_weight_version(str(version))
        self._loaded = version

    def _give(self, part: Part) -> None:
        with quiet_compiler(self._config):
            self._engine.collective_rpc("take_part", args=(part, self._handover.tensors(part).items()))

    def rest(self) -> None:
        """Give back memory until the next `refit`."""
        if self._can_sleep:
            self._engine.sleep(level=self._config.sleep_level)
            if self._config.sleep_level == 2:
                self._loaded, self._has_base = None, False

    def sample(
        self, prompts: Sequence[Sequence[int]], params: Sequence[Any], reached: Callable[[list[int]], bool]
    ) -> Iterator[dict[int, Sampled]]:
        """Completions by their prompts' places, those that ended in the same step together.

        Equal prompts share the blocks of their cache, so what is common is computed once. params: one for
        each prompt. reached: True for ids that need no more; asked of requests that report after each token.
        """
        pending = {
            self._add(list(prompt), each): place
            for place, (prompt, each) in enumerate(zip(prompts, params, strict=True))
        }
        try:
            while pending:
                ended = self._ended(reached)
                if ended:
                    yield {pending.pop(name): each for name, each in ended.items()}
        finally:
            self._engine.abort_request(list(pending))

    def _ended(self, reached: Callable[[list[int]], bool]) -> dict[str, Sampled]:
        """Completions that one more step has brought to their end, by their requests' names."""
        ended: dict[str, Sampled] = {}
        for output in self._step():
            made = output.outputs[0]
            if not output.finished:
                if not reached(made.token_ids):
                    continue
                self._engine.abort_request([output.request_id])
            ended[output.request_id] = self._sampled(made)
        return ended

    def _add(self, token_ids: list[int], params: Any) -> str:
        name = str(next(self._names))
        tokens = {"type": "token", "prompt_token_ids": token_ids}
        self._engine.add_request(name, tokens, params, lora_request=self._adapter)
        return name

    def _step(self) -> list[Any]:
        with quiet_compiler(self._config):
            return self._engine.step()

    def _sampled(self, made: Any) -> Sampled:
        assert self._loaded is not None
        # Spans are reported with the end; what was ended from here was made by the weights that are loaded.
        spans = made.weight_versions or []
        version = int(spans[0].version) if spans else self._loaded
        return Sampled(list(made.token_ids), list(made.logprobs.logprobs), version)

    def close(self) -> None:
        """Give back all memory."""
        if self._several:  # the core's own shutdown would leave the trainers' process group, too
            self._engine.model_executor.shutdown()
            leave_groups()
        else:
            self._engine.engine_core.shutdown()


class VLLMEngine:
    """A `RolloutEngine` over a `ColocatedVLLM`, which several of them may share.

    version: gives the number of updates the policy has seen. Seeds are drawn from torch's global generator.
    """

    def __init__(
        self,
        vllm: ColocatedVLLM,
        tokenizer: PreTrainedTokenizerBase,
        config: GenerationConfig,
        *,
        version: Callable[[], int],
    ) -> None:
        self._vllm = vllm
        self._config = config
        self._ending = StopCondition(tokenizer, config.stop)
        self._version = version

    def generate(
        self, prompts: Sequence[Prompt], *, greedy: bool = False, on_finished: OnFinished | None = None
    ) -> Iterator[list[Rollout]]:
        """See `RolloutEngine.generate`. All prompts are sampled at once, whatever the chunks they come in.

        Raises:
            ConfigError: a prompt is longer than `max_model_len` leaves room for.
        """
        check_lengths(prompts, self._config, self._vllm.max_model_len)
        if not prompts:
            return
        self._vllm.refit(self._version())
        try:
            yield from in_order(prompts, self._sampled(prompts, greedy), self._config.chunk_size, on_finished)
        finally:
            self._vllm.rest()

    def _sampled(self, prompts: Sequence[Prompt], greedy: bool) -> Iterator[dict[int, Rollout]]:
        ending = self._ending
        params = [
            sampling_params(self._config, ending.eos_id, greedy=greedy, seed=seed, watched=ending.watches)
            for seed in draw_seeds(len(prompts))
        ]
        for ended in self._vllm.sample([each.token_ids for each in prompts], params, ending.reached):
            yield {
                place: Rollout(prompts[place], ending.completion(each.token_ids, each.logprobs), each.version)
                for place, each in ended.items()
            }


@contextmanager
def _generators_untouched() -> Iterator[None]:
    """vLLM seeds every generator of the process when it starts; inside, what it does to them is undone."""
    own, numpys = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(own)
            np.random.set_state(numpys)
