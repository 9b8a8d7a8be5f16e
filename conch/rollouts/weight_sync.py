"""The policy's weights under the names of a Hugging Face checkpoint, and their ways to servers: a broadcast,
or a file in shared memory.

A policy's LoRA adapter handed over by itself, on a base that whoever samples was given once.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed import (
    BroadcastOptions,
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
)
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from conch.errors import RolloutError, RolloutUnavailableError, first_line
from conch.log import get_logger
from conch.models.adapter import ADAPTER_NAME, has_adapter
from conch.rollouts.protocol import HIGHEST_RANK, LoraRoom, Part, TensorSpec

SHARED_MEMORY = Path("/dev/shm")
_JOINED = "joined"
_CPU = torch.device("cpu")


@torch.no_grad()
def checkpoint_tensors(lm: PreTrainedModel, *, merged: bool = True) -> dict[str, Tensor]:
    """Names and weights as in the model's checkpoint: tied ones once, an adapter merged in, or left out.

    Nothing is copied but what an adapter changes, or what a checkpoint stores in another shape.
    """
    own = {
        plain: _with_adapter(lm, name, tensor.detach()) if merged else tensor.detach()
        for plain, name, tensor in _distinct(lm)
    }
    return revert_weight_conversion(lm, own)


def checkpoint_names(lm: PreTrainedModel) -> set[str]:
    """The names of `checkpoint_tensors`. No weight is read, so they need not be whole."""
    # Of its shape is what a checkpoint cuts up, experts that a model holds fused: ZeRO-3 leaves a parameter
    # without its own, and notes it.
    shapes = {
        plain: torch.empty(getattr(tensor, "ds_shape", tensor.shape), device="meta")
        for plain, _, tensor in _distinct(lm)
    }
    return set(revert_weight_conversion(lm, shapes))


def _distinct(lm: PreTrainedModel) -> Iterator[tuple[str, str, Tensor]]:
    """Each tensor with its plain name and its own, under the first of its names, which is that of the
    embeddings where the head is tied."""
    unsaved = {f"{prefix}.{name}".lstrip(".") for prefix, name in _unsaved_buffers(lm)}
    seen: set[int] = set()
    for name, tensor in [*lm.named_parameters(), *lm.named_buffers()]:
        plain = _plain_name(name)
        if plain is None or name in unsaved or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        yield plain, name, tensor


def _unsaved_buffers(lm: nn.Module) -> Iterator[tuple[str, str]]:
    for prefix, module in lm.named_modules():
        yield from ((prefix, name) for name in module._non_persistent_buffers_set)


def _plain_name(name: str) -> str | None:
    """The name that a tensor has without peft's layers around it; None for what is peft's own."""
    if any(part.startswith("lora_") for part in name.split(".")) or ".original_module." in name:
        return None
    return name.replace(".base_layer.", ".").replace(f".modules_to_save.{ADAPTER_NAME}.", ".")


def _with_adapter(lm: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """`tensor` as peft's `merge` would leave it."""
    owner, _, kind = name.rpartition(".")
    if not owner.endswith(".base_layer"):
        return tensor
    layer = lm.get_submodule(owner.removesuffix(".base_layer"))
    assert isinstance(layer, LoraLayer) and isinstance(layer, BaseTunerLayer)
    if kind == "bias":
        if not layer.lora_bias[ADAPTER_NAME]:
            return tensor
        added = layer.lora_B[ADAPTER_NAME].bias * layer.scaling[ADAPTER_NAME]
        return tensor + added.to(tensor.dtype)
    if ADAPTER_NAME in layer.lora_variant:  # DoRA, and others that add no mere product
        return layer.lora_variant[ADAPTER_NAME].merge_safe(layer, ADAPTER_NAME, tensor.clone())
    return tensor + layer.get_delta_weight(ADAPTER_NAME).to(tensor.dtype)  # pyright: ignore[reportCallIssue]


# ------------------------------------------------------------------------------------------------- to servers


def specs_of(tensors: Mapping[str, Tensor]) -> tuple[TensorSpec, ...]:
    """What a receiver must know before the tensors come."""
    return tuple(
        TensorSpec(name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape))
        for name, tensor in tensors.items()
    )


class SharedFile:
    """One safetensors file in shared memory, which holds the latest weights that were written."""

    def __init__(self, source: str) -> None:
        self._folder = SHARED_MEMORY / f"conch-{source}"
        self._version: int | None = None
        self._lock = threading.Lock()

    def path(self, version: int, tensors: Callable[[], Mapping[str, Tensor]]) -> Path:
        """The file with this version's weights, which are asked for where it is not there yet.

        Raises:
            RolloutError: shared memory is full, or there is none.
        """
        file = self._folder / f"{version}.safetensors"
        with self._lock:
            if self._version != version:
                try:
                    self._folder.mkdir(exist_ok=True)
                    self._forget()
                    save_file({name: each.contiguous() for name, each in tensors().items()}, file)
                except (OSError, SafetensorError) as error:
                    raise RolloutError(
                        f"the weights cannot be written to {self._folder}: {error}; make room there, or set "
                        "`rollout.weights=broadcast`"
                    ) from error
                self._version = version
        return file

    def _forget(self) -> None:
        for old in self._folder.glob("*.safetensors"):
            old.unlink()

    def close(self) -> None:
        """Give the memory back."""
        if self._folder.is_dir():
            self._forget()
            self._folder.rmdir()


def open_store(host: str, timeout_s: float) -> TCPStore:
    """Where a group's members find each other; listens on a port of its own at this address of ours."""
    timeout = timedelta(seconds=timeout_s)
    return TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)


def join(store: TCPStore) -> None:
    """Say that this process comes to the group."""
    store.add(_JOINED, 1)


def wait_for_members(store: TCPStore, count: int, is_over: Callable[[], bool], timeout_s: float) -> bool:
    """True once so many have said that they come; False where they will not, or take too long."""
    end = time.monotonic() + timeout_s
    while store.add(_JOINED, 0) < count:
        if is_over() or time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


class Group:
    """A process group beside torch's own, of the trainer (rank 0) and one server's workers.

    address: of this process, as the others reach it.

    Raises:
        RolloutError: the others did not come.
    """

    def __init__(
        self, store: TCPStore, rank: int, size: int, backend: str, *, address: str, timeout_s: float
    ) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else _CPU
        timeout = timedelta(seconds=timeout_s)
        try:
            self._group: Any = (
                _nccl(store, rank, size, timeout)
                if backend == "nccl"
                else _gloo(store, rank, size, timeout, address)
            )
        except RuntimeError as error:
            raise RolloutError(f"no {backend} group for the weights: {first_line(error)[:300]}") from error

    def send(self, tensors: Iterable[Tensor]) -> None:
        """Broadcast them, one after the other."""
        for tensor in tensors:
            self._broadcast(tensor.to(self._device).contiguous())

    def receive(self, specs: Iterable[TensorSpec]) -> Iterator[tuple[str, Tensor]]:
        """What rank 0 sends."""
        for spec in specs:
            tensor = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=self._device)
            self._broadcast(tensor)
            yield spec.name, tensor

    def close(self) -> None:
        """Leave: who still waits for a tensor gets an error, even where an exception that somebody keeps
        holds on to this group."""
        self._group = None

    def _broadcast(self, tensor: Tensor) -> None:
        if tensor.numel() == 0:
            return
        # As bytes: gloo does not know every type of number.
        options = BroadcastOptions()
        options.rootRank = 0
        try:
            self._group.broadcast([tensor.reshape(-1).view(torch.uint8)], options).wait()
        except RuntimeError as error:
            raise RolloutUnavailableError(f"the weights were not taken: {first_line(error)[:300]}") from error


def _gloo(store: TCPStore, rank: int, size: int, timeout: timedelta, address: str) -> Any:
    options = torch.distributed.ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
    # By itself gloo takes the address that this machine's name stands for, which may lead nowhere.
    options._devices = [torch.distributed.ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = timeout
    return torch.distributed.ProcessGroupGloo(store, rank, size, options)


def _nccl(store: TCPStore, rank: int, size: int, timeout: timedelta) -> Any:
    options = torch.distributed.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return torch.distributed.ProcessGroupNCCL(store, rank, size, options)


def address_towards(host: str, port: int) -> str:
    """This machine's address on the way to another; nothing is sent."""
    family = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family[0], socket.SOCK_DGRAM) as probe:
        probe.connect(family[4])
        return str(probe.getsockname()[0])


_log = get_logger(__name__)

_BY_CHOICE = "`rollout.merge_adapter` is true, or left out in a process on a CPU"


class Handover:
    """What a policy hands over: all of its weights, or its adapter on a base that is there already.

    lm: asked for whenever it is used; the first time here, where its adapter must be on. merge: True never
        gives an adapter by itself.
    """

    def __init__(self, lm: Callable[[], PreTrainedModel], *, merge: bool = False) -> None:
        self._lm = lm
        self._never = _BY_CHOICE if merge else why_never_alone(lm())
        self._reasons: dict[LoraRoom | None, str | None] = {}
        self._lock = threading.Lock()

    def room_wanted(self) -> LoraRoom | None:
        """For an adapter that could go alone; None where the policy has none."""
        if self._never is not None:
            return None
        lm = self._lm()
        modules = {name.rpartition(".")[2] for name, _ in _lora_layers(lm)}
        return LoraRoom(rank=_rank(lm), modules=tuple(sorted(modules)))

    def adapter_alone(self, room: LoraRoom | None) -> bool:
        """True where the adapter goes alone into this room of vLLM's. Where it does not, the log says once
        why. The answer stays what it was first."""
        with self._lock:  # servers are given their weights in threads
            if room not in self._reasons:
                lm = self._lm()
                reason = self._reasons[room] = self._never or why_no_room(lm, room)
                if reason is not None and has_adapter(lm):
                    _log.info("vLLM gets the policy's weights whole, with the adapter merged in: %s", reason)
            return self._reasons[room] is None

    def tensors(self, part: Part) -> dict[str, Tensor]:
        """Names and weights, as `vllm_worker` takes them. They must be whole."""
        lm = self._lm()
        return adapter_tensors(lm) if part == "adapter" else checkpoint_tensors(lm, merged=part == "whole")


@torch.no_grad()
def adapter_tensors(lm: PreTrainedModel) -> dict[str, Tensor]:
    """Both factors of each layer, as peft names them. What scales their product is in the second already, so
    that nobody needs to know of alpha, of ranks by pattern or of rsLoRA."""
    found: dict[str, Tensor] = {}
    for name, layer in _lora_layers(lm):
        assert isinstance(layer, LoraLinear)
        first, second = layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight
        assert isinstance(first, Tensor) and isinstance(second, Tensor)
        found[f"{name}.lora_A.weight"] = first.detach()
        found[f"{name}.lora_B.weight"] = second.detach() * layer.scaling[ADAPTER_NAME]
    return found


def adapter_rank(tensors: Mapping[str, Tensor]) -> int:
    """The highest rank among `adapter_tensors`."""
    return max(len(tensor) for name, tensor in tensors.items() if name.endswith(".lora_A.weight"))


def why_never_alone(lm: PreTrainedModel) -> str | None:
    """Why the adapter can go alone into no vLLM, in words that end a sentence; None where it can. Reads no
    weight. Of what is more than B A x beside a plain linear layer, vLLM would know nothing."""
    if not has_adapter(lm):
        return "it has none"
    for name, parameter in lm.named_parameters():
        if parameter.requires_grad and ".lora_" not in name:
            return f"{name} is trained beside it"
    for name, layer in _lora_layers(lm):
        reason = _why_special_layer(layer)
        if reason is not None:
            return f"{name} {reason}"
    if _rank(lm) > HIGHEST_RANK:
        return f"its rank of {_rank(lm)} is above {HIGHEST_RANK}, the highest that vLLM makes room for"
    stored = checkpoint_names(lm)
    for name, _ in _lora_layers(lm):
        if f"{name}.weight" not in stored:
            return f"checkpoints have another name for {name}"
    return None


def _why_special_layer(layer: BaseTunerLayer) -> str | None:
    base = layer.get_base_layer()
    if type(layer) is not LoraLinear or type(base) is not nn.Linear:
        return f"is a {type(base).__name__}, no plain linear layer"
    if ADAPTER_NAME in layer.lora_variant:
        return f"adds more than a product ({type(layer.lora_variant[ADAPTER_NAME]).__name__})"
    if layer.lora_bias[ADAPTER_NAME]:
        return "has a bias in its adapter"
    if layer.merged or layer.disable_adapters or layer.active_adapters != [ADAPTER_NAME]:
        return "has its adapter merged, switched off, or others beside it"
    return None


def why_no_room(lm: PreTrainedModel, room: LoraRoom | None) -> str | None:
    """Why the adapter does not go into this room of vLLM's; None where it does."""
    if room is None:
        return f"vLLM has no LoRA for a {type(lm).__name__}, or its server was started with `lora_rank` = 0"
    if _rank(lm) > room.rank:
        return f"its rank of {_rank(lm)} is above the server's `lora_rank` of {room.rank}"
    for name, _ in _lora_layers(lm):
        if name.rpartition(".")[2] not in room.modules:
            return f"vLLM has no LoRA for {name} of a {type(lm).__name__}"
    return None


def _rank(lm: nn.Module) -> int:
    return max(layer.r[ADAPTER_NAME] for _, layer in _lora_layers(lm) if isinstance(layer, LoraLinear))


def _lora_layers(lm: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    for name, module in lm.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module
