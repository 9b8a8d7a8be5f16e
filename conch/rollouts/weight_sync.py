"""Send the policy's weights to vLLM: which weights, under which names, and on which way.

`WeightSource` decides whether all weights go, with a LoRA adapter merged in, or the base once and then the
adapter alone. Tensors have the names of a Hugging Face checkpoint. They travel to servers in a broadcast
(`BroadcastGroup`) or in a file in shared memory (`SharedFile`).
"""

from __future__ import annotations

import threading
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
from torch.distributed import BroadcastOptions
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from conch.errors import RolloutError, RolloutUnavailableError, first_line
from conch.log import get_logger
from conch.models.adapter import ADAPTER_NAME, distinct_tensors, has_adapter
from conch.rollouts.protocol import MAX_LORA_RANK, LoraCapacity, Part, TensorSpec, WeightUpdate
from conch.rollouts.rendezvous import SignedStore, address_towards, join

_log = get_logger(__name__)

SHARED_MEMORY = Path("/dev/shm")
_CPU = torch.device("cpu")
_MERGED_BY_CHOICE = "`rollout.merge_adapter` is true, or left out in a process on a CPU"


@torch.no_grad()
def checkpoint_tensors(lm: PreTrainedModel, *, merged: bool = True) -> dict[str, Tensor]:
    """Names and weights as in the model's checkpoint; tied weights once.

    Tensors are those of the model; copied are only those that an adapter changes, or that a checkpoint stores
    in another shape.

    merged: True merges an adapter in, False leaves it out.
    """
    tensors = {
        plain: _with_adapter(lm, name, tensor.detach()) if merged else tensor.detach()
        for plain, name, tensor in distinct_tensors(lm)
    }
    return revert_weight_conversion(lm, tensors)


def checkpoint_names(lm: PreTrainedModel) -> set[str]:
    """Names of `checkpoint_tensors`. Reads no weight, so ZeRO-3 may hold them in shards."""
    # The shape decides into how many tensors a checkpoint splits fused experts. ZeRO-3 leaves a parameter
    # without its shape, and notes it in `ds_shape`.
    shapes = {
        plain: torch.empty(getattr(tensor, "ds_shape", tensor.shape), device="meta")
        for plain, _, tensor in distinct_tensors(lm)
    }
    return set(revert_weight_conversion(lm, shapes))


def _with_adapter(lm: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """`tensor` with the adapter's part added, as peft's `merge` would leave it."""
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


# ------------------------------------------------------------------------------------------------- transports


def tensor_specs(tensors: Mapping[str, Tensor]) -> tuple[TensorSpec, ...]:
    """Name, dtype and shape of each tensor, for the receiver of a broadcast."""
    return tuple(
        TensorSpec(name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape))
        for name, tensor in tensors.items()
    )


class SharedFile:
    """A safetensors file in shared memory with the latest weights; each version has a file name of its own.

    source: name of the run, part of the folder's name.
    """

    def __init__(self, source: str) -> None:
        self._folder = SHARED_MEMORY / f"conch-{source}"
        self._version: int | None = None
        self._lock = threading.Lock()

    def path(self, version: int, tensors: Callable[[], Mapping[str, Tensor]]) -> Path:
        """The file with this version's weights; it is written first where it does not exist.

        tensors: gives the weights, called only where the file is to be written.

        Raises:
            RolloutError: shared memory is full or absent.
        """
        file = self._folder / f"{version}.safetensors"
        with self._lock:
            if self._version != version:
                contents = tensors()  # first: where they may be read no more, the file that is there stays
                try:
                    self._folder.mkdir(mode=0o700, exist_ok=True)  # others on this machine may not read
                    self._delete_files()
                    save_file({name: tensor.contiguous() for name, tensor in contents.items()}, file)
                except (OSError, SafetensorError) as error:
                    raise RolloutError(
                        f"the weights cannot be written to {self._folder}: {error}; make room there, or set "
                        "`rollout.weights=broadcast`"
                    ) from error
                self._version = version
        return file

    def _delete_files(self) -> None:
        for old in self._folder.glob("*.safetensors"):
            old.unlink()

    def close(self) -> None:
        """Delete file and folder."""
        if self._folder.is_dir():
            self._delete_files()
            self._folder.rmdir()


def received_tensors(
    update: WeightUpdate, rank: int, size: int, timeout_s: float
) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors as the trainer broadcasts them.

    rank, size: of this process in the group, where the trainer has rank 0.

    Raises:
        RolloutUnavailableError: the group does not come about, or breaks.
    """
    store = join(update.host, update.port, update.token, rank=rank, timeout_s=timeout_s)
    address = address_towards(update.host, update.port)
    group = BroadcastGroup(store, rank, size, update.backend, address=address, timeout_s=timeout_s)
    yield from group.receive(update.tensors)


class BroadcastGroup:
    """A process group of the trainer (rank 0) and one server's workers, beside torch's default group.

    address: of this process, as the other members reach it.

    Raises:
        RolloutUnavailableError: from the constructor: the other members did not come, or a stranger did.
    """

    def __init__(
        self, store: SignedStore, rank: int, size: int, backend: str, *, address: str, timeout_s: float
    ) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else _CPU
        timeout = timedelta(seconds=timeout_s)
        self._store: SignedStore | None = store  # torch does not keep a store alive that is made in Python
        try:
            self._group: Any = (
                _nccl(store, rank, size, timeout)
                if backend == "nccl"
                else _gloo(store, rank, size, timeout, address)
            )
        except RuntimeError as error:
            raise RolloutUnavailableError(
                f"no {backend} group for the weights: {first_line(error)[:300]}"
            ) from error

    def send(self, tensors: Iterable[Tensor]) -> None:
        """Broadcast tensors, one after the other."""
        for tensor in tensors:
            self._broadcast(tensor.to(self._device).contiguous())

    def receive(self, specs: Iterable[TensorSpec]) -> Iterator[tuple[str, Tensor]]:
        """Yield names and tensors as rank 0 sends them."""
        for spec in specs:
            tensor = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=self._device)
            self._broadcast(tensor)
            yield spec.name, tensor

    def close(self) -> None:
        """Leave the group. A member that still waits for a tensor gets an error, even where an exception's
        traceback keeps this object alive."""
        self._group = self._store = None

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


def _gloo(store: SignedStore, rank: int, size: int, timeout: timedelta, address: str) -> Any:
    options = torch.distributed.ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
    # By default gloo takes the address that this machine's name resolves to, which may lead nowhere.
    options._devices = [torch.distributed.ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = timeout
    return torch.distributed.ProcessGroupGloo(store, rank, size, options)


def _nccl(store: SignedStore, rank: int, size: int, timeout: timedelta) -> Any:
    options = torch.distributed.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return torch.distributed.ProcessGroupNCCL(store, rank, size, options)


class WeightSource:
    """Weights of the policy for vLLM: all of them, or an adapter alone for a vLLM that holds its base.

    lm: gives the policy, called whenever its weights are needed; the first time in the constructor, when its
        adapter must be on.
    merge: True always merges an adapter.
    """

    def __init__(self, lm: Callable[[], PreTrainedModel], *, merge: bool = False) -> None:
        self._lm = lm
        self._always_merged = _MERGED_BY_CHOICE if merge else why_always_merged(lm())
        self._reasons: dict[LoraCapacity | None, str | None] = {}
        self._lock = threading.Lock()

    def required_lora(self) -> LoraCapacity | None:
        """Capacity that vLLM needs for the adapter to go alone; None where it is merged, or there is none."""
        if self._always_merged is not None:
            return None
        lm = self._lm()
        modules = {name.rpartition(".")[2] for name, _ in _lora_layers(lm)}
        return LoraCapacity(rank=_rank(lm), modules=tuple(sorted(modules)))

    def sends_adapter_alone(self, capacity: LoraCapacity | None) -> bool:
        """True where the adapter goes alone to a vLLM of this capacity, None meaning no adapters.

        Logs once why it does not. The first answer stands for the whole run.
        """
        with self._lock:  # servers are sent their weights in threads
            if capacity not in self._reasons:
                lm = self._lm()
                reason = self._always_merged or why_unsupported(lm, capacity)
                self._reasons[capacity] = reason
                if reason is not None and has_adapter(lm):
                    _log.info(
                        "samplers get the policy's weights whole, with the adapter merged in: %s", reason
                    )
            return self._reasons[capacity] is None

    def base_stays(self) -> bool:
        """True where the weights that an adapter adds to stay in their place, whole, for the whole run."""
        return not any(hasattr(parameter, "ds_shape") for parameter in self._lm().parameters())

    def tensors(self, part: Part) -> dict[str, Tensor]:
        """Names and weights as `conch.rollouts.vllm.worker` loads them. ZeRO-3 must have gathered them."""
        lm = self._lm()
        return adapter_tensors(lm) if part == "adapter" else checkpoint_tensors(lm, merged=part == "whole")


@torch.no_grad()
def adapter_tensors(lm: PreTrainedModel) -> dict[str, Tensor]:
    """Both factors of each layer, under peft's names.

    The scale of their product is multiplied into the second factor, so that the receiver needs to know
    neither alpha nor ranks by pattern nor rsLoRA.
    """
    tensors: dict[str, Tensor] = {}
    for name, layer in _lora_layers(lm):
        assert isinstance(layer, LoraLinear)
        first, second = layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight
        assert isinstance(first, Tensor) and isinstance(second, Tensor)
        tensors[f"{name}.lora_A.weight"] = first.detach()
        tensors[f"{name}.lora_B.weight"] = second.detach() * layer.scaling[ADAPTER_NAME]
    return tensors


def adapter_rank(tensors: Mapping[str, Tensor]) -> int:
    """Highest rank among the layers of `adapter_tensors`."""
    return max(len(tensor) for name, tensor in tensors.items() if name.endswith(".lora_A.weight"))


def why_always_merged(lm: PreTrainedModel) -> str | None:
    """Why the adapter can go alone to no vLLM, as the end of a sentence; None where it can.

    vLLM adds B A x to a plain linear layer, and knows nothing else. Reads no weight.
    """
    if not has_adapter(lm):
        return "it has none"
    for name, parameter in lm.named_parameters():
        if parameter.requires_grad and ".lora_" not in name:
            return f"{name} is trained beside it"
    for name, layer in _lora_layers(lm):
        reason = _why_special_layer(layer)
        if reason is not None:
            return f"{name} {reason}"
    if _rank(lm) > MAX_LORA_RANK:
        return f"its rank of {_rank(lm)} is above {MAX_LORA_RANK}, the highest that vLLM makes room for"
    names = checkpoint_names(lm)
    for name, _ in _lora_layers(lm):
        if f"{name}.weight" not in names:
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


def why_unsupported(lm: PreTrainedModel, capacity: LoraCapacity | None) -> str | None:
    """Why a vLLM of this capacity cannot take the adapter, as the end of a sentence; None where it can."""
    if capacity is None:
        return (
            f"vLLM has no LoRA for a {type(lm).__name__}, or the server takes none (`max_lora_rank` = 0, "
            "`engine=transformers`)"
        )
    if _rank(lm) > capacity.rank:
        return f"its rank of {_rank(lm)} is above the server's `max_lora_rank` of {capacity.rank}"
    for name, _ in _lora_layers(lm):
        if name.rpartition(".")[2] not in capacity.modules:
            return f"vLLM has no LoRA for {name} of a {type(lm).__name__}"
    return None


def _rank(lm: nn.Module) -> int:
    return max(layer.r[ADAPTER_NAME] for _, layer in _lora_layers(lm) if isinstance(layer, LoraLinear))


def _lora_layers(lm: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    for name, module in lm.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module
