"""`conch-to-triton --backend onnx|torchscript`: converted, compared, and served by the bundled server."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import tritonclient.grpc as triton
from transformers import GPT2ForSequenceClassification
from tritonclient.utils import InferenceServerException

from conch.config import RewardConfig
from conch.converters.to_triton import main, to_triton
from conch.errors import ConversionError
from conch.rewards.served import TritonReward
from conch.serving.server.server import TritonServer
from conch.store.store import list_models, read_model, verify_files
from conch.triton.channel import Access, open_client
from conch.triton.config_pbtxt import spec_from_model_config
from conch.types import Completion, Prompt, Rollout
from tests.stores import store_model
from tests.tiny import reward_checkpoint

LETTERS = "abcdefghijklmnopqrstu"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reward_checkpoint(
        tmp_path_factory.mktemp("checkpoint"), reward_model={"max_length": 12, "mean": 0.5, "std": 2.0}
    )


def test_both_back_ends_publish_what_scores_like_the_checkpoint(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, names = tmp_path / "store", ("onnx", "torchscript")
    for backend in names:
        arguments = ["--checkpoint", str(checkpoint), "--name", backend, "--model-store", str(store)]
        more = ["--form", "token", "--backend", backend, "--normalise", "parameters"]
        more += ["--instance-kind", "cpu"]
        assert main([*arguments, *more]) == 0
        assert "padded on the left" in capsys.readouterr().out
    engines = {name: read_model(store, name).spec.engine for name in names}
    assert engines == {"onnx": "onnxruntime", "torchscript": "pytorch"}
    for name, weights in (("onnx", "model.onnx"), ("torchscript", "model.pt")):
        model = read_model(store, name)
        verify_files(model)
        assert weights in model.manifest.files and "model.safetensors" not in model.manifest.files

    original = GPT2ForSequenceClassification.from_pretrained(checkpoint).eval()
    rows = [list(range(length)) for length in (1, 3, 12)]
    with torch.inference_mode():
        expected = [(original(torch.tensor([row])).logits.item() - 0.5) / 2.0 for row in rows]
    with TritonServer(store, names) as server:
        for name in names:
            with TritonReward(server.endpoint(name), RewardConfig()) as reward:
                results = reward.submit([rollout(row) for row in rows]).result()
            assert [result.scores["reward"] for result in results] == pytest.approx(expected, abs=1e-5)


def test_text_form_joins_a_tokenizer_and_the_graph(checkpoint: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    dry = to_triton(checkpoint, name="walks", model_store=store, backend="onnx", dry_run=True)
    assert (dry.path, store.exists()) == (None, False)
    conversion = to_triton(checkpoint, name="walks", model_store=store, backend="onnx")
    assert list_models(store) == ["walks", "walks-onnx", "walks-tokenizer"]
    assert {result.name for result in conversion.parity.results} >= {
        "empty text",
        "odd text",
        "too long, cut",
    }

    original = GPT2ForSequenceClassification.from_pretrained(checkpoint).eval()
    unknown, eos = 23, 22
    samples = {"": [], "abc": [0, 1, 2], "a漢": [0, unknown], LETTERS: list(range(11))}
    with torch.inference_mode():
        expected = [original(torch.tensor([[*ids, eos]])).logits.item() for ids in samples.values()]
    with TritonServer(store, ["walks"]) as server:
        with TritonReward(server.endpoint("walks"), RewardConfig()) as reward:
            reward.check()
            results = reward.submit([text_rollout(text) for text in samples]).result()
        with open_client(server.url, Access()) as client:
            assert spec_from_model_config(client.get_model_config("walks").config) == conversion.spec
            tensor = triton.InferInput("text", [1, 1], "BYTES")
            tensor.set_data_from_numpy(np.array([[b"\xff"]], dtype=np.object_))
            with pytest.raises(InferenceServerException, match="row 0: text is not UTF-8"):
                client.infer("walks", [tensor], client_timeout=120.0)
    assert [result.scores["reward"] for result in results] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("part", ["walks", "walks-onnx", "walks-tokenizer"])
def test_text_form_takes_no_name_of_another_model(checkpoint: Path, tmp_path: Path, part: str) -> None:
    store_model(tmp_path / "store", part)
    with pytest.raises(ConversionError, match=f"model '{part}' in .* was made from other weights"):
        to_triton(checkpoint, name="walks", model_store=tmp_path / "store", backend="onnx")
    assert list_models(tmp_path / "store") == [part]


def text_rollout(text: str) -> Rollout:
    return Rollout(Prompt(text, ()), Completion("", (), (), "length"), policy_version=0)


def rollout(ids: list[int]) -> Rollout:
    text = "".join(LETTERS[token] for token in ids)
    return Rollout(Prompt(text, tuple(ids)), Completion("", (), (), "length"), policy_version=0)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"form": "token", "backend": "torchscript"},
            "traced, which is --device cpu: add --instance_kind cpu",
        ),
        ({"form": "text", "backend": "torchscript"}, "serves token ids: add --form token"),
        ({"template": "chat"}, "no chat template"),
        ({"form": "token", "dtype": "bfloat16"}, "takes --dtype float32 or float16, not bfloat16"),
    ],
)
def test_what_no_graph_can_be_is_refused_and_nothing_written(
    checkpoint: Path, tmp_path: Path, settings, expected: str
) -> None:
    with pytest.raises(ConversionError, match=expected):
        to_triton(checkpoint, name="m", model_store=tmp_path / "store", **{"backend": "onnx", **settings})
    assert not (tmp_path / "store").exists()
