"""Sample completions with vLLM in the trainer's own process.

vLLM needs an environment of its own (docs/rollouts.md): only this package imports it, when an engine is made.
The model is built from the policy's configuration, without weights. They are loaded before each phase of
sampling for which the policy has changed: all weights, or an adapter alone (`conch.rollouts.weight_sync`).
"""

from __future__ import annotations

import itertools
import os
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from conch.rollouts.protocol import LoraCapacity, Part
from conch.rollouts.stopping import StopCondition
from conch.rollouts.vllm.build import (
    adapter_request,
    build,
    check_architecture,
    check_installed,
    leave_groups,
    platform,
    supports_adapters,
    without_compiler,
    write_config,
)
from conch.rollouts.weight_sync import WeightSource
from conch.types import OnFinished, Prompt, Rollout


@dataclass(frozen=True, slots=True)
class VLLMCompletion:
    """A completion as vLLM gives it, ids behind its end included.

    version: of the weights that it was sampled from.
    """

    token_ids: list[int]
    logprobs: list[float]
    version: int


def sampling_params(
    generation: GenerationConfig, end_ids: Iterable[int], *, greedy: bool, seed: int, every_token: bool
) -> Any:
    """vLLM's settings for one completion.

    every_token: vLLM reports after each token, so that stop strings can be looked for; else at the end only.
    """
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
        stop_token_ids=sorted(end_ids),
        ignore_eos=True,  # the one of the model's configuration; the tokenizer's is in `stop_token_ids`
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.CUMULATIVE if every_token else RequestOutputKind.FINAL_ONLY,
        skip_clone=True,  # made for one request
        **shaping,
    )


class ColocatedVLLM:
    """vLLM's engine in this process, with the policy's weights in it.

    lm: gives the policy, called whenever its weights are loaded.
    dtype: of vLLM's weights.
    several_ranks: True where other ranks of this run hold an engine, too.

    Raises:
        ConfigError: from the constructor: vLLM is absent.
        ModelError: from the constructor: vLLM cannot serve the model.
        RolloutError: from the constructor: vLLM does not fit into memory.
    """

    def __init__(
        self,
        lm: Callable[[], PreTrainedModel],
        config: RolloutConfig,
        dtype: torch.dtype,
        *,
        several_ranks: bool,
    ) -> None:
        check_installed()
        # Keeps the engine's core in this process, so that it can copy the policy's tensors directly.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        check_architecture(type(lm()).__name__)
        merge = platform().is_cpu() if config.merge_adapter is None else config.merge_adapter
        self._weights = WeightSource(lm, merge=merge)
        self._config = config
        self._several_ranks = several_ranks
        self._version: int | None = None
        self._has_base = False
        self._adapter: Any = None
        self._request_ids = itertools.count()
        self.max_model_len = config.max_model_len or context_window(lm().config)
        with tempfile.TemporaryDirectory() as folder, _generators_untouched():
            lora = self._weights.required_lora() if supports_adapters(type(lm()).__name__) else None
            model = write_config(lm(), folder)
            self._engine = build(model, config, dtype, several_ranks=several_ranks, lora=lora)
        if lora is not None:  # what was required, less the layers that vLLM has no LoRA for
            lora = LoraCapacity.model_validate(self._engine.collective_rpc("lora_capacity")[0])
        self._takes_adapter = self._weights.sends_adapter_alone(lora)
        self._can_sleep = config.sleep_level > 0 and platform().is_sleep_mode_available()

    def update_weights(self, version: int) -> None:
        """Wake vLLM up, and load the policy's weights where it does not hold this version of them."""
        if self._can_sleep and self._engine.is_sleeping():
            self._engine.wake_up(tags=["weights"])
        if self._version != version:
            self._load(version)
        if self._can_sleep:
            self._engine.wake_up()

    def _load(self, version: int) -> None:
        if self._takes_adapter:
            if not self._has_base:
                self._load_part("base")
                self._has_base = True
            self._load_part("adapter")
            self._adapter = adapter_request(version)
        else:
            self._load_part("whole")
        if not self._engine.reset_prefix_cache():
            raise RolloutError("vLLM still samples while it gets new weights: finish one generation first")
        self._engine.engine_core.set_weight_version(str(version))
        self._version = version

    def _load_part(self, part: Part) -> None:
        with without_compiler(self._config):
            self._engine.collective_rpc("load_part", args=(part, self._weights.tensors(part).items()))

    def sleep(self) -> None:
        """Release memory until the next `update_weights`, as `rollout.sleep_level` says."""
        if self._can_sleep:
            self._engine.sleep(level=self._config.sleep_level)
            if self._config.sleep_level == 2:
                self._version, self._has_base = None, False

    def sample(
        self, prompts: Sequence[Sequence[int]], params: Sequence[Any], reached: Callable[[list[int]], bool]
    ) -> Iterator[dict[int, VLLMCompletion]]:
        """Yield completions by their prompts' indices, those that end in the same step together.

        Equal prompts share the blocks of their cache, so what is common is computed once.

        params: `sampling_params` of each prompt.
        reached: True for ids that need no further token; called for requests that report after each token.
        """
        pending = {
            self._add_request(list(prompt), each): index
            for index, (prompt, each) in enumerate(zip(prompts, params, strict=True))
        }
        try:
            while pending:
                ended = self._step(reached)
                if ended:
                    yield {pending.pop(request_id): each for request_id, each in ended.items()}
        finally:
            self._engine.abort_request(list(pending))

    def _step(self, reached: Callable[[list[int]], bool]) -> dict[str, VLLMCompletion]:
        """Completions, by their requests' ids, that end with one more step."""
        with without_compiler(self._config):
            outputs = self._engine.step()
        ended: dict[str, VLLMCompletion] = {}
        for output in outputs:
            completion = output.outputs[0]
            if not output.finished:
                if not reached(completion.token_ids):
                    continue
                self._engine.abort_request([output.request_id])
            ended[output.request_id] = self._completion(completion)
        return ended

    def _add_request(self, token_ids: list[int], params: Any) -> str:
        request_id = str(next(self._request_ids))
        tokens = {"type": "token", "prompt_token_ids": token_ids}
        self._engine.add_request(request_id, tokens, params, lora_request=self._adapter)
        return request_id

    def _completion(self, output: Any) -> VLLMCompletion:
        assert self._version is not None
        # vLLM reports versions with the end; a request that was aborted had the weights that are loaded.
        spans = output.weight_versions or []
        version = int(spans[0].version) if spans else self._version
        return VLLMCompletion(list(output.token_ids), list(output.logprobs.logprobs), version)

    def close(self) -> None:
        """Shut vLLM down and release all memory."""
        if self._several_ranks:  # the core's own shutdown would leave the trainers' process group, too
            self._engine.model_executor.shutdown()
            leave_groups()
        else:
            self._engine.engine_core.shutdown()


class VLLMEngine:
    """A `RolloutEngine` over a `ColocatedVLLM`, which several engines may share.

    Seeds are drawn from torch's global generator.

    version: gives the number of updates that the policy has seen.
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
        self._stop_condition = StopCondition(tokenizer, config)
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
        self._vllm.update_weights(self._version())
        try:
            finished = self._rollouts(prompts, greedy)
            yield from in_order(prompts, finished, self._config.chunk_size, on_finished)
        finally:
            self._vllm.sleep()

    def _rollouts(self, prompts: Sequence[Prompt], greedy: bool) -> Iterator[dict[int, Rollout]]:
        stop = self._stop_condition
        params = [
            sampling_params(
                self._config, stop.end_ids, greedy=greedy, seed=seed, every_token=stop.has_stop_strings
            )
            for seed in draw_seeds(len(prompts))
        ]
        for ended in self._vllm.sample([prompt.token_ids for prompt in prompts], params, stop.reached):
            yield {
                index: Rollout(
                    prompts[index],
                    stop.completion(prompts[index].token_ids, each.token_ids, each.logprobs),
                    each.version,
                )
                for index, each in ended.items()
            }


@contextmanager
def _generators_untouched() -> Iterator[None]:
    """Restore the process's random generators at the end: vLLM seeds all of them when it starts."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
