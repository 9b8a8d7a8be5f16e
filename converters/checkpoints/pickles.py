"""Names, shapes and dtypes of the tensors in a pickled checkpoint, without torch, and without running
anything.

torch's format since 1.6 is a zip archive whose `data.pkl` rebuilds tensors from storages that lie beside it
(torch docs, "Serialization semantics"). Here the rebuilding is only noted: nothing but the names below is
looked up.
"""

from __future__ import annotations

import collections
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from conch.errors import ConversionError

_STORAGES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


class PickledTensor(NamedTuple):
    """A tensor that was not rebuilt."""

    shape: tuple[int, ...]
    dtype: str


def tensors_in_pickle(path: Path) -> Mapping[str, Any] | None:
    """Return what a zipped checkpoint holds, its tensors as `PickledTensor`; None for files of the older
    format.

    Raises:
        ConversionError: the file holds more than tensors.
    """
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        name = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
        if name is None:
            return None
        with archive.open(name) as file:
            content = _Glance(file).load()
    return content if isinstance(content, dict) else None


class _Glance(pickle.Unpickler):
    """Looks up nothing but what makes tensors, and makes none."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuilt,
            ("torch._utils", "_rebuild_parameter"): _rebuilt_parameter,
            ("torch", "Size"): tuple,
        }
        if (module, name) in known:
            return known[module, name]
        if module in ("torch", "torch.storage") and (name in _STORAGES or name == "UntypedStorage"):
            return _STORAGES.get(name, "uint8")
        raise ConversionError(f"it holds {module}.{name}, which is more than tensors")

    def persistent_load(self, pid: Any) -> Any:
        return pid[1]  # of a storage, its dtype


def _rebuilt(dtype: str, offset: int, size: tuple[int, ...], *_: Any) -> PickledTensor:
    del offset
    return PickledTensor(tuple(size), dtype)


def _rebuilt_parameter(tensor: PickledTensor, *_: Any) -> PickledTensor:
    return tensor
