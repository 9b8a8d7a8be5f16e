"""One trained module, its optimizer and its processes: everything that touches accelerate.

The rule that keeps results independent of how a batch is cut: a loss is a sum divided by the *global* count
of what it sums over, taken over all micro-batches of all ranks. `TrainEngine.update` undoes the averaging
that DDP, DeepSpeed and accelerate's accumulation apply, so that gradients are those of that sum.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
    load,
    set_seed,
)
from torch import Tensor, nn
from transformers import get_scheduler

from conch.config import OptimizerConfig, SchedulerConfig, TrainConfig
from conch.distributed.launcher import launched_processes, leave_with_launcher
from conch.distributed.malloc import keep_heap
from conch.errors import CheckpointError, ConchError, ConfigError, DistributedError, first_line
from conch.ops import at_least_float32

# Tied weights are saved once, and loaded as what they are; nobody has to check anything.
logging.getLogger("accelerate.utils.other").addFilter(
    lambda record: "Removed shared tensor" not in record.getMessage()
)

MicroBatchT = TypeVar("MicroBatchT")
ObjectT = TypeVar("ObjectT")

_LEFT_GROUPS: list[Any] = []
"""Process groups that were left, kept from being destroyed. DDP's reducer holds the last reference to its
group: dropping it joins gloo's threads with the interpreter's lock held, and one that is still giving back a
tensor waits for that very lock, for ever."""

_SETTLE_S = 0.5

_PEER_IS_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
)

COLLECTIVE_TIMEOUT_S = 1800
"""Longest a rank waits for the others: must exceed the slowest rank's rollout and any wait for rewards."""


@dataclass(frozen=True)
class UpdateReport:
    """What one optimizer update did.

    loss: summed over micro-batches and ranks. grad_norm: before clipping. learning_rate: of this update.
    skipped: True where the gradient was not finite and the weights were left alone.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    skipped: bool


@dataclass(frozen=True)
class RandomState:
    """The generators that training draws from: Python's, numpy's, torch's on the CPU and on each GPU."""

    python: Any
    numpy: Any
    torch: Tensor
    devices: list[Tensor]


class TrainEngine:
    """Owns the processes; `prepare` gives it the one module it trains."""

    module: nn.Module

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        has_gpu = torch.cuda.is_available()
        if not has_gpu:
            keep_heap()
            # Else DeepSpeed, where installed, looks for a GPU first and warns.
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # Naming a backend makes accelerate expect a process group: not for a single process.
        backend = "gloo" if not has_gpu and launched_processes() > 1 else None
        process_group = InitProcessGroupKwargs(
            backend=backend, timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S)
        )
        self.accelerator = Accelerator(
            # Asking for the CPU outright would turn DeepSpeed off without a word.
            cpu=not has_gpu and os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true",
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            # Buffers never differ between ranks; sending them would make each forward pass, also without
            # gradient, a collective, and ranks with unequal numbers of evaluation batches would wait for each
            # other forever.
            kwargs_handlers=[process_group, DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        check_kind(self.accelerator.distributed_type)
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
        wanted = self._config.num_processes or launched_processes() or running
        if running != wanted:
            raise DistributedError(
                f"{wanted} processes were asked for, {running} run; on a machine without a GPU start several "
                f"with `ACCELERATE_USE_CPU=true torchrun --nproc_per_node {wanted} ...`"
            )

    @property
    def rank(self) -> int:
        """This process's number."""
        return self.accelerator.process_index

    @property
    def num_ranks(self) -> int:
        """Number of processes."""
        return self.accelerator.num_processes

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self.accelerator.device

    @property
    def precision(self) -> str:
        """What the trained module computes in beside its weights' own precision: "no", "bf16" or "fp16"."""
        return self.accelerator.mixed_precision

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints and writes."""
        return self.accelerator.is_main_process

    @property
    def unwrapped(self) -> nn.Module:
        """The trained module without DDP or DeepSpeed around it."""
        return cast(nn.Module, self.accelerator.unwrap_model(self.module))

    def seed_sampling(self) -> None:
        """Give each rank its own random stream: no two sample alike. Call it after weights are made."""
        set_seed(self._config.seed + 1000 * (self.rank + 1))

    def prepare(
        self, module: nn.Module, optimizer: OptimizerConfig, scheduler: SchedulerConfig, *, total_updates: int
    ) -> None:
        """Make the optimizer and schedule for `module` and wrap all for distributed training.

        Raises:
            ConfigError: no parameter is trainable.
        """
        module.train()  # what `from_pretrained` returns is not
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
        if self.accelerator.state.deepspeed_plugin is not None:
            settings = self.accelerator.state.deepspeed_plugin.deepspeed_config
            # accelerate reads this from a dataloader, which we have none of; only logging depends on it.
            settings["train_micro_batch_size_per_gpu"] = 1
            settings["gradient_clipping"] = self._config.max_grad_norm  # else accelerate says 1.0
        self.module, self._optimizer = self.accelerator.prepare(module, raw)

    def update(
        self, micro_batches: Sequence[MicroBatchT], loss_of: Callable[[MicroBatchT], Tensor]
    ) -> UpdateReport:
        """One optimizer update from exactly `gradient_accumulation_steps` micro-batches.

        loss_of: this micro-batch's share of the loss: a sum divided by a global denominator (see `sum`).
        """
        steps = self._config.gradient_accumulation_steps
        assert len(micro_batches) == steps, f"{len(micro_batches)} micro-batches, {steps} expected"
        total, grad_norm, skipped = torch.zeros((), device=self.device), float("nan"), False
        learning_rate = float(self._scheduler.get_last_lr()[0])
        for micro_batch in micro_batches:
            with _peer_loss_explained(), self.accelerator.accumulate(self.module):
                loss = loss_of(micro_batch)
                total = total + at_least_float32(loss.detach())
                self.accelerator.backward(loss * (steps * self.num_ranks))
                if self.accelerator.sync_gradients:
                    grad_norm, skipped = self._step()
        return UpdateReport(float(self.sum(total)), grad_norm, learning_rate, skipped)

    def _step(self) -> tuple[float, bool]:
        norm = self.accelerator.clip_grad_norm_(self.module.parameters(), self._config.max_grad_norm)
        grad_norm = float("nan") if norm is None else float(norm)
        # fp16 and DeepSpeed watch for overflow themselves and must see every step.
        is_deepspeed = self.accelerator.distributed_type is DistributedType.DEEPSPEED
        guards_itself = self.accelerator.scaler is not None or is_deepspeed
        skipped = not guards_itself and not torch.isfinite(torch.tensor(grad_norm)).item()
        if not skipped:
            self._optimizer.step()
            skipped = bool(self._optimizer.step_was_skipped)
        self._optimizer.zero_grad()
        if not skipped:
            self._scheduler.step()
        return grad_norm, skipped

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
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
            with _peer_loss_explained(), deepspeed_zero3.whole(self.module):
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

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over all ranks."""
        if self.num_ranks == 1:
            return values
        with _peer_loss_explained():
            return cast(Tensor, self.accelerator.reduce(values.to(self.device), reduction="sum"))

    def sum_int(self, value: int) -> int:
        """Sum of a whole number over all ranks: how ranks agree on what each of them saw."""
        return int(self.sum(torch.tensor(value, device=self.device)))

    def gather(self, rows: list[ObjectT]) -> list[ObjectT]:
        """Everybody's rows, in the order of ranks, on every rank."""
        with _peer_loss_explained():
            return rows if self.num_ranks == 1 else gather_object(rows)

    def broadcast(self, value: ObjectT) -> ObjectT:
        """Rank 0's value, on every rank."""
        box: list[Any] = [value]
        with _peer_loss_explained():
            if self.num_ranks > 1:
                broadcast_object_list(box)
        return box[0]

    def together(self, work: Callable[[], object]) -> None:
        """Run `work` on each rank; where it fails on any, every rank raises, so that none waits for the dead.

        Raises:
            ConchError: this rank's own failure, or a DistributedError that another rank failed.
        """
        failure: ConchError | None = None
        try:
            work()
        except ConchError as error:
            failure = error
        num_failed = self.sum_int(int(failure is not None))
        if failure is not None:
            raise failure
        if num_failed:
            raise DistributedError(
                f"{num_failed} of {self.num_ranks} processes failed; the reason is in their output"
            )

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision that the trained module runs in, for work outside of it (sampling, the reference)."""
        return self.accelerator.autocast()

    def wait_for_everyone(self) -> None:
        """Barrier."""
        with _peer_loss_explained():
            self.accelerator.wait_for_everyone()

    def save_state(self, folder: Path) -> None:
        """Write weights, optimizer state and every rank's random state; called on all ranks.

        Raises:
            CheckpointError: it cannot be written.
        """
        try:
            self.accelerator.save_state(str(folder))
        except Exception as error:  # a full disk surfaces as OSError, RuntimeError or safetensors' own type
            raise CheckpointError(f"the training state in {folder} cannot be written: {error}") from error

    def load_state(self, folder: Path) -> None:
        """Take up what `save_state` wrote, with the same number of ranks.

        Raises:
            CheckpointError: it is of another model, or cannot be read.
        """
        try:
            self.accelerator.load_state(str(folder))
            # accelerate passes over a random state that it cannot restore.
            written = load(folder / f"random_states_{self.rank}.pkl")["torch_manual_seed"]
            if not torch.equal(torch.get_rng_state(), written):
                raise CheckpointError(f"the random state in {folder} was not restored")
        except CheckpointError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:400]
            raise CheckpointError(
                f"the training state in {folder} does not fit this model or its optimizer: {reason}"
            ) from error

    def random_state(self) -> RandomState:
        """Every generator of this process as it stands."""
        devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return RandomState(random.getstate(), np.random.get_state(), torch.get_rng_state(), devices)

    @contextmanager
    def rewound(self, state: RandomState) -> Iterator[None]:
        """Inside, the generators stand as they did when `random_state` gave `state`; then as before."""
        present = self.random_state()
        _set_random_state(state)
        try:
            yield
        finally:
            _set_random_state(present)

    def state_dict(self) -> dict[str, Any]:
        """What `save_state` does not hold; plain numbers."""
        return {"scheduler": self._scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self._scheduler.load_state_dict(state["scheduler"])

    def close(self) -> None:
        """Leave the process group."""
        if torch.distributed.is_initialized():
            _LEFT_GROUPS.append(torch.distributed.group.WORLD)
        self.accelerator.end_training()
        if _LEFT_GROUPS:
            # A thread of gloo's may still be giving back the tensors of the last collective, which takes the
            # interpreter's lock. One that finds the interpreter gone aborts the process: 4 of 12 runs that
            # ended right here left with SIGABRT. There is nothing to wait for but time.
            time.sleep(_SETTLE_S)


def _set_random_state(state: RandomState) -> None:
    random.setstate(state.python)
    np.random.set_state(state.numpy)
    torch.set_rng_state(state.torch)
    if state.devices:
        torch.cuda.set_rng_state_all(state.devices)


def check_kind(kind: DistributedType) -> None:
    """Refuse what shards weights in a way that `TrainEngine.whole_weights` cannot undo.

    Raises:
        DistributedError: says what to take instead.
    """
    # On CPUs accelerate passes over FSDP without a word, and the processes would train under DDP.
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        kind = DistributedType.FSDP
    if kind in (DistributedType.FSDP, DistributedType.MEGATRON_LM):
        raise DistributedError(
            f"{kind.value} keeps no whole weights to sample from, to evaluate and to save: launch with "
            "configs/accelerate/zero3.yaml, or zero2-bf16.yaml where the weights fit a GPU"
        )


def check_operators_folder() -> None:
    """Refuse a folder in which DeepSpeed could not build its CPU operators: it would say so only after the
    models are loaded, and not what to do about it.

    Raises:
        ConfigError: names the folder and the variable that sets another.
    """
    wanted = os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions"
    folder = Path(wanted).expanduser().absolute()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(
            f"DeepSpeed builds its CPU operators in {folder}, which this user cannot write: set "
            "TORCH_EXTENSIONS_DIR to a folder that is writable"
        )


@contextmanager
def _peer_loss_explained() -> Iterator[None]:
    """Turn what a collective throws when a rank is gone into words: the traceback of the others says nothing.

    Raises:
        DistributedError: another process is gone.
    """
    try:
        yield
    except RuntimeError as error:  # torch has no type of its own for it: gloo's and NCCL's words tell
        reason = str(error)
        if not any(words in reason for words in _PEER_IS_GONE):
            raise
        raise DistributedError(
            "another process of this run is gone, so this one leaves: its own output and the launcher's "
            f"report say why ({first_line(reason)[:200]})"
        ) from error


def _decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices only: on biases and norms it would move the function itself."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    if not trainable:
        raise ConfigError("no parameter is trainable: check `model.num_layers_unfrozen`")
    matrices = [p for p in trainable if p.ndim >= 2]
    others = [p for p in trainable if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
