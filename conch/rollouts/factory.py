"""The engine that the section `rollout` names, for all trainers that learn from rewards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import uuid4

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conch.config import GenerationConfig, RolloutConfig
from conch.distributed.train_engine import TrainEngine
from conch.errors import ConchError, ConfigError
from conch.models.adapter import adapted_and_shared, copied_and_shared
from conch.rollouts.hf.engine import HFEngine
from conch.rollouts.ray.check import check_ray
from conch.rollouts.remote.engine import RemoteEngine
from conch.rollouts.remote.pool import ServerPool
from conch.rollouts.remote.stream import GroupStream
from conch.rollouts.stopping import with_end_ids
from conch.rollouts.vllm.build import check_installed
from conch.rollouts.weight_sync import WeightSource
from conch.types import Rollout, RolloutEngine

_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check_sampling(config: RolloutConfig) -> None:
    """Check what can be checked of sampling before the model is loaded.

    Raises:
        ConfigError: vLLM is to run in this process, or Ray beside it, and is absent or of a release that
            Conch does not know; the machine lacks what Ray is asked for.
    """
    if config.urls is not None:
        return
    if config.engine == "ray":
        check_ray(config)
    if config.engine == "vllm":
        check_installed()


class RolloutEngineFactory:
    """Makes a `RolloutEngine` for a generation config.

    All engines of a run share one vLLM, or one pool of servers, which is started with the first.

    lm: gives the policy's language model, called whenever its weights are needed.
    version: gives the number of updates that the policy has seen.
    """

    def __init__(
        self,
        config: RolloutConfig,
        engine: TrainEngine,
        tokenizer: PreTrainedTokenizerBase,
        lm: Callable[[], PreTrainedModel],
        version: Callable[[], int],
    ) -> None:
        self._config = config
        self._engine = engine
        self._tokenizer = tokenizer
        self._lm = lm
        self._version = version
        self._shared: Any = None
        self._samplers: Any = None

    def __call__(self, generation: GenerationConfig) -> RolloutEngine:
        """Make an engine. All ranks call it together.

        Raises:
            ConchError: on all ranks, where vLLM cannot run what the settings name.
        """
        if self._config.engine == "hf" and self._config.urls is None:
            autocast = self._engine.autocast
            return HFEngine(self._lm, self._tokenizer, generation, version=self._version, autocast=autocast)
        generation = with_end_ids(generation, self._lm(), self._tokenizer)
        if self._shared is None:
            self._check_adapter()
            if self._config.engine == "ray" and not self._config.urls:
                self._start_ray()
            else:
                start = self._start_pool if self._config.urls else self._start_vllm
                self._engine.collectives.run_on_all_ranks(start)
        if isinstance(self._shared, ServerPool):
            deadline_s = self._config.deadline_s
            return RemoteEngine(
                self._shared, self._tokenizer, generation, version=self._version, deadline_s=deadline_s
            )
        assert self._shared is not None
        from conch.rollouts.vllm.engine import VLLMEngine

        return VLLMEngine(self._shared, self._tokenizer, generation, version=self._version)

    def stream(
        self,
        generation: GenerationConfig,
        *,
        goes_on: bool,
        on_completion: Callable[[int, int, Rollout], None],
        on_failure: Callable[[ConchError], None],
    ) -> GroupStream:
        """Make what samples beside training; see `GroupStream`. All ranks call it together.

        Raises:
            ConfigError: `rollout` names nothing that samples outside of the trainer's processes.
        """
        self(generation)
        if not isinstance(self._shared, ServerPool):
            raise ConfigError(
                "sampling beside training needs samplers of its own: set `rollout.engine=ray`, or "
                "`rollout.urls` to servers that `conch rollout-server` started"
            )
        return GroupStream(
            self._shared,
            with_end_ids(generation, self._lm(), self._tokenizer),
            int(self._tokenizer.eos_token_id),  # pyright: ignore[reportArgumentType]
            deadline_s=self._config.deadline_s,
            goes_on=goes_on,
            on_completion=on_completion,
            on_failure=on_failure,
        )

    def _check_adapter(self) -> None:
        lm = self._lm()
        for key, find in (("target_modules", adapted_and_shared), ("modules_to_save", copied_and_shared)):
            shared = find(lm)
            if shared is not None:
                raise ConfigError(
                    f"`model.peft_config.{key}` names {shared}, whose weight embeddings and head share: "
                    "another sampler has both in one; leave it out, or sample with `rollout.engine=hf` in "
                    "the trainer's processes"
                )

    def _start_vllm(self) -> None:
        from conch.rollouts.vllm.engine import ColocatedVLLM

        several_ranks = self._engine.collectives.num_ranks > 1
        self._shared = ColocatedVLLM(self._lm, self._config, self._dtype(), several_ranks=several_ranks)

    def _start_pool(self) -> None:
        self._shared = ServerPool(
            self._config,
            self._lm,
            source=self._engine.collectives.broadcast(uuid4().hex),
            sends_weights=self._engine.collectives.is_main,
        )
        self._shared.check()

    def _start_ray(self) -> None:
        """Make the actors on the first rank, let the others in, and have all of them in a pool."""
        from conch.rollouts.ray.samplers import RaySamplers

        ranks = self._engine.collectives
        samplers: list[RaySamplers] = []

        def make() -> None:
            if ranks.is_main:
                source = WeightSource(self._lm, merge=self._config.merge_adapter is True)
                lora = source.required_lora() if self._config.ray.engine == "vllm" else None
                samplers.append(
                    RaySamplers.start(self._config, self._lm(), self._tokenizer, self._dtype(), lora)
                )

        def join() -> None:
            if not ranks.is_main:
                samplers.append(RaySamplers.join(invitation, self._config.deadline_s))

        ranks.run_on_all_ranks(make)
        invitation: Any = ranks.broadcast(samplers[0].invitation if samplers else None)
        ranks.run_on_all_ranks(join)
        [self._samplers] = samplers
        self._shared = ServerPool(
            self._config,
            self._lm,
            source=invitation.namespace,
            sends_weights=ranks.is_main,
            actors=self._samplers.clients,
        )

    def _dtype(self) -> torch.dtype:
        """dtype that `rollout.dtype` names; `auto` is that of the policy's forward passes."""
        if self._config.dtype != "auto":
            return getattr(torch, self._config.dtype)
        return _PRECISIONS.get(self._engine.precision, self._lm().dtype)

    def close(self) -> None:
        """Shut vLLM or Ray down, or leave the servers."""
        if self._shared is not None:
            self._shared.close()
            self._shared = None
        if self._samplers is not None:
            self._samplers.close()
            self._samplers = None
