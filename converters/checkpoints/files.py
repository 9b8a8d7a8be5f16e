"""The files of a checkpoint: a folder, one file of tensors, or a hub model; and `reward_model.json`.

torch is imported where tensors are read: the names and shapes in safetensors files are had without it.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from conch.config import Section, load
from conch.converters.checkpoints.pickles import PickledTensor, tensors_in_pickle
from conch.errors import ConfigError, ConversionError, ModelError, first_line
from conch.log import progress
from conch.models.folders import ADAPTER_FILE, adapter_base, model_folder
from conch.store.manifest import Pooling, sha256_of

if TYPE_CHECKING:
    from torch import Tensor

REWARD_MODEL_FILE = "reward_model.json"

# Buffers that older versions of transformers saved with the weights, and a language model's head beside a
# reward's: no score depends on them.
HARMLESS = re.compile(
    r"(\.attn|\.attention|\.self)\.(bias|masked_bias)$|rotary_emb\.inv_freq$|position_ids$|^(model\.)?lm_head\."
)
_SHARD = re.compile(r"-\d+-of-\d+")
# Pickled files beside weights that hold none.
_NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|rng_state|random_states|scaler)")
_HEAD_NAMES = ["*head*", "*_layer.pt"]
_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
# How trainers wrap a state dict.
_WRAPPERS = ("state_dict", "module", "model")
_FLOATING = ("float16", "float32", "float64")
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
# A file of a head holds a few small tensors.
_MOST_OF_A_HEAD = 8
_LARGEST_HEAD_BYTES = 1 << 30
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


class TensorInfo(NamedTuple):
    """Shape of a tensor, and its dtype by torch's name."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Source:
    """The files of a checkpoint on this machine.

    name: folder, file or hub id, as the user wrote it.
    folder: where configuration and tokenizer are.
    weights: the files that hold tensors; safetensors are preferred to pickled ones.
    heads: those of `weights` that hold nothing but a head, beside the model's own.
    is_file: whether one file was given, beside which others may lie.
    on_the_hub: tensors of files that were not fetched; only their headers were.
    """

    name: str
    folder: Path
    weights: tuple[Path, ...]
    heads: tuple[Path, ...] = ()
    on_the_hub: Mapping[str, TensorInfo] | None = None
    is_file: bool = False

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds an adapter, not a model."""
        return (self.folder / ADAPTER_FILE).is_file()

    def sha256(self) -> str:
        """Return the hash over all weight files, at disk speed; "" where there are none."""
        digests = [sha256_of(path) for path in progress(self.weights, desc="hashing the checkpoint")]
        return hashlib.sha256("".join(digests).encode()).hexdigest() if digests else ""

    def config(self) -> dict[str, Any]:
        """Return `config.json` as it stands; {} where there is none.

        Raises:
            ConversionError: it is no JSON object.
        """
        return json_object(self.folder / "config.json")

    def described(self) -> dict[str, TensorInfo]:
        """Return shape and dtype of every tensor. Reads only the headers of safetensors files."""
        found: dict[str, TensorInfo] = dict(self.on_the_hub or {})
        for path in self.weights:
            found |= {self._full_name(path, name): info for name, info in _described_in(path).items()}
        return found

    def stored_dtype(self) -> str:
        """Return the dtype that holds every tensor exactly: float32 unless all are of one half precision."""
        dtypes = {
            info.dtype
            for name, info in self.described().items()
            if info.dtype.endswith(_FLOATING) and not HARMLESS.search(name)
        }
        return dtypes.pop() if dtypes in ({"bfloat16"}, {"float16"}) else "float32"

    def _full_name(self, path: Path, name: str) -> str:
        """Of a head in a file of its own, `weight` and `bias` are named after the file."""
        return f"{path.stem}.{name}" if path in self.heads and name in ("weight", "bias") else name

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name; mapped from disk, so that memory is taken only by what is changed.

        Raises:
            ConversionError: a file is damaged, holds more than tensors, or two hold the same name.
        """
        tensors: dict[str, Tensor] = {}
        for path in self.weights:
            for own_name, tensor in tensors_in(path).items():
                name = self._full_name(path, own_name)
                if name in tensors:
                    raise ConversionError(
                        f"{self.name}: tensor {name} stands in {path.name} and in another file beside it; "
                        "give the file that is meant as --checkpoint"
                    )
                tensors[name] = tensor
        return tensors


class RewardModelFile(Section):
    """`reward_model.json`, which the reward-model trainer writes beside the weights. No key is required."""

    template: str | None = None
    """Python format string over {text} and {eos}, or `chat`."""

    pooling: Pooling | None = None
    """Which tokens' states become the score; None takes what the kind of checkpoint does."""

    max_length: int | None = None
    """Tokens a sample may have, special tokens included."""

    reward_names: tuple[str, ...] | None = None
    """One name per output of the head."""

    mean: float | tuple[float, ...] | None = None
    """Mean of raw scores on reference samples; one number, or one per reward."""

    std: float | tuple[float, ...] | None = None
    """Standard deviation of raw scores on reference samples."""

    normalise: bool = False
    """Serve (raw - mean) / std where the options of a conversion do not say."""

    rng_seed: int | None = None
    """Names the member of an ensemble."""


def read_reward_model_file(folder: Path) -> RewardModelFile:
    """Read a checkpoint's `reward_model.json`; all defaults where the folder has none.

    Raises:
        ConversionError: the file is no JSON object, or a key is unknown or of a wrong type.
    """
    path = folder / REWARD_MODEL_FILE
    if not path.is_file():
        return RewardModelFile()
    try:
        return load(RewardModelFile, TypeAdapter(dict[str, Any]).validate_json(path.read_bytes()))
    except (OSError, ValidationError) as error:
        raise ConversionError(f"{path} is not a readable JSON object: {error}") from error
    except ConfigError as error:
        raise ConversionError(f"{path}: {error}") from error


def base_model_of(source: Source, requested: str | None) -> str:
    """Return the model that a value head or an adapter builds on, folder or hub id; "" where there is none.

    requested: wins over the base model that an adapter names.

    Raises:
        ConversionError: an adapter names no base model.
    """
    try:
        return requested or adapter_base(str(source.folder)) or ""
    except ModelError as error:
        raise ConversionError(f"{error}, or give --base_model") from error


def find_source(name: str, revision: str | None = None, *, weights: bool = True) -> Source:
    """Find the files of a folder, of one file, or of a hub model, which is fetched.

    Of a run's folder, those of its best checkpoint.

    weights: False looks for configuration and tokenizer alone.

    Raises:
        ConversionError: no folder, file or hub model has that name, or the hub cannot be reached.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return Source(name, path.parent, (path,), is_file=True)
    try:
        found = model_folder(str(path), "--checkpoint")
    except ModelError as error:
        raise ConversionError(str(error)) from None
    folder = Path(found) if Path(found).is_dir() else _download(name, revision, weights)
    if not weights:
        return Source(name, folder, ())
    files = _weight_files(folder)
    heads = _head_files(folder, files)
    return Source(name, folder, (*files, *heads), heads)


def glance_at(name: str, revision: str | None = None) -> Source:
    """Find the files of a checkpoint as `find_source` does; of a hub model fetch only the weights' headers.

    Raises:
        ConversionError: no folder, file or hub model has that name, or the hub cannot be reached.
    """
    if Path(name).expanduser().exists():
        return find_source(name, revision)
    source = find_source(name, revision, weights=False)
    from huggingface_hub import get_safetensors_metadata

    try:
        files = get_safetensors_metadata(name, revision=revision).files_metadata.values()
    except Exception as error:  # the hub's client raises many kinds for the same thing
        raise ConversionError(
            f"{name} has no safetensors on the hub whose headers can be read ({first_line(error)}): "
            "fetch it, and give its folder"
        ) from error
    tensors = {
        tensor: TensorInfo(tuple(info.shape), _DTYPES.get(str(info.dtype), "int64"))
        for file in files
        for tensor, info in file.tensors.items()
    }
    return Source(name, source.folder, (), on_the_hub=tensors)


def tensors_in(path: Path) -> dict[str, Tensor]:
    """Return the tensors of one file by name.

    Raises:
        ConversionError: the file is damaged, or a pickle of more than tensors, which could run code.
    """
    import torch
    from safetensors.torch import load_file

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
    from torch import Tensor

    content = _unwrapped(content)
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ConversionError(f"{path} holds no state_dict, a dict of names and tensors")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def _unwrapped(content: Any) -> Any:
    """Return the state dict inside what a trainer put around it."""
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    return content


def _described_in(path: Path) -> dict[str, TensorInfo]:
    if path.suffix != ".safetensors":
        return _described_in_pickle(path)
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: TensorInfo(tuple(part.get_shape()), _DTYPES.get(part.get_dtype(), "int64"))
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{path} cannot be read as safetensors ({first_line(error)})") from error


def _described_in_pickle(path: Path) -> dict[str, TensorInfo]:
    try:
        content = _unwrapped(tensors_in_pickle(path) or {})
    except Exception:  # damaged, or more than tensors: torch says which
        content = {}
    found = {name: value for name, value in content.items() if isinstance(value, PickledTensor)}
    if found:
        return {name: TensorInfo(*value) for name, value in found.items()}
    return {
        name: TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in tensors_in(path).items()
    }


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the files of the model's tensors: safetensors before pickled ones; by the index where one is."""
    for suffix in _WEIGHT_SUFFIXES:
        indexes = sorted(folder.glob(f"*{suffix}.index.json"))
        if indexes:
            return _indexed(indexes[0])
        files = [path for path in sorted(folder.glob(f"*{suffix}")) if not _NO_WEIGHTS.search(path.name)]
        if len(files) > 1:
            files = [path for path in files if not _is_head(path)] or files
        if len(files) > 1 and not all(_SHARD.search(path.name) for path in files):
            names = ", ".join(path.name for path in files)
            raise ConversionError(
                f"{folder} holds several files of tensors without an index ({names}): "
                "give the one that is meant as --checkpoint"
            )
        if files and (len(files) > 1 or not _is_head(files[0]) or not _has_other_weights(folder, suffix)):
            return tuple(files)
    return ()


def _has_other_weights(folder: Path, suffix: str) -> bool:
    """Whether files of a later suffix may be the model's, beside a head in one of this suffix."""
    later = _WEIGHT_SUFFIXES[_WEIGHT_SUFFIXES.index(suffix) + 1 :]
    return any(not _NO_WEIGHTS.search(path.name) for end in later for path in folder.glob(f"*{end}"))


def _head_files(folder: Path, weights: tuple[Path, ...]) -> tuple[Path, ...]:
    """Return the files beside the model's that hold a head and nothing else, one of each stem."""
    found: dict[str, Path] = {}
    taken = {path.stem for path in weights}
    for path in (path for suffix in _WEIGHT_SUFFIXES for path in sorted(folder.glob(f"*{suffix}"))):
        is_other = path.stem in taken or _SHARD.search(path.name) or _NO_WEIGHTS.search(path.name)
        if not is_other and path.stem not in found and _is_head(path):
            found[path.stem] = path
    return tuple(found.values())


def _is_head(path: Path) -> bool:
    """Whether a file holds the weights of a few linear layers and nothing else."""
    if path.stem in ("model", "pytorch_model", "adapter_model") or path.stat().st_size > _LARGEST_HEAD_BYTES:
        return False
    try:
        shapes = [info.shape for info in _described_in(path).values()]
    except ConversionError:
        return False
    has_matrix = any(len(shape) == 2 for shape in shapes)
    return has_matrix and len(shapes) <= _MOST_OF_A_HEAD and all(len(shape) <= 2 for shape in shapes)


def _indexed(index: Path) -> tuple[Path, ...]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ConversionError(f"{index} is no readable index of weights: {first_line(error)}") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ConversionError(f"{index.parent} lacks {some(missing)}, which its index names; fetch it again")
    return tuple(index.parent / name for name in names)


def _download(name: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*_SMALL_FILES, "*.py"]))
        for kind in (["*.safetensors"], ["*.bin"], ["*.pt"]) if weights else ():
            wanted = [*_SMALL_FILES, *kind, *_HEAD_NAMES]
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
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
    """Return the first few names, and how many more there are, for messages."""
    listed = sorted(names)
    more = f" and {len(listed) - shown} more" if len(listed) > shown else ""
    return ", ".join(listed[:shown]) + more


def json_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return TypeAdapter(dict[str, Any]).validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ConversionError(f"{path} is not a readable JSON object: {first_line(error)}") from error
