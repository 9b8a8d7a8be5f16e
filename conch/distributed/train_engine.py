"""One trained module, its optimizer and its processes: everything that touches accelerate.

The rule that keeps results independent of how a batch is cut: a loss is a sum divided by the *global* count
of what it sums over, taken over all micro-batches of all ranks. `TrainEngine.update` undoes the averaging
that DDP, DeepSpeed and accelerate's accumulation apply, so that gradients are those of that sum.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    load,
    set_seed,
)
from torch import Tensor, nn
from torch.distributed import distributed_c10d as c10d
from transformers import get_scheduler

from conch.config import ModelConfig, OptimizerConfig, SchedulerConfig, TrainConfig
from conch.distributed.collectives import Collectives
from conch.distributed.launch_settings import (
    check_environment,
    check_kind,
    check_operators_folder,
    check_precision,
    take_over_deepspeed,
    wanted_precision,
)
from conch.distributed.launcher import launched_processes, leave_with_launcher
from conch.errors import CheckpointError, ConfigError, DistributedError, first_line
from conch.machine.malloc import keep_heap
from conch.machine.processors import fit_threads
from conch.ops import at_least_float32

# Tied weights are saved once, and loaded as what they are; nobody has to check anything.
logging.getLogger("accelerate.utils.other").addFilter(
    lambda record: "Removed shared tensor" not in record.getMessage()
)

MicroBatchT = TypeVar("MicroBatchT")

_LEFT_GROUPS: list[Any] = []
"""Process groups that were left, kept from being destroyed. DDP's reducer holds the last reference to its
group: dropping it joins gloo's threads with the interpreter's lock held, and one that is still giving back a
tensor waits for that very lock, for ever."""

_SETTLE_S = 0.5


@dataclass(frozen=True)
class UpdateReport:
    """What one optimizer update did.

    loss: summed over micro-batches and ranks.
    grad_norm: before clipping.
    learning_rate: of this update.
    skipped: True where the gradient was not finite and the weights were left alone.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    skipped: bool


class TrainEngine:
    """Owns the processes; `prepare` gives it the one module it trains."""

    module: nn.Module

    keeps_group = False
    """Whether `close` leaves the process group to a later engine of this process."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        has_gpu = torch.cuda.is_available()
        if not has_gpu:
            keep_heap()
            fit_threads(torch)
            # Else DeepSpeed, where installed, looks for a GPU first and warns.
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # Naming a backend makes accelerate expect a process group: not for a single process.
        backend = "gloo" if not has_gpu and launched_processes() > 1 else None
        timeout = timedelta(seconds=config.collective_timeout_s)
        process_group = InitProcessGroupKwargs(backend=backend, timeout=timeout)
        check_environment()
        precision = wanted_precision(config)
        try:
            self.accelerator = Accelerator(
                # Asking for the CPU outright would turn DeepSpeed off without a word.
                cpu=not has_gpu and os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true",
                # None where the process has a precision already: accelerate's refusal says less than ours.
                mixed_precision=None if AcceleratorState._shared_state else precision,
                # Buffers never differ between ranks; sending them would make each forward pass, also without
                # gradient, a collective, and ranks with unequal numbers of evaluation batches would wait for
                # each other forever.
                kwargs_handlers=[process_group, DistributedDataParallelKwargs(broadcast_buffers=False)],
            )
        except ValueError as error:  # settings of the launcher or of a DeepSpeed file that exclude each other
            raise ConfigError(f"accelerate refuses its configuration: {first_line(error)}") from error
        self.collectives = Collectives(self.accelerator, config.collective_timeout_s)
        check_kind(self.accelerator.distributed_type)
        check_precision(self.accelerator, precision)
        self._take_over()
        plugin = self.accelerator.state.deepspeed_plugin
        if plugin is not None and (not has_gpu or plugin.hf_ds_config.is_offload()):
            check_operators_folder()
        self._is_whole = False
        self._build_models_whole()
        self._check_processes()
        leave_with_launcher()
        set_seed(config.seed)

    def _build_models_whole(self) -> None:
        """Under ZeRO-3 transformers would make models in shards, whatever `zero3_init_flag` says, where heads
        and references need shapes and values; and it would tie the ranks' sampling to each other. It asks an
        object for that which lives as long as accelerate holds it."""
        if self.accelerator.state.deepspeed_plugin is not None:
            self.accelerator.state.deepspeed_plugin.dschf = None

    def _check_processes(self) -> None:
        """Launchers have been seen to start one process where several were asked for; never train on then."""
        running = self.accelerator.num_processes
        expected = self._config.num_processes or launched_processes() or running
        if running != expected:
            raise DistributedError(
                f"{expected} processes were asked for, {running} run; on a machine without a GPU start "
                f"several with `ACCELERATE_USE_CPU=true torchrun --nproc_per_node {expected} ...`"
            )

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self.accelerator.device

    @property
    def precision(self) -> str:
        """What the trained module computes in beside its weights' own precision: "no", "bf16" or "fp16"."""
        return self.accelerator.mixed_precision

    @property
    def shards_optimizer(self) -> bool:
        """True where each rank holds a part of the optimizer's state, in float32 with the weights."""
        return self.accelerator.distributed_type is DistributedType.DEEPSPEED

    @property
    def unwrapped(self) -> nn.Module:
        """The trained module without DDP or DeepSpeed around it."""
        return cast(nn.Module, self.accelerator.unwrap_model(self.module))

    def seed_sampling(self) -> None:
        """Give each rank its own random stream: no two sample alike. Call it after weights are made."""
        set_seed(self._config.seed + 1000 * (self.collectives.rank + 1))

    def prepare(
        self, module: nn.Module, optimizer: OptimizerConfig, scheduler: SchedulerConfig, *, total_updates: int
    ) -> None:
        """Make the optimizer and schedule for `module` and wrap all for distributed training.

        Raises:
            ConfigError: no parameter is trainable, or one is in half precision that nothing keeps in float32;
                DeepSpeed's configuration has an optimizer or a schedule of its own.
        """
        module.train()  # what `from_pretrained` returns is not
        for parameter in module.parameters():
            if parameter.requires_grad:
                self._check_dtype(parameter.dtype)
        raw = torch.optim.AdamW(
            _decay_groups(module, optimizer.weight_decay),
            lr=optimizer.learning_rate,
            betas=optimizer.betas,
            eps=optimizer.eps,
            # One kernel for all parameters. DeepSpeed puts an optimizer of its own around it.
            fused=self.accelerator.distributed_type is not DistributedType.DEEPSPEED,
        )
        name = "constant_with_warmup" if scheduler.name == "constant" else scheduler.name
        # Not prepared: accelerate would step it once per process, and a schedule here counts updates.
        self._scheduler = get_scheduler(
            name, raw, num_warmup_steps=scheduler.warmup_updates, num_training_steps=total_updates
        )
        self._take_over()
        with self.collectives.waiting("the preparation of training"):
            self.module, self._optimizer = self.accelerator.prepare(module, raw)
        self._give_deadline()

    def check_weights(self, config: ModelConfig) -> None:
        """Refuse weights that would be trained in half precision, before they are loaded; `prepare` asks all.

        Raises:
            ConfigError: says what to set.
        """
        if config.peft_config is None:  # an adapter is in float32 whatever its base is in
            self._check_dtype(getattr(torch, config.dtype))

    def _check_dtype(self, dtype: torch.dtype) -> None:
        is_deepspeed = self.accelerator.distributed_type is DistributedType.DEEPSPEED
        if dtype not in (torch.bfloat16, torch.float16) or is_deepspeed:
            return
        name = str(dtype).removeprefix("torch.")
        raise ConfigError(
            f"weights in {name} would lose small updates to rounding, since nothing keeps them in float32 "
            "beside: set `model.dtype=float32 train.mixed_precision=bf16` (weights in float32, computed with "
            "in bfloat16), launch with DeepSpeed (configs/accelerate/zero2-bf16.yaml), or train an adapter "
            "(`model.peft_config`)"
        )

    def _give_deadline(self) -> None:
        """Give all process groups the deadline of the first: those that DeepSpeed makes have torch's own, 10
        minutes over NCCL."""
        for group in list(c10d._world.pg_map) if torch.distributed.is_initialized() else ():
            c10d._set_pg_timeout(timedelta(seconds=self._config.collective_timeout_s), group)

    def _take_over(self) -> None:
        """Put this run's settings where accelerate and DeepSpeed will read them."""
        plugin = self.accelerator.state.deepspeed_plugin
        self.accelerator.gradient_accumulation_steps = self._config.gradient_accumulation_steps
        if plugin is not None:
            take_over_deepspeed(plugin, self._config, self.collectives.num_ranks)

    def update(
        self, micro_batches: Sequence[MicroBatchT], loss_of: Callable[[MicroBatchT], Tensor]
    ) -> UpdateReport:
        """One optimizer update from exactly `gradient_accumulation_steps` micro-batches.

        loss_of: a micro-batch's share of the loss: a sum over a global denominator, see `Collectives`.
        """
        steps = self._config.gradient_accumulation_steps
        assert len(micro_batches) == steps, f"{len(micro_batches)} micro-batches, {steps} expected"
        total = torch.zeros((), device=self.device)
        learning_rate = float(self._scheduler.get_last_lr()[0])
        # accelerate keeps one count for the process: another trainer may have set its own since.
        self.accelerator.gradient_accumulation_steps = steps
        for number, micro_batch in enumerate(micro_batches, start=1):
            # The last one is told here, not by accelerate's count of calls.
            self.accelerator.sync_gradients = is_last = number == steps
            apart = nullcontext() if is_last else self.accelerator.no_sync(self.module)
            with self.collectives.explained("a backward pass"), apart:
                loss = loss_of(micro_batch)
                total = total + at_least_float32(loss.detach())
                self.accelerator.backward(loss * (steps * self.collectives.num_ranks))
        with self.collectives.waiting("an optimizer step"):  # on a GPU what is read waits for the gradients
            grad_norm, skipped = self._step()
            loss_sum = float(self.collectives.all_reduce(total))
        return UpdateReport(loss_sum, grad_norm, learning_rate, skipped)

    def _step(self) -> tuple[float, bool]:
        norm = self.accelerator.clip_grad_norm_(self.module.parameters(), self._config.max_grad_norm)
        grad_norm = float("nan") if norm is None else float(norm)
        if self.accelerator.distributed_type is DistributedType.DEEPSPEED:
            self._optimizer.step()  # DeepSpeed has stepped, or skipped, at the end of the backward pass
            skipped = bool(self._optimizer.step_was_skipped)
        else:
            # Told by the norm in fp16, too: a fused optimizer passes over an overflow inside its kernel,
            # where accelerate does not see it.
            skipped = not math.isfinite(grad_norm)
            if not skipped:
                self._optimizer.step()
            elif self.accelerator.scaler is not None:
                self.accelerator.scaler.update()  # which lowers the scale
        self._optimizer.zero_grad()
        if not skipped:
            self._scheduler.step()
        return grad_norm, skipped

    @contextmanager
    def gathered_weights(self) -> Iterator[None]:
        """Inside, each rank holds all weights and may run the module, or any part of it, on its own: to
        sample, to evaluate, to save. Only ZeRO-3 has anything to do for it: one gathering of the weights in
        the precision they are trained in. What is written to them inside is lost. Called on all ranks; may be
        nested.
        """
        if self._is_whole or not self._is_sharded():
            yield
            return
        from conch.distributed import zero3 as deepspeed_zero3

        self._is_whole = True
        try:
            with self.collectives.explained("a gathering of weights"), deepspeed_zero3.whole(self.module):
                yield
        finally:
            self._is_whole = False

    @contextmanager
    def writable_weights(self, *modules: nn.Module) -> Iterator[None]:
        """Inside, the weights of these parts are whole and may be written, by all ranks alike."""
        if not self._is_sharded():
            yield
            return
        from conch.distributed import zero3 as deepspeed_zero3

        with deepspeed_zero3.writable(*modules):
            yield

    def _is_sharded(self) -> bool:
        """True where no rank holds all weights; until `prepare` each one does."""
        is_deepspeed = self.accelerator.distributed_type is DistributedType.DEEPSPEED
        if not is_deepspeed or not hasattr(self, "module"):
            return False
        from conch.distributed import zero3 as deepspeed_zero3

        return deepspeed_zero3.is_sharded(self.module)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision that the trained module runs in, for work outside of it (sampling, the reference)."""
        return self.accelerator.autocast()

    def save_state(self, folder: Path) -> None:
        """Write weights, optimizer state and every rank's random state; called on all ranks.

        Raises:
            CheckpointError: it cannot be written.
            DistributedError: another rank is gone or stuck.
        """
        try:
            with self.collectives.explained("the writing of a checkpoint"):
                self.accelerator.save_state(str(folder))
        except DistributedError:
            raise
        except Exception as error:  # a full disk surfaces as OSError, RuntimeError or safetensors' own type
            raise CheckpointError(f"the training state in {folder} cannot be written: {error}") from error

    def load_state(self, folder: Path) -> None:
        """Take up what `save_state` wrote, with the same number of ranks.

        Raises:
            CheckpointError: it is of another model, or cannot be read.
        """
        try:
            with self.collectives.explained("the reading of a checkpoint"):
                self.accelerator.load_state(str(folder))
            # accelerate passes over a random state that it cannot restore.
            written = load(folder / f"random_states_{self.collectives.rank}.pkl")["torch_manual_seed"]
            if not torch.equal(torch.get_rng_state(), written):
                raise CheckpointError(f"the random state in {folder} was not restored")
        except (CheckpointError, DistributedError):
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:400]
            raise CheckpointError(
                f"the training state in {folder} does not fit this model or its optimizer: {reason}"
            ) from error

    def state_dict(self) -> dict[str, Any]:
        """What `save_state` does not hold; plain numbers."""
        return {"scheduler": self._scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self._scheduler.load_state_dict(state["scheduler"])

    def close(self) -> None:
        """Leave the process group, unless it is kept."""
        self.collectives.close()
        if self.keeps_group:
            return
        if torch.distributed.is_initialized():
            _LEFT_GROUPS.append(torch.distributed.group.WORLD)
        self.accelerator.end_training()
        if _LEFT_GROUPS:
            # A thread of gloo's may still be giving back the tensors of the last collective, which takes the
            # interpreter's lock. One that finds the interpreter gone aborts the process: 4 of 12 runs that
            # ended right here left with SIGABRT. There is nothing to wait for but time.
            time.sleep(_SETTLE_S)


def forget_precision(train: TrainConfig) -> None:
    """Let a trainer with another precision than the process's earlier ones be made. Those must all be closed:
    what is left of them computes no more."""
    precision = wanted_precision(train)
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()


def _decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices only: on biases and norms it would move the function itself."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    if not trainable:
        raise ConfigError("no parameter is trainable: check `model.num_layers_unfrozen`")
    matrices = [p for p in trainable if p.ndim >= 2]
    others = [p for p in trainable if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
