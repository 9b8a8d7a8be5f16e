"""An adapter that vLLM is handed by itself, on a base that it was given once, samples as the trainer does."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from conch.config import GenerationConfig, RolloutConfig
from conch.errors import ModelError
from conch.models.adapter import add_adapter
from conch.rollouts.hf.engine import HFEngine
from conch.rollouts.protocol import Health, WeightUpdate, WeightVersion
from conch.rollouts.remote.client import ServerClient, StaleWeightsError
from conch.rollouts.server_config import ServerConfig
from conch.rollouts.vllm import server as vllm_server
from conch.rollouts.vllm.engine import ColocatedVLLM, VLLMEngine
from conch.rollouts.weight_sync import adapter_tensors, checkpoint_tensors
from tests.launches import free_port
from tests.vllm.conftest import CACHE_BYTES, prompts, trainers_logprobs
from tests.vllm.test_colocated import TEXTS, all_of, assert_alike
from tests.vllm.test_served import READY_S, ServerProcess, engine_of, pool_of, wait_until

SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"]},
    "qwen2": {
        "r": 8,
        "lora_alpha": 5,
        "use_rslora": True,
        "target_modules": "all-linear",
        "rank_pattern": {"k_proj": 3, "layers.1.self_attn.q_proj": 9},
        "alpha_pattern": {"up_proj": 20},
    },
}
SPREAD = 0.3
"""Of the adapter's numbers: large enough that most completions change with it."""


def make_adapted(family: str, tokenizer: PreTrainedTokenizerFast, **settings: Any) -> PreTrainedModel:
    """A random model with heads of 32, and an adapter on it that is not zero."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=160,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=family == "qwen2",
    )
    lm = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    add_adapter(lm, {**SETTINGS[family], **settings}, merged_when_saved=True)
    move_adapter(lm, 0)
    return lm


@torch.no_grad()
def move_adapter(lm: PreTrainedModel, seed: int) -> None:
    """To random numbers."""
    torch.manual_seed(seed)
    for name, parameter in lm.named_parameters():
        if ".lora_" in name:
            parameter.copy_(torch.randn_like(parameter) * SPREAD)


def assert_sampled_from(lm: PreTrainedModel, engine: Any, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Greedy completions are those of transformers with the adapter, log-probs the trainer's; gives texts."""
    given = prompts(tokenizer, *TEXTS, "abcdefghij" * 8, "abcdefghij" * 8 + "k")  # with blocks to cache
    config = GenerationConfig(max_new_tokens=24)
    found = all_of(engine, given, greedy=True)
    own = HFEngine(lambda: lm, tokenizer, config, version=lambda: 0)
    assert_alike(found, all_of(own, given, greedy=True))
    for rollout in all_of(engine, given):
        logprobs = torch.tensor(rollout.completion.logprobs)
        torch.testing.assert_close(logprobs, trainers_logprobs(lm, rollout), atol=1e-4, rtol=0)
    return [rollout.completion.text for rollout in found]


# ------------------------------------------------------------------------------------------ in this process


class Colocated:
    """A policy with an adapter, vLLM beside it, and the names of the tensors that it loads."""

    def __init__(
        self, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, merge_adapter: bool | None = False
    ) -> None:
        self.lm = lm
        self.version = 0
        config = RolloutConfig(engine="vllm", kv_cache_memory_bytes=CACHE_BYTES, merge_adapter=merge_adapter)
        self.vllm = ColocatedVLLM(lambda: lm, config, torch.float32, several_ranks=False)
        generation = GenerationConfig(max_new_tokens=24)
        self.engine = VLLMEngine(self.vllm, tokenizer, generation, version=lambda: self.version)
        self.handed_over: list[set[str]] = []
        tensors = self.vllm._weights.tensors

        def watched(part: Any) -> Any:
            given = tensors(part)
            self.handed_over.append(set(given))
            return given

        self.vllm._weights.tensors = watched  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture
def colocate(tokenizer: PreTrainedTokenizerFast) -> Iterator[Callable[..., Colocated]]:
    made: list[Colocated] = []

    def make(lm: PreTrainedModel, **settings: Any) -> Colocated:
        made.append(Colocated(lm, tokenizer, **settings))
        return made[-1]

    yield make
    for each in made:
        each.vllm.close()


@pytest.mark.parametrize("family", SETTINGS)
def test_adapter_alone_is_handed_over_and_sampled_from_after_every_update(
    family: str, tokenizer: PreTrainedTokenizerFast, colocate: Callable[..., Colocated]
) -> None:
    lm = make_adapted(family, tokenizer)
    both = colocate(lm)
    before = assert_sampled_from(lm, both.engine, tokenizer)
    base, adapter = both.handed_over
    assert "model.embed_tokens.weight" in base and not any("lora_" in name for name in base)
    assert adapter and all("lora_" in name for name in adapter)
    move_adapter(lm, 1)
    both.version = 1
    after = assert_sampled_from(lm, both.engine, tokenizer)
    assert both.handed_over[2:] == [adapter]
    assert sum(one != other for one, other in zip(before, after, strict=True)) > 3
    rollouts = all_of(both.engine, prompts(tokenizer, "a"))
    assert [rollout.policy_version for rollout in rollouts] == [1] and len(both.handed_over) == 3


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "model.layers.0.self_attn.q_proj adds more than a product (DoraLinear"),
        (
            {"target_modules": ["q_proj", "lm_head"]},
            "has no LoRA for lm_head of a LlamaForCausalLM",
        ),
    ],
)
def test_policy_whose_adapter_vllm_cannot_take_is_handed_over_whole(
    settings: dict[str, Any],
    reason: str,
    tokenizer: PreTrainedTokenizerFast,
    colocate: Callable[..., Colocated],
    caplog: pytest.LogCaptureFixture,
) -> None:
    lm = make_adapted("llama", tokenizer, **settings)
    with caplog.at_level(logging.INFO, "conch"):
        both = colocate(lm)
        assert_sampled_from(lm, both.engine, tokenizer)
        move_adapter(lm, 1)
        both.version = 1
        assert_sampled_from(lm, both.engine, tokenizer)
    assert both.handed_over[0] == both.handed_over[1] > {"model.embed_tokens.weight"}
    (message,) = [each for each in caplog.messages if "merged in" in each]
    assert reason in message


def test_adapter_is_merged_on_a_cpu_unless_it_is_told_otherwise(
    tokenizer: PreTrainedTokenizerFast,
    colocate: Callable[..., Colocated],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "conch"):
        both = colocate(make_adapted("llama", tokenizer), merge_adapter=None)
    assert_sampled_from(both.lm, both.engine, tokenizer)
    assert "model.embed_tokens.weight" in both.handed_over[0]
    assert "`rollout.merge_adapter` is true, or left out in a process on a CPU" in caplog.text


# ----------------------------------------------------------------------------------------------- on a server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Iterator[Any]:
    """One with room for adapters, that holds no weights of the policy."""
    folder = tmp_path_factory.mktemp("served")
    make_adapted("llama", tokenizer).config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    names = SETTINGS["llama"]["target_modules"]
    running = ServerProcess(folder, free_port(), "max_lora_rank=6", f"lora_target_modules={names}")
    try:
        wait_until_ready(running)
        yield running
    finally:
        if running.process.poll() is None:
            running.stop()


def wait_until_ready(server: ServerProcess) -> None:
    client = ServerClient(server.address, READY_S)
    wait_until(client.health)
    client.close()


class Served:
    """A policy, an engine over the server, and what that is given: its part and the tensors' names."""

    def __init__(
        self,
        server: ServerProcess,
        tokenizer: PreTrainedTokenizerFast,
        *,
        weights: Literal["broadcast", "files"],
        **settings: Any,
    ) -> None:
        self.lm = lm = make_adapted("llama", tokenizer, **settings)
        self.version = 0
        self._tokenizer = tokenizer
        self.pool = pool_of(server, lm=lm, weights=weights)
        self.engine = engine_of(self.pool, tokenizer, lambda: self.version)
        self.given: list[tuple[str, set[str]]] = []
        update_weights = self.pool.servers[0].client.update_weights

        def watched(given: WeightUpdate) -> Health:
            names = (
                {spec.name for spec in given.tensors} if given.path is None else set(load_file(given.path))
            )
            self.given.append((given.part, names))
            return update_weights(given)

        self.pool.servers[0].client.update_weights = watched  # pyright: ignore[reportAttributeAccessIssue]

    def assert_sampled_from(self) -> list[str]:
        """Gives texts."""
        return assert_sampled_from(self.lm, self.engine, self._tokenizer)

    def update(self, seed: int) -> None:
        move_adapter(self.lm, seed)
        self.version += 1

    def parts(self) -> list[str]:
        return [part for part, _ in self.given]


@pytest.fixture
def serve(server: ServerProcess, tokenizer: PreTrainedTokenizerFast) -> Iterator[Callable[..., Served]]:
    """Makes a policy that the server samples from; closes what it has opened."""
    made: list[Served] = []

    def make(**settings: Any) -> Served:
        made.append(Served(server, tokenizer, **settings))
        return made[-1]

    yield make
    for each in made:
        each.pool.close()


@pytest.mark.parametrize("weights", ["broadcast", "files"])
def test_server_samples_from_the_adapter_after_every_update(
    weights: str, serve: Callable[..., Served]
) -> None:
    served = serve(weights=weights)
    before = served.assert_sampled_from()
    served.update(seed=1)
    after = served.assert_sampled_from()
    assert served.parts() == ["base", "adapter", "adapter"]
    assert served.given[0][1] == set(checkpoint_tensors(served.lm))
    assert all(names == set(adapter_tensors(served.lm)) for _, names in served.given[1:])
    assert sum(one != other for one, other in zip(before, after, strict=True)) > 3


def test_killed_server_gets_base_and_adapter_when_it_is_back(
    server: ServerProcess, serve: Callable[..., Served]
) -> None:
    served = serve(weights="broadcast")
    served.assert_sampled_from()
    server.kill()
    server.start()
    wait_until_ready(server)
    served.update(seed=2)
    served.assert_sampled_from()
    assert served.parts() == ["base", "adapter"] * 2
    health = served.pool.servers[0].client.health()
    assert (
        health.weights == served.pool.weight_version(1)
        and health.base == served.pool.weight_version(1).source
    )


def test_server_gets_a_policy_whole_that_it_has_no_room_for(serve: Callable[..., Served]) -> None:
    small = serve(weights="files")
    small.assert_sampled_from()
    assert small.parts() == ["base", "adapter"]
    large = serve(weights="files", r=9)  # vLLM's next size above 6 is 8
    large.assert_sampled_from()
    assert large.parts() == ["whole"]
    assert large.pool.servers[0].client.health().base is None


def test_adapter_of_a_base_that_is_not_there_is_refused(
    server: ServerProcess, serve: Callable[..., Served]
) -> None:
    served = serve(weights="broadcast")
    served.assert_sampled_from()
    client = ServerClient(server.address, READY_S)
    with pytest.raises(StaleWeightsError, match="the base of another is not here"):
        client.update_weights(
            WeightUpdate(weights=WeightVersion(source="another", version=0), part="adapter", path="/nowhere")
        )
    client.close()
    served.assert_sampled_from()
    assert served.parts() == ["base", "adapter"]  # what it held it holds still


def test_room_for_adapters_of_a_model_that_takes_none_is_refused(tmp_path: Path, lm: PreTrainedModel) -> None:
    lm.config.architectures = [type(lm).__name__]
    lm.config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="vLLM has no LoRA for a GPT2LMHeadModel: leave `max_lora_rank` out"):
        vllm_server.build_engine(ServerConfig(model=str(tmp_path), max_lora_rank=4))
