"""Where a checkpoint's files are: a folder, one file of tensors, or a model of the hub."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from conch.errors import ConversionError, first_line
from conch.log import progress
from conch.models.adapter import ADAPTER_FILE
from conch.store.manifest import sha256_of

# Buffers that older versions of transformers saved with the weights, and a language model's head beside a
# reward's: no score depends on them.
HARMLESS = re.compile(
    r"(\.attn|\.attention|\.self)\.(bias|masked_bias)$|rotary_emb\.inv_freq$|position_ids$|^(model\.)?lm_head\."
)
_SHARD = re.compile(r"-\d+-of-\d+")
# Pickled files beside weights that hold none.
_NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|rng_state|random_states|scaler)")
_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
# How trainers wrap a state dict.
_WRAPPERS = ("state_dict", "module", "model")


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint's files on this machine.

    name: as the user gave it. weights: the files that hold its tensors, safetensors before pickled ones.
    """

    name: str
    folder: Path
    weights: tuple[Path, ...]

    @property
    def is_adapter(self) -> bool:
        """Whether it holds an adapter, not a model."""
        return (self.folder / ADAPTER_FILE).is_file()

    def sha256(self) -> str:
        """Hash over all weight files, at disk speed; "" where there are none."""
        digests = [sha256_of(path) for path in progress(self.weights, desc="hashing the checkpoint")]
        return hashlib.sha256("".join(digests).encode()).hexdigest() if digests else ""

    def tensor_names(self) -> set[str]:
        """Names of all tensors. Reads only the headers of safetensors files."""
        return set(self._dtypes())

    def _dtypes(self) -> dict[str, torch.dtype]:
        found: dict[str, torch.dtype] = {}
        for path in self.weights:
            found |= _dtypes_in(path)
        return found

    def stored_dtype(self) -> torch.dtype:
        """The dtype that holds every tensor exactly: float32 unless all are of one half precision."""
        dtypes = {
            dtype
            for name, dtype in self._dtypes().items()
            if dtype.is_floating_point and not HARMLESS.search(name)
        }
        return dtypes.pop() if dtypes in ({torch.bfloat16}, {torch.float16}) else torch.float32

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name; mapped from disk, so that memory is taken only by what is changed.

        Raises:
            ConversionError: a file is damaged, holds more than tensors, or two hold the same name.
        """
        found: dict[str, Tensor] = {}
        for path in self.weights:
            for name, tensor in tensors_in(path).items():
                if name in found:
                    raise ConversionError(
                        f"{self.name}: tensor {name} stands in {path.name} and in another file beside it; "
                        "give the file that is meant as --checkpoint"
                    )
                found[name] = tensor
        return found


def find_source(name: str, revision: str | None = None, *, weights: bool = True) -> Source:
    """The files of a folder, of one file, or of a hub model, which is fetched.

    weights: False looks for configuration and tokenizer alone.

    Raises:
        ConversionError: there is nothing of that name, or the hub cannot be reached.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return Source(name, path.parent, (path,))
    folder = path if path.is_dir() else _fetched(name, revision, weights)
    return Source(name, folder, _weight_files(folder) if weights else ())


def tensors_in(path: Path) -> dict[str, Tensor]:
    """Tensors of one file by name.

    Raises:
        ConversionError: the file is damaged, or a pickle of more than tensors, which could run code.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Only the newer format, a zip archive, can be mapped instead of read.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    # A damaged file surfaces as anything from RuntimeError to UnpicklingError and EOFError.
    except Exception as error:
        raise ConversionError(
            f"{path} cannot be read as tensors alone ({first_line(error)}); if it is whole, it holds other "
            "Python objects, which are not loaded since they can run code: save its state_dict as safetensors"
        ) from error
    return _state_dict(content, path)


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ConversionError(f"{path} holds no state_dict, a dict of names and tensors")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def _dtypes_in(path: Path) -> dict[str, torch.dtype]:
    if path.suffix != ".safetensors":
        return {name: tensor.dtype for name, tensor in tensors_in(path).items()}
    try:
        with safe_open(path, framework="pt") as file:
            names = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{path} cannot be read as safetensors ({first_line(error)})") from error
    known = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
    return {name: known.get(dtype, torch.int64) for name, dtype in names.items()}


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """safetensors before .bin before .pt; by the index where there is one."""
    for suffix in (".safetensors", ".bin", ".pt"):
        indexes = sorted(folder.glob(f"*{suffix}.index.json"))
        if indexes:
            return _indexed(indexes[0])
        found = [path for path in sorted(folder.glob(f"*{suffix}")) if not _NO_WEIGHTS.search(path.name)]
        if len(found) > 1 and not all(_SHARD.search(path.name) for path in found):
            names = ", ".join(path.name for path in found)
            raise ConversionError(
                f"{folder} holds several files of tensors without an index ({names}): "
                "give the one that is meant as --checkpoint"
            )
        if found:
            return tuple(found)
    return ()


def _indexed(index: Path) -> tuple[Path, ...]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ConversionError(f"{index} is no readable index of weights: {first_line(error)}") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ConversionError(f"{index.parent} lacks {some(missing)}, which its index names; fetch it again")
    return tuple(index.parent / name for name in names)


def _fetched(name: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*_SMALL_FILES, "*.py"]))
        for kind in (["*.safetensors"], ["*.bin"], ["*.pt"]) if weights else ():
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*_SMALL_FILES, *kind]))
            if _weight_files(folder):
                break
        return folder
    except ConversionError:
        raise
    except Exception as error:  # the hub's client raises many kinds for the same thing
        raise ConversionError(
            f"{name} is no folder here, and cannot be had from the model hub ({first_line(error)}); "
            "check the name, or give the path of a folder"
        ) from error


def some(names: Iterable[str], shown: int = 4) -> str:
    """The first few names, and how many more there are."""
    listed = sorted(names)
    more = f" and {len(listed) - shown} more" if len(listed) > shown else ""
    return ", ".join(listed[:shown]) + more
