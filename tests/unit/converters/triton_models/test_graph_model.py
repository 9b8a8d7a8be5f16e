"""The runner of ONNX and TorchScript graphs, without a server; and what graphs hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from conch.converters.backends.graph import check_graph
from conch.converters.checkpoints.heads import Head, LinearLayer
from conch.converters.checkpoints.reader import RewardCheckpoint
from conch.converters.options import ConversionOptions
from conch.converters.parity.compare import compare
from conch.converters.parity.reference import reference_of
from conch.converters.parity.subprocess_model import SubprocessModel
from conch.converters.parts import plan_parts, write_part
from conch.converters.triton_models import graph_model as graph
from conch.errors import ConversionError
from conch.store.manifest import ScoringRules
from tests.checkpoints import EOS, LETTERS, PAD, config_of, random_model, tokenizer_for
from tests.forks import conversions_fork


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


# ------------------------------------------------------------------------------------------ what graphs hold


def trunk_with_head(outputs: int, **settings: Any) -> RewardCheckpoint:
    tokenizer = tokenizer_for("llama")
    defaults: dict[str, Any] = {
        "template": "{text}",
        "max_length": 20,
        "reward_names": ("reward",),
        "normalise": False,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "vocab_size": len(tokenizer),
        "truncation_side": "right",
        "head_activation": "gelu",
    }
    rules = ScoringRules(**{**defaults, **settings})
    torch.manual_seed(1)
    layers = tuple(
        LinearLayer(torch.randn(out, into) / into**0.5, torch.randn(out))
        for into, out in ((32, 8), (8, outputs))
    )
    model = random_model(AutoModel, config_of("llama"))
    return RewardCheckpoint("here", model, Head(layers, "gelu"), tokenizer, rules, longest_compared=20)


@pytest.mark.parametrize(
    "settings",
    [
        {"pooling": "token", "pooling_token_id": LETTERS.index(";"), "function_to_apply": "sigmoid"},
        {"pooling": "last_token"},
        {
            "pooling": "steps",
            "aggregate": "last",
            "function_to_apply": "softmax",
            "columns": (1,),
            "separator_id": LETTERS.index("."),
            "separator_ids": (LETTERS.index(";"), LETTERS.index(".")),
            "step_separator": ";.",
        },
    ],
    ids=lambda settings: settings["pooling"],
)
def test_a_graph_scores_by_two_layers_tokens_and_steps(tmp_path: Path, settings: dict[str, Any]) -> None:
    checkpoint = trunk_with_head(2 if "columns" in settings else 1, **settings)
    reference = reference_of(checkpoint, "token", max_batch_size=8)
    options = ConversionOptions(form="token", backend="torchscript", instance_kind="cpu")
    (part,) = plan_parts("model", options)
    (tmp_path / "model.py").write_bytes(part.runner[0].read_bytes())
    write_part(tmp_path, part, checkpoint, options)
    with conversions_fork(), SubprocessModel(tmp_path) as model:
        replies = model.score(reference.requests, "cpu")
    report = compare(reference.cases, replies, reference.expected, "float32")
    assert report.ok, report.table()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"output": "logits"}, "holds no Python, and here is scored by code of its own"),
        ({"rules": {"separator_ids": (1, 2, 1)}}, "finds no separator whose end is its beginning again"),
    ],
)
def test_what_no_graph_holds_is_refused(changes: dict[str, Any], expected: str) -> None:
    checkpoint = trunk_with_head(1)
    if rules := changes.pop("rules", None):
        changes = {"rules": checkpoint.rules.model_copy(update=rules)}
    with pytest.raises(ConversionError, match=expected):
        check_graph(replace(checkpoint, **changes), "onnx")
