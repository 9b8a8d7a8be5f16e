"""Exported graphs, ONNX and TorchScript, score like Hugging Face by hand and in the server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.grpc as triton
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    GPT2Config,
    LlamaConfig,
    RobertaConfig,
)
from tritonclient.utils import InferenceServerException

from conch.config import RewardConfig
from conch.converters.backends.onnx import export_onnx
from conch.converters.backends.torchscript import export_torchscript
from conch.converters.parity.subprocess_model import SubprocessModel
from conch.converters.triton_models import graph_model as served
from conch.errors import ConversionError
from conch.rewards.served import TritonReward
from conch.serving.server.server import TritonServer
from conch.store.manifest import GOLDEN, MANIFEST, Golden, GoldenSample, Manifest, sha256_of
from conch.store.store import publish, staged_version
from conch.triton.channel import Access, open_client
from conch.triton.contract import Engine, RewardModelSpec
from conch.types import Completion, Prompt, Rollout

VOCABULARY, PAD, MAX_LENGTH = 40, 1, 12
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": 3}
CONFIGS = {
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=MAX_LENGTH, num_labels=2, **SPECIAL),
    "llama": LlamaConfig(**SHAPE, num_key_value_heads=1, num_labels=1, **SPECIAL),
    "bert": BertConfig(**SHAPE, max_position_embeddings=MAX_LENGTH, num_labels=1, **SPECIAL),
    "roberta": RobertaConfig(**SHAPE, max_position_embeddings=MAX_LENGTH + 2, num_labels=1, **SPECIAL),
    "deberta": DebertaV2Config(
        **SHAPE, relative_attention=True, pos_att_type=["c2p", "p2c"], num_labels=1, **SPECIAL
    ),
}
EXPORTS: dict[Engine, Callable[..., None]] = {"onnxruntime": export_onnx, "pytorch": export_torchscript}
PAIRS: list[tuple[Engine, str]] = [
    *(("onnxruntime", family) for family in CONFIGS),
    ("pytorch", "gpt2"),
    ("pytorch", "llama"),
]


class Logits(nn.Module):
    """A classifier as the exporters take it."""

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.classifier(input_ids=input_ids, attention_mask=attention_mask).logits


def classifier(family: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(CONFIGS[family]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@torch.inference_mode()
def alone(model: Any, ids: list[int]) -> list[float]:
    """The Hugging Face scores of one unpadded row."""
    row = torch.tensor([ids])
    return model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0].tolist()


def rows_of(lengths: list[int]) -> list[list[int]]:
    generator = np.random.default_rng(len(lengths))
    return [generator.integers(4, VOCABULARY, length).tolist() for length in lengths]


def padded(rows: list[list[int]], *, left: bool, fill: int) -> dict[str, list[list[int]]]:
    longest = max(len(row) for row in rows)
    ids, mask = [], []
    for row in rows:
        padding = longest - len(row)
        sides = (padding, 0) if left else (0, padding)
        ids.append([fill] * sides[0] + row + [fill] * sides[1])
        mask.append([0] * sides[0] + [1] * len(row) + [0] * sides[1])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model `<engine>-<family>` for each pair; its golden samples are Hugging Face's scores."""
    store = tmp_path_factory.mktemp("graphs") / "store"
    for engine, family in PAIRS:
        write_graph(store, engine, family)
    return store


def write_graph(store: Path, engine: Engine, family: str) -> None:
    model, name = classifier(family), f"{engine}-{family}"
    rewards = ("reward",) if model.config.num_labels == 1 else ("a", "b")
    with staged_version(store, name) as folder:
        limits = {"vocab_size": VOCABULARY, "max_length": MAX_LENGTH, "pad_token_id": PAD}
        EXPORTS[engine](Logits(model), folder, **limits)
        (folder / "model.py").write_text(Path(served.__file__).read_text())
        samples = tuple(
            GoldenSample(input_ids=tuple(row), scores=tuple(alone(model, row))) for row in rows_of([1, 5, 12])
        )
        (folder / GOLDEN).write_text(Golden(tolerance=1e-4, samples=samples).model_dump_json())
        manifest = Manifest(
            name=name,
            form="token",
            source="here",
            created_at="2026-01-01T00:00:00+00:00",
            template="{text}",
            reward_names=rewards,
            normalise=False,
            dtype="float32",
            tools={},
            files={path.name: sha256_of(path) for path in folder.iterdir()},
            **limits,
        )
        (folder / MANIFEST).write_text(manifest.model_dump_json())
        digest = sha256_of(folder / MANIFEST)
        spec = RewardModelSpec(
            name, "token", reward_names=rewards, max_length=MAX_LENGTH, content_sha256=digest, engine=engine
        )
        publish(folder, spec, store)


@pytest.mark.parametrize(("engine", "family"), PAIRS)
def test_graph_scores_like_hugging_face_in_every_batch_and_padding(
    store: Path, engine: Engine, family: str
) -> None:
    model = classifier(family)
    batches = [rows_of([length]) for length in range(1, MAX_LENGTH + 1)]
    batches += [rows_of([1 + index % MAX_LENGTH for index in range(size)]) for size in (2, 7, 32)]
    asked = [(rows, left, fill) for rows in batches for left in (False, True) for fill in (0, PAD)]
    with SubprocessModel(store / f"{engine}-{family}" / "1") as process:
        replies = process.score([padded(rows, left=left, fill=fill) for rows, left, fill in asked], "cpu")

    for (rows, _, _), reply in zip(asked, replies, strict=True):
        expected = [alone(model, row) for row in rows]
        np.testing.assert_allclose(reply["scores"], expected, atol=1e-5)


@pytest.mark.parametrize("engine", EXPORTS)
def test_the_bare_graph_needs_no_runner_for_padding(store: Path, engine: Engine) -> None:
    """As a production server calls it: padded by the client with 0, on either side."""
    model = classifier("gpt2")
    rows = rows_of([3, 12, 1, 7])
    make = {"onnxruntime": served.OnnxGraph, "pytorch": served.TorchScriptGraph}[engine]
    file = {"onnxruntime": served.ONNX_FILE, "pytorch": served.TORCHSCRIPT_FILE}[engine]
    graph = make(store / f"{engine}-gpt2" / "1" / file, "cpu")

    for left in (False, True):
        inputs = padded(rows, left=left, fill=0)
        scores = graph(np.array(inputs["input_ids"]), np.array(inputs["attention_mask"]))
        np.testing.assert_allclose(scores, [alone(model, row) for row in rows], atol=1e-5)


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[TritonServer]:
    with TritonServer(store, [f"{engine}-gpt2" for engine in EXPORTS]) as server:
        yield server


@pytest.mark.parametrize("engine", EXPORTS)
def test_the_trainers_client_scores_with_a_graph_like_with_any_model(
    server: TritonServer, engine: Engine
) -> None:
    model = classifier("gpt2")
    rows = rows_of([1, 12, 5, 5, 3])
    with TritonReward(server.endpoint(f"{engine}-gpt2"), RewardConfig()) as reward:
        reward.check()
        results = reward.submit([rollout(ids) for ids in rows]).result()
    for result, ids in zip(results, rows, strict=True):
        assert list(result.scores.values()) == pytest.approx(alone(model, ids), abs=1e-5)
        assert list(result.scores) == ["a", "b"]


def rollout(ids: list[int]) -> Rollout:
    text = " ".join(map(str, ids))
    return Rollout(Prompt(text, tuple(ids)), Completion("", (), (), "length"), policy_version=0)


@pytest.mark.parametrize(
    ("ids", "mask", "expected"),
    [
        ([[4] * (MAX_LENGTH + 1)], [[1] * (MAX_LENGTH + 1)], "has 13 tokens, at most 12"),
        ([[4, VOCABULARY]], [[1, 1]], r"outside 0\.\.39"),
        ([[4, -1]], [[1, 1]], r"outside 0\.\.39"),
        ([[4, 5]], [[0, 0]], "has no tokens"),
        ([[4, 5, 6]], [[1, 0, 1]], "has a hole"),
    ],
)
def test_a_bad_row_is_refused_as_the_callers_fault(server: TritonServer, ids, mask, expected: str) -> None:
    tensors = []
    for name, values in (("input_ids", ids), ("attention_mask", mask)):
        tensors.append(triton.InferInput(name, [1, len(values[0])], "INT64"))
        tensors[-1].set_data_from_numpy(np.array(values, dtype=np.int64))
    with open_client(server.url, Access()) as client:
        with pytest.raises(InferenceServerException, match=expected) as caught:
            client.infer("onnxruntime-gpt2", tensors, client_timeout=120.0)
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


class ReadsItsInput(nn.Module):
    """Decides by a value, which no graph can hold."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return input_ids.float() if input_ids.sum().item() > 3 else attention_mask.float()


def test_onnx_export_names_an_architecture_that_it_cannot_take(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"ReadsItsInput cannot be exported to ONNX .*--backend python"):
        export_onnx(ReadsItsInput(), tmp_path, vocab_size=9, max_length=8, pad_token_id=0)


def test_torchscript_export_says_that_it_is_deprecated(tmp_path: Path, caplog) -> None:
    export_torchscript(Logits(classifier("bert")), tmp_path, vocab_size=40, max_length=8, pad_token_id=1)
    assert "TorchScript is deprecated" in caplog.text
