"""Files that are copied and written later are those that would have been written at once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from accelerate.utils import other
from torch import nn
from transformers import modeling_utils

from conch.training.overlap.snapshots import Snapshot, WriteCancelledError
from tests.tiny import tiny_decoder


def state() -> dict[str, Any]:
    """What optimizers and DeepSpeed save: shared memory, parameters, numbers, other objects."""
    flat = torch.arange(12, dtype=torch.float32)
    betas = (0.9, 0.999)
    return {
        "views": [flat[:6].view(2, 3), flat[6:]],
        "same": flat,
        "parameter": nn.Parameter(torch.ones(3, dtype=torch.bfloat16)),
        "groups": OrderedDict(a={"betas": betas}, b={"betas": betas, "step": torch.tensor(3.0)}),
        "empty": torch.empty(0),
        "shape": torch.Size([2, 3]),
    }


def tensors_of(state: dict[str, Any]) -> list[torch.Tensor]:
    return [*state["views"], state["same"], state["parameter"], state["groups"]["b"]["step"]]


@pytest.mark.parametrize("zipped", [True, False])
def test_objects_are_written_as_they_were_when_the_snapshot_was_taken(tmp_path: Path, zipped: bool) -> None:
    saved, snapshot = state(), Snapshot()
    torch.save(saved, tmp_path / "now", _use_new_zipfile_serialization=zipped)
    with snapshot.take():
        torch.save(saved, tmp_path / "later", _use_new_zipfile_serialization=zipped)
    with torch.no_grad():
        for tensor in tensors_of(saved):
            tensor.fill_(-1.0)
    saved["groups"]["b"]["betas"] = (0.0, 0.0)
    assert (tmp_path / "later").stat().st_size == 0 and snapshot.num_bytes == 12 * 4 + 3 * 2 + 4
    snapshot.write()
    now, later = (torch.load(tmp_path / name, weights_only=False) for name in ("now", "later"))
    assert all(map(torch.equal, tensors_of(now), tensors_of(later)))
    assert now["groups"]["b"]["betas"] == later["groups"]["b"]["betas"] == (0.9, 0.999)
    assert isinstance(later["parameter"], nn.Parameter) and later["shape"] == torch.Size([2, 3])
    shared = {tensor.untyped_storage().data_ptr() for tensor in (*later["views"], later["same"])}
    assert len(shared) == 1
    assert (tmp_path / "later").stat().st_size == pytest.approx((tmp_path / "now").stat().st_size, abs=200)


def test_safetensors_are_written_byte_for_byte_as_the_library_does(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.randn(2, 2, dtype=torch.bfloat16),
        "ü": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "part": torch.randn(1000)[10:12],
    }
    safetensors.torch.save_file(tensors, tmp_path / "now", metadata={"format": "pt"})
    snapshot = Snapshot()
    with snapshot.take():
        safetensors.torch.save_file(tensors, tmp_path / "later", metadata={"format": "pt"})
    assert snapshot.num_bytes < 1000  # of `part` not all that it is a part of
    for tensor in tensors.values():
        tensor.zero_()
    snapshot.write()
    now, later = (safetensors.torch.load_file(tmp_path / name) for name in ("now", "later"))
    assert now.keys() == later.keys() == tensors.keys()
    assert all(torch.equal(now[name], later[name]) and now[name].dtype == later[name].dtype for name in now)
    one_type = {name: torch.randn(4, 3) for name in "cab"}
    safetensors.torch.save_file(one_type, tmp_path / "now", metadata={"format": "pt"})
    with (again := Snapshot()).take():
        safetensors.torch.save_file(one_type, tmp_path / "later", metadata={"format": "pt"})
    again.write()
    assert (tmp_path / "later").read_bytes() == (tmp_path / "now").read_bytes()


def test_a_models_folder_is_the_same_and_its_weights_are_copied_once(tmp_path: Path) -> None:
    lm, snapshot = tiny_decoder("gpt2"), Snapshot()
    lm.save_pretrained(tmp_path / "now")
    with snapshot.take():
        lm.save_pretrained(tmp_path / "later")
        other.save(lm.state_dict(), tmp_path / "state", safe_serialization=True)
    assert snapshot.num_bytes == sum(p.nbytes for p in lm.parameters())
    (tmp_path / "later").rename(tmp_path / "moved")
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.zero_()
    snapshot.write()
    for file in (tmp_path / "now").iterdir():
        assert (tmp_path / "moved" / file.name).read_bytes() == file.read_bytes(), file.name
    weights = safetensors.torch.load_file(tmp_path / "state")
    assert float(weights["transformer.wte.weight"].abs().sum()) > 0


def test_other_threads_and_other_files_are_written_at_once(tmp_path: Path) -> None:
    with Snapshot().take():
        thread = threading.Thread(target=torch.save, args=(1, tmp_path / "other"))
        thread.start()
        thread.join()
        with (tmp_path / "stream").open("wb") as stream:
            torch.save(2, stream)
        safetensors.torch.save_file({"a": torch.ones(2, dtype=torch.complex64)}, tmp_path / "complex")
    assert torch.load(tmp_path / "other") == 1 and torch.load(tmp_path / "stream") == 2
    assert safetensors.torch.load_file(tmp_path / "complex")["a"].dtype == torch.complex64


def test_libraries_save_as_before_once_it_is_taken(tmp_path: Path) -> None:
    places = [(torch, "save"), (safetensors.torch, "save_file")]
    places += [(module, "safe_save_file") for module in (modeling_utils, other)]
    before = [getattr(module, name) for module, name in places]
    with pytest.raises(FileNotFoundError), Snapshot().take():
        torch.save(1, tmp_path / "missing" / "file")
    assert [getattr(module, name) for module, name in places] == before


def test_what_safetensors_refuses_is_refused_at_once(tmp_path: Path) -> None:
    shared = torch.ones(4)
    with pytest.raises(RuntimeError, match="share memory"), Snapshot().take():
        safetensors.torch.save_file({"a": shared, "b": shared}, tmp_path / "file")
    with pytest.raises(ValueError, match="non contiguous"), Snapshot().take():
        safetensors.torch.save_file({"a": torch.ones(4, 3).t()}, tmp_path / "file")


def test_a_cancelled_snapshot_is_not_written(tmp_path: Path) -> None:
    snapshot = Snapshot()
    with snapshot.take():
        torch.save(torch.ones(4), tmp_path / "file")
    snapshot.cancel()
    with pytest.raises(WriteCancelledError):
        snapshot.write()
    assert (tmp_path / "file").stat().st_size == 0
