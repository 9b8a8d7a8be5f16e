"""Every kind of checkpoint through the real converter and the real server, which `--verify` then asks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.grpc as triton
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification
from tritonclient.utils import InferenceServerException

from conch.converters.to_triton import main
from conch.serving.server.server import TritonServer
from conch.store.store import read_model
from conch.triton.channel import Access, open_client
from tests.checkpoints import (
    EOS,
    PAD,
    base_model,
    classifier,
    process_reward,
    save_value_head,
    tokenizer_for,
    value_head_tensors,
)

DEADLINE_S = 120.0
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] }}:{{ message['content'] }};{% endfor %}<eos>"
)

ARGUMENTS: dict[str, list[str]] = {
    "encoder": ["--dtype", "bfloat16"],
    "value-head": ["--base-model", "base", "--template", "{prompt}{output}{eos}"],
    "adapter": ["--form", "token", "--normalise", "fold"],
    "steps": ["--step_separator", ";", "--aggregate=prod"],
    "chat": ["--template", "chat", "--truncation_side", "left"],
}
"""Name in the store -> how it is converted; the checkpoints are folders of the same name."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kinds")


def command(folder: Path, name: str, *more: str) -> list[str]:
    arguments = [str(folder / "base") if argument == "base" else argument for argument in ARGUMENTS[name]]
    return ["--checkpoint", str(folder / name), *arguments, *more, "--quiet"]


@pytest.fixture(scope="module")
def store(folder: Path) -> Path:
    """All of them, converted by the command."""
    classifier(folder / "encoder", "deberta-v2", num_labels=2, id2label={0: "kind", 1: "true"})
    base = base_model(folder / "base", "gptj")
    save_value_head(folder / "value-head", value_head_tensors(base), "pt")
    save_adapter(folder)
    process_reward(folder / "steps", "qwen2")
    classifier(folder / "chat", "llama", dtype="bfloat16")
    tokenizer = tokenizer_for("llama")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder / "chat")
    for name in ARGUMENTS:
        assert main(command(folder, name, "--model_store", str(folder / "store"))) == 0
    return folder / "store"


def save_adapter(folder: Path) -> None:
    base_model(folder / "adapters-base", "opt")
    config = AutoConfig.from_pretrained(folder / "adapters-base", num_labels=1, pad_token_id=PAD)
    base = AutoModelForSequenceClassification.from_pretrained(folder / "adapters-base", config=config)
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type=TaskType.SEQ_CLS)
    get_peft_model(base, lora).save_pretrained(folder / "adapter")
    told = {"mean": 0.5, "std": 2.0, "max_length": 20}
    (folder / "adapter" / "reward_model.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[TritonServer]:
    with TritonServer(store, list(ARGUMENTS), ready_timeout_s=300.0) as server:
        yield server


def score(server: TritonServer, model: str, text: str) -> np.ndarray:
    tensor = triton.InferInput("text", [1, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[text.encode()]], dtype=np.object_))
    with open_client(server.url, Access()) as client:
        scores = client.infer(model, [tensor], client_timeout=DEADLINE_S).as_numpy("rewards")
    assert scores is not None
    return scores[0]


# peft asks transformers by the older name when it wraps a model.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.parametrize("name", ARGUMENTS)
def test_verify_finds_the_server_to_score_like_the_checkpoint(
    server: TritonServer, folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(folder, name, "--verify", server.endpoint(name))) == 0
    table = capsys.readouterr().out
    assert "batch of 32" in table and "alone against in a batch" in table and "mean diff" in table
    assert ("padded on the left" in table) == (name == "adapter")


def test_verify_tells_a_server_that_scores_otherwise(
    server: TritonServer, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Folded means and raw ones differ."""
    arguments = ["--checkpoint", str(folder / "adapter"), "--verify", server.endpoint("adapter"), "--quiet"]
    assert main(arguments) == 2
    assert "NOT like" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [("{url}/nowhere", "model 'nowhere' cannot be asked"), ("nowhere", "give host:port/model")],
)
def test_verify_says_what_is_wrong_with_the_address(
    server: TritonServer, folder: Path, capsys: pytest.CaptureFixture[str], endpoint: str, expected: str
) -> None:
    assert main(command(folder, "chat", "--verify", endpoint.format(url=server.url))) == 1
    assert expected in capsys.readouterr().err


def test_a_value_head_is_read_at_the_first_eos(server: TritonServer, folder: Path) -> None:
    """What comes after it does not count: prompt and output are one text, which the template closes."""
    assert score(server, "value-head", "abc")[0] != pytest.approx(
        score(server, "value-head", "abd")[0], abs=1e-3
    )
    assert score(server, "value-head", "abc<eos>dq")[0] == pytest.approx(
        score(server, "value-head", "abc")[0], abs=1e-5
    )


def test_chat_scores_messages_and_refuses_what_is_none(server: TritonServer, folder: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder / "chat", dtype=torch.float32).eval()
    ids = tokenizer_for("llama")("u:abc;a:dd;<eos>", add_special_tokens=False).input_ids
    with torch.inference_mode():
        right = model(torch.tensor([ids])).logits.item()
    messages = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "dd"}]

    assert ids[-1] == EOS
    assert score(server, "chat", json.dumps(messages))[0] == pytest.approx(right, abs=1e-5)
    with pytest.raises(InferenceServerException, match="no JSON list of messages") as caught:
        score(server, "chat", "abc")
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_the_manifest_records_how_the_model_was_made(store: Path) -> None:
    def recorded(name: str) -> dict[str, Any]:
        return read_model(store, name).manifest.model_dump()

    value_head, steps, adapter = recorded("value-head"), recorded("steps"), recorded("adapter")
    assert (value_head["pooling"], value_head["base_model"]) == ("first_eos", "base")
    assert (steps["pooling"], steps["aggregate"], steps["columns"]) == ("steps", "prod", (1,))
    assert (adapter["folded"], adapter["normalise"], adapter["max_length"]) == (True, False, 20)
    assert recorded("encoder")["reward_names"] == ("kind", "true")
    assert recorded("chat")["truncation_side"] == "left"
    parity = recorded("encoder")["parity"]
    assert 0 < parity["mean_difference"] < parity["max_difference"]
