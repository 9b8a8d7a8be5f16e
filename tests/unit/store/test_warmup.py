from __future__ import annotations

from pathlib import Path

import numpy as np
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from conch.store.manifest import GoldenSample
from conch.store.warmup import write_warmup
from conch.triton.contract import RewardModelSpec
from tests.stores import store_model


def requests(text: str) -> list:
    config = model_config_pb2.ModelConfig()  # pyright: ignore[reportAttributeAccessIssue]
    text_format.Parse(text, config)
    return list(config.model_warmup)


def test_a_text_goes_alone_and_eight_at_a_time(tmp_path: Path) -> None:
    spec = RewardModelSpec("walks", content_sha256="f" * 64)
    made = requests(write_warmup(tmp_path, spec, GoldenSample(text="aß", scores=(1.0,))))
    assert [request.batch_size for request in made] == [1, 8]
    (file,) = {request.inputs["text"].input_data_file for request in made}
    assert (tmp_path / file).read_bytes() == b"\x03\x00\x00\x00a\xc3\x9f"


def test_tokens_go_with_a_mask_of_ones_in_the_declared_type(tmp_path: Path) -> None:
    spec = RewardModelSpec(
        "walks", form="token", input_dtype="INT32", max_batch_size=4, content_sha256="f" * 64
    )
    made = requests(write_warmup(tmp_path, spec, GoldenSample(input_ids=(5, 6, 7), scores=(1.0,))))
    assert [request.batch_size for request in made] == [1, 4]
    inputs = made[0].inputs
    read = {
        name: np.frombuffer((tmp_path / inputs[name].input_data_file).read_bytes(), np.int32)
        for name in inputs
    }
    assert {name: values.tolist() for name, values in read.items()} == {
        "input_ids": [5, 6, 7],
        "attention_mask": [1, 1, 1],
    }
    assert all(list(inputs[name].dims) == [3] for name in inputs)


def test_an_ensemble_is_warmed_up_if_it_holds_its_members(tmp_path: Path) -> None:
    sample = GoldenSample(text="ab", scores=(1.0,))
    asking = RewardModelSpec("ens", content_sha256="f" * 64, members=("a", "b"))
    assert not requests(write_warmup(tmp_path, asking, sample))
    holding = RewardModelSpec("ens", content_sha256="f" * 64, members=("a", "b"), holds_members=True)
    assert [each.batch_size for each in requests(write_warmup(tmp_path, holding, sample))] == [1, 8]


def test_a_new_version_brings_its_own_data_and_data_that_nobody_names_goes(tmp_path: Path) -> None:
    def data() -> set[str]:
        return {file.name for file in (tmp_path / "lengths" / "warmup").iterdir()}

    store_model(tmp_path, "lengths")
    first = data()
    store_model(tmp_path, "lengths", weights=b"others")
    (second,) = data() - first
    assert first < data()  # a server that loads while a version is published may still look for it
    for config in ("config.pbtxt", "configs/embedded.pbtxt"):
        assert second in (tmp_path / "lengths" / config).read_text()
    store_model(tmp_path, "lengths", weights=b"third")
    assert second in data() and not first & data()
