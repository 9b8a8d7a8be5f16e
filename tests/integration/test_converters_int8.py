"""Eight-bit weights, with torchao as it is: `make test-int8`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from conch.converters.checkpoints.reader import read_checkpoint
from conch.converters.options import ConversionOptions
from conch.converters.parts import plan_parts, write_part
from conch.converters.triton_models.reward_model import Row, Scorer
from tests.checkpoints import base_model, classifier, save_value_head, value_head_tensors

pytestmark = pytest.mark.int8

ROWS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [3] * 20]


def served(name: Path, **reading: str) -> Path:
    """A version folder in eight bits."""
    options = ConversionOptions(dtype="int8", **reading)
    folder = name.parent / "version"
    folder.mkdir()
    write_part(folder, *plan_parts("model", options), read_checkpoint(str(name), options), options)
    return folder


def dtypes_in(folder: Path) -> dict[str, str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "gptj", "gpt_neox", "opt", "bert", "roberta", "deberta-v2"]
)
def test_linear_layers_are_kept_and_served_in_eight_bits(tmp_path: Path, family: str) -> None:
    model = classifier(tmp_path / "model", family, num_labels=2)
    folder = served(tmp_path / "model")
    with torch.inference_mode():
        right = torch.cat([model(torch.tensor([row])).logits for row in ROWS]).numpy()
    differences = np.abs(Scorer(folder, "cpu").score([Row(ids) for ids in ROWS]).rewards - right)

    assert 0 < differences.max() < 0.1
    eight_bit = [name for name, dtype in dtypes_in(folder).items() if dtype == "I8"]
    assert eight_bit and not any("score" in name or "classifier" in name for name in eight_bit)
    assert (folder / "model.safetensors").stat().st_size < (
        tmp_path / "model" / "model.safetensors"
    ).stat().st_size


def test_a_value_heads_trunk_is_served_in_eight_bits(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", "gptj")
    tensors = value_head_tensors(base)
    save_value_head(tmp_path / "head", tensors, "safetensors")
    folder = served(tmp_path / "head", base_model=str(tmp_path / "base"))
    trunk = base.base_model
    trunk.load_state_dict(
        {k.removeprefix("transformer."): v for k, v in tensors.items() if "v_head" not in k}
    )
    with torch.inference_mode():
        states = [trunk(torch.tensor([row])).last_hidden_state[0, -1] for row in ROWS]
    right = torch.stack(states) @ tensors["v_head.weight"].T

    differences = np.abs(Scorer(folder, "cpu").score([Row(ids) for ids in ROWS]).rewards - right.numpy())
    assert 0 < differences.max() < 0.1 and "I8" in dtypes_in(folder).values()
