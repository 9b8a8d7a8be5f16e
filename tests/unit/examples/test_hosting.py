"""What the examples share: who hosts a reward model, and the tokenizer of models that start from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conch.config import ModelConfig, RewardConfig, TokenizerConfig, load
from conch.errors import ConfigError, ConversionError, ServerStartError
from examples.byte_pairs import tokenizer_for
from examples.hosting import HostedConfig, last_gpu, launchers_note, served_reward, tell

HOSTED = HostedConfig(name="reward", checkpoint="somewhere")


def test_a_server_that_is_named_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_HOST", "one:8001/a")
    with served_reward(RewardConfig(), HOSTED) as endpoint:
        assert endpoint == "one:8001/a"
    with served_reward(RewardConfig(url="two:8001/b"), HOSTED) as endpoint:
        assert endpoint == "two:8001/b"


@pytest.mark.parametrize("key", ["function", "verifier", "members", "judge"])
def test_another_reward_is_refused_and_not_left_aside(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_HOST", "one:8001/a")
    values: dict[str, Any] = {
        "function": "rewards.py:score",
        "verifier": "gsm8k",
        "members": {"a": "one:8001/a"},
        "judge": {"file": "judge.yaml"},
    }
    config = load(RewardConfig, {key: values[key]})
    with pytest.raises(ConfigError, match=rf"`reward\.{key}` is no server"), served_reward(config, HOSTED):
        pass


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of one of two processes on one machine, which nobody told of a server."""
    monkeypatch.delenv("TRITON_HOST", raising=False)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    return monkeypatch


def test_a_run_on_several_machines_needs_a_server_that_is_named(two_processes: pytest.MonkeyPatch) -> None:
    two_processes.setenv("WORLD_SIZE", "4")
    with (
        pytest.raises(ServerStartError, match="set TRITON_HOST"),
        served_reward(RewardConfig(), HOSTED),
    ):
        pass


def test_a_process_that_does_not_host_takes_the_endpoint_that_the_first_left(
    two_processes: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    two_processes.setattr("tempfile.tempdir", str(tmp_path))
    two_processes.setenv("LOCAL_RANK", "1")
    tell(launchers_note(), "localhost:9/reward")
    with served_reward(RewardConfig(), HOSTED) as endpoint:
        assert endpoint == "localhost:9/reward"
    assert launchers_note().is_file(), "other processes may not have read it yet"


def test_the_first_process_says_why_it_cannot_host(two_processes: pytest.MonkeyPatch, tmp_path: Path) -> None:
    two_processes.setenv("LOCAL_RANK", "0")
    hosted = HostedConfig(name="reward", checkpoint=str(tmp_path / "nowhere"), model_store=tmp_path / "store")
    with pytest.raises(ConversionError, match="nowhere"), served_reward(RewardConfig(), hosted):
        pass


def test_the_last_visible_gpu_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert last_gpu() == "7"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert last_gpu() == "5"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert last_gpu() == ""


def test_the_small_tokenizer_is_the_same_each_time_and_gives_text_back() -> None:
    model = ModelConfig(architecture={"model_type": "gpt2", "vocab_size": 300})
    texts = ["Human: a?" + " größer", "Human: human: abc"] * 3
    one, other = (tokenizer_for(model, TokenizerConfig(), texts) for _ in range(2))
    assert one.get_vocab() == other.get_vocab()
    assert len(one) <= 300
    assert (one.pad_token_id, one.eos_token_id) == (0, 1)
    ids = one("Human: a?\n\n größer 山")["input_ids"]
    assert one.decode(ids) == "Human: a?\n\n größer 山"
