"""Files that libraries are about to write, copied to host memory, to be written while training goes on.

Inside `Snapshot.take` a Hugging Face model, accelerate and DeepSpeed save as ever, but for what is large: in
place of `torch.save` and safetensors' `save_file` stand functions that copy what they are given and open the
file. `Snapshot.write` then writes the same content, on any thread. What takes another way to the disk is
written at once and not copied: slower, and as exact.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.storage import TypedStorage, UntypedStorage

_CHUNK_BYTES = 1 << 23
"""Of one write: a cancelled one ends within some milliseconds."""

_TENSOR_SAVERS = (
    ("safetensors.torch", "save_file"),
    ("transformers.modeling_utils", "safe_save_file"),
    ("accelerate.utils.other", "safe_save_file"),
)
"""Modules and the names by which they call safetensors' `save_file`."""

_SAFETENSORS_TYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}


class WriteCancelledError(Exception):
    """A snapshot's files are not wanted any more."""


class _OutputFile:
    """A file for `torch.save` and `write_safetensors` that shows no descriptor: to one, torch's old format,
    which DeepSpeed takes, writes a whole tensor with the interpreter's lock held. It stays the same file when
    its folder gets another name."""

    def __init__(self, path: str | os.PathLike[str], cancelled: threading.Event) -> None:
        self._file = open(path, "wb")  # noqa: SIM115  closed after it is written, on another thread
        self._cancelled = cancelled
        self.failure: OSError | WriteCancelledError | None = None
        """What a write failed with: torch has an error of its own in its place ("unexpected pos 64 vs 0")."""

    def write(self, data: Any) -> int:
        """Write bytes. Raises WriteCancelledError, between two chunks, once the snapshot is cancelled."""
        view = memoryview(data).cast("B")
        try:
            for begin in range(0, len(view), _CHUNK_BYTES):
                if self._cancelled.is_set():
                    raise WriteCancelledError
                self._file.write(view[begin : begin + _CHUNK_BYTES])
        except (OSError, WriteCancelledError) as error:
            self.failure = error
            raise
        return len(view)

    def flush(self) -> None:
        """Hand on what is buffered."""
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Snapshot:
    """Contents of files as they were at one moment.

    Tensors that share memory share one copy, also between files: the weights of a checkpoint, which stand in
    two, are copied once.

    num_bytes: copied so far.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self._copies: dict[tuple[str, int, int], tuple[UntypedStorage, UntypedStorage]] = {}
        self._writes: list[tuple[_OutputFile, Callable[[_OutputFile], object]]] = []
        self._cancelled = threading.Event()

    @contextmanager
    def take(self) -> Iterator[None]:
        """Inside, files that this thread saves are opened, and what belongs into them is copied."""
        owner, save, save_file = threading.get_ident(), torch.save, safetensors.torch.save_file

        def take_object(obj: object, f: Any, *args: Any, **settings: Any) -> None:
            if threading.get_ident() != owner or not isinstance(f, str | os.PathLike):
                save(obj, f, *args, **settings)
                return
            copy = self._copied_object(obj)
            self._add(f, lambda file: save(copy, file, *args, **settings))  # pyright: ignore[reportArgumentType]  a writer

        def take_tensors(
            tensors: dict[str, Tensor], filename: Any, metadata: dict[str, str] | None = None
        ) -> None:
            if threading.get_ident() != owner or not _is_plain(tensors):
                save_file(tensors, filename, metadata)
                return
            copies = self._copied_tensors(tensors)
            self._add(filename, lambda file: write_safetensors(file, copies, metadata))

        modules = [
            (sys.modules[name], attribute) for name, attribute in _TENSOR_SAVERS if name in sys.modules
        ]
        places = [(torch, "save", take_object), *((*place, take_tensors) for place in modules)]
        before = [getattr(module, name) for module, name, _ in places]
        try:
            for module, name, stand_in in places:
                setattr(module, name, stand_in)
            yield
        finally:
            for (module, name, _), original in zip(places, before, strict=True):
                setattr(module, name, original)
            # What is to be written holds its copies itself; from here on others may get the sources' memory.
            self._copies.clear()

    def write(self) -> None:
        """Write all files, and let go of the copies one by one.

        Raises:
            WriteCancelledError: `cancel` was called.
            OSError, RuntimeError: the disk failed.
        """
        try:
            while self._writes:
                file, write = self._writes[0]
                try:
                    write(file)
                except Exception as error:
                    raise file.failure or error from error
                file.close()
                del write, self._writes[0]
        finally:
            self.close()

    def cancel(self) -> None:
        """Have `write` end soon, with half-written files."""
        self._cancelled.set()

    def close(self) -> None:
        """Close files that are not written, and let go of the copies."""
        self._cancelled.set()
        for file, _ in self._writes:
            try:
                file.close()
            except OSError:  # what it holds back does not fit on the disk: the failure of the write says so
                continue
        self._writes.clear()

    def _add(self, path: str | os.PathLike[str], write: Callable[[_OutputFile], object]) -> None:
        self._writes.append((_OutputFile(path, self._cancelled), write))

    def _copied_object(self, obj: object) -> object:
        """A copy as `torch.load` makes it of a file: what shares an object or memory shares the copy."""
        buffer, storages = io.BytesIO(), list[TypedStorage | UntypedStorage]()
        _StoragePickler(buffer, storages, self._copied_storage).dump(obj)
        buffer.seek(0)
        return _StorageUnpickler(buffer, storages).load()

    def _copied_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        used = Counter[int]()
        for tensor in tensors.values():
            used[tensor.untyped_storage().data_ptr()] += tensor.nbytes
        copies: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            whole = tensor.untyped_storage()
            if 2 * used[whole.data_ptr()] < whole.nbytes():  # a small part of something large
                copies[name] = tensor.detach().to("cpu", copy=True)
                continue
            place = (tensor.storage_offset(), tensor.size(), tensor.stride())
            copies[name] = torch.empty(0, dtype=tensor.dtype).set_(self._copied_storage(whole), *place)  # pyright: ignore[reportArgumentType]
        return copies

    def _copied_storage(self, storage: UntypedStorage) -> UntypedStorage:
        if storage.nbytes() == 0 or storage.device.type == "meta":
            return storage
        key = (str(storage.device), storage.data_ptr(), storage.nbytes())
        if key not in self._copies:
            source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # pyright: ignore[reportArgumentType]
            copy = torch.empty(storage.nbytes(), dtype=torch.uint8).copy_(source)
            self._copies[key] = copy.untyped_storage(), storage  # held, so that its memory stays its own
            self.num_bytes += storage.nbytes()
        return self._copies[key][0]


class _StoragePickler(pickle.Pickler):
    """Puts storages aside, as `torch.save` does."""

    def __init__(
        self,
        file: io.BytesIO,
        storages: list[TypedStorage | UntypedStorage],
        copied: Callable[[UntypedStorage], UntypedStorage],
    ) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._storages = storages
        self._copied = copied

    def persistent_id(self, obj: object) -> int | None:
        """Number of a storage's copy; None for what is pickled as it is."""
        if isinstance(obj, TypedStorage):
            whole = self._copied(obj._untyped_storage)
            self._storages.append(TypedStorage(wrap_storage=whole, dtype=obj.dtype, _internal=True))
        elif isinstance(obj, UntypedStorage):
            self._storages.append(self._copied(obj))
        else:
            return None
        return len(self._storages) - 1


class _StorageUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, storages: Sequence[TypedStorage | UntypedStorage]) -> None:
        super().__init__(file)
        self._storages = storages

    def persistent_load(self, pid: int) -> TypedStorage | UntypedStorage:
        """The copy of that number."""
        return self._storages[pid]


def write_safetensors(
    file: _OutputFile, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write what `safetensors.torch.save_file` writes (github.com/huggingface/safetensors, "Format"): the
    header's length, the header in JSON, the tensors. Contiguous tensors on the CPU.
    """
    # Large items first keeps every tensor aligned, as the library does.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, str(item[1].dtype), item[0]))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        kind, shape = _SAFETENSORS_TYPES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for _, tensor in ordered:
        if tensor.nbytes:
            file.write(tensor.reshape(-1).view(torch.uint8).numpy())


def _is_plain(tensors: Mapping[str, Tensor]) -> bool:
    """Whether `write_safetensors` can write them, and safetensors would."""
    places = [tensor.data_ptr() for tensor in tensors.values() if tensor.nbytes]
    return len(set(places)) == len(places) and all(
        tensor.layout == torch.strided
        and tensor.dtype in _SAFETENSORS_TYPES
        and tensor.device.type in ("cpu", "cuda")
        and tensor.is_contiguous()
        and not tensor.is_neg()
        for tensor in tensors.values()
    )
