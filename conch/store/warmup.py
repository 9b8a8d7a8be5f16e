"""Requests that a server sends to a model before it counts as loaded, so that no caller pays for first calls.

They matter most at a swap: the new version then answers at once as fast as the old one did. Their sample is
one of `golden.json`: random ids could lie outside the vocabulary, and a warm-up that fails keeps the model
from loading. Triton reads the data from `<model>/warmup/`.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from conch.store.manifest import GoldenSample
from conch.triton.contract import MASK_INPUT, TEXT_INPUT, TOKEN_INPUT, RewardModelSpec

FOLDER = "warmup"

_INTEGERS = {"INT32": np.int32, "INT64": np.int64}
# Libraries choose other kernels for one row and for many, and get memory for the larger.
_ROWS = (1, 8)


def write_warmup(folder: Path, spec: RewardModelSpec, sample: GoldenSample) -> str:
    """Write the warm-up data of a version into `folder`, in files whose names are unique to the version.

    An ensemble that asks its members, which may not be loaded yet, gets no warm-up of its own.

    Returns:
        text of protobuf to add to both configurations of the version.
    """
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    pb: Any = model_config_pb2  # built at run time, so nothing is known of its types
    config = pb.ModelConfig()
    folder.mkdir(exist_ok=True)
    asks_others = spec.asks_members or spec.engine == "ensemble"
    tensors = {} if asks_others else _tensors(spec, sample)
    files = {name: f"{spec.content_sha256[:16]}-{name}" for name in tensors}
    for name, (_, _, data) in tensors.items():
        (folder / files[name]).write_bytes(data)  # one row; Triton repeats it
    for rows in sorted({min(rows, spec.max_batch_size) for rows in _ROWS}) if tensors else ():
        request = config.model_warmup.add(name=f"{rows} rows", batch_size=rows, count=1)
        for name, (dtype, dims, _) in tensors.items():
            request.inputs[name].data_type = pb.DataType.Value(dtype)
            request.inputs[name].dims.extend(dims)
            request.inputs[name].input_data_file = files[name]
    return text_format.MessageToString(config)


def take_warmup(staged: Path, folder: Path) -> None:
    """Move the data files from `staged` to `<folder>/warmup/`, before a configuration names them.

    Files there that the present configurations do not name belong to older versions, and are deleted.
    """
    target = folder / FOLDER
    target.mkdir(parents=True, exist_ok=True)
    configs = "".join(config.read_text(encoding="utf-8") for config in folder.rglob("*.pbtxt"))
    for file in target.iterdir():
        if file.name not in configs:
            file.unlink()
    for file in staged.iterdir():
        file.replace(target / file.name)


def _tensors(spec: RewardModelSpec, sample: GoldenSample) -> dict[str, tuple[str, list[int], bytes]]:
    """Return input -> (Triton's name of its type, its dims, bytes of one row)."""
    if sample.text is not None:
        text = sample.text.encode("utf-8")
        return {TEXT_INPUT: ("TYPE_STRING", [1], struct.pack("<I", len(text)) + text)}
    ids = np.array(sample.input_ids, dtype=_INTEGERS[spec.input_dtype])
    dtype = f"TYPE_{spec.input_dtype}"
    tensors = {TOKEN_INPUT: (dtype, [len(ids)], ids.tobytes())}
    if spec.takes_attention_mask:
        tensors[MASK_INPUT] = (dtype, [len(ids)], np.ones_like(ids).tobytes())
    return tensors
