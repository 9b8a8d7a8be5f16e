"""The runner of ONNX and TorchScript graphs: what needs no graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conch.converters.triton_models import graph_model as graph


class SumOfIds:
    """Stands where the engine does, at the edge of this process: the sum of a row's ids."""

    versions = "none"
    shapes: list[tuple[int, ...]]

    def __init__(self, _path: Path, _device: str) -> None:
        self.shapes = []

    def __call__(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        self.shapes.append(input_ids.shape)
        return (input_ids * attention_mask).sum(axis=1, keepdims=True).astype(np.float32)


@pytest.fixture
def scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    manifest = {"reward_names": ["reward"], "pad_token_id": 9, "vocab_size": 10, "max_length": 8}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / graph.ONNX_FILE).touch()
    monkeypatch.setattr(graph, "OnnxGraph", SumOfIds)
    return graph.Scorer(tmp_path, "cpu")


def test_rows_of_like_length_share_a_pass_within_the_budget(scorer: Any) -> None:
    scorer.tokens_per_forward = 4

    scores = scorer.score([[1, 2, 3, 4], [5], [1, 1, 1], [2, 2]])

    assert scores.tolist() == [[10.0], [5.0], [3.0], [4.0]]
    assert scorer.graph.shapes == [(2, 2), (1, 3), (1, 4)]


def test_a_pass_is_small_on_a_cpu(scorer: Any) -> None:
    assert scorer.tokens_per_forward == 512
