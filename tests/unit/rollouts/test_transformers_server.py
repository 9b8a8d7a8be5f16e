"""A rollout server that samples with transformers: it samples what the trainer's own engine samples."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from conch.config import GenerationConfig, ModelConfig, RolloutConfig, load
from conch.errors import ConfigError, RolloutError
from conch.models.forward import ForwardInputs
from conch.models.policy import response_logits
from conch.ops import logprobs_of_labels
from conch.rollouts.base import draw_seeds
from conch.rollouts.hf.continuous_batching import draw_seeded, seeded_generator
from conch.rollouts.hf.engine import HFEngine
from conch.rollouts.hf.server import model_config_of
from conch.rollouts.hf.under_way import UnderWay
from conch.rollouts.protocol import GenerateRequest, PromptRequest
from conch.rollouts.remote.client import ServerClient
from conch.rollouts.remote.engine import RemoteEngine
from conch.rollouts.remote.pool import ServerPool
from conch.rollouts.server_config import ServerConfig
from conch.rollouts.stopping import with_end_ids
from conch.types import Completion, Prompt, Rollout
from tests.footprint import wait_until
from tests.runs import TOKENIZER as RUN_TOKENIZER
from tests.runs import grpo_trainer, policy, ppo_trainer
from tests.tiny import char_tokenizer, tiny_decoder
from tests.transformers_servers import ServedTransformers, served

LETTERS = "abcdefghijklmnopqrstu"
TOKENIZER = char_tokenizer(LETTERS)
TEXTS = ["a", "bcd", "bcd", "hgf", "aabbccd", "e", "e", "e", "kl", "b"]
FAMILIES = ["gpt2", "llama", "t5", "mistral"]  # the last two are sampled by `transformers.generate`


def model(family: str, seed: int = 0) -> PreTrainedModel:
    """Of other weights for another seed; the last family looks back 4 tokens only."""
    if family == "mistral":
        return tiny_decoder("llama", seed=seed, model_type="mistral", sliding_window=4)
    return tiny_decoder(family, seed=seed)


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(text, tuple(LETTERS.index(letter) for letter in text)) for text in texts]


@contextmanager
def engine_over(
    *servers: ServedTransformers,
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast = TOKENIZER,
    weights: str = "files",
    **generation: Any,
) -> Iterator[RemoteEngine]:
    """An engine of a trainer over servers."""
    urls = ",".join(server.address for server in servers)
    config = load(RolloutConfig, {"urls": urls, "weights": weights})
    pool = ServerPool(config, lambda: lm, source=f"run-{id(lm)}", sends_weights=True)
    settings = with_end_ids(GenerationConfig(**{"max_new_tokens": 6, **generation}), lm, tokenizer)
    with closing(pool):
        yield RemoteEngine(pool, tokenizer, settings, version=lambda: 3, deadline_s=60.0)


def all_of(engine: Any, given: list[Prompt], **settings: Any) -> list[Rollout]:
    return [rollout for chunk in engine.generate(given, **settings) for rollout in chunk]


def assert_alike(found: list[Rollout], wanted: list[Completion]) -> None:
    """The same ids, texts and ends; log-probs but for rounding of other batches."""
    for rollout, completion in zip(found, wanted, strict=True):
        same = ("text", "token_ids", "finish_reason")
        assert all(getattr(rollout.completion, each) == getattr(completion, each) for each in same)
        assert rollout.completion.logprobs == pytest.approx(completion.logprobs, abs=1e-6)


def in_process(
    lm: PreTrainedModel, given: list[Prompt], seeds: list[int], **generation: Any
) -> list[Completion]:
    """What the trainer's own engine samples for each prompt alone, after `torch.manual_seed`."""
    config = GenerationConfig(**{"max_new_tokens": 6, **generation})
    engine, completions = HFEngine(lambda: lm, TOKENIZER, config, version=lambda: 0), []
    for prompt, seed in zip(given, seeds, strict=True):
        torch.manual_seed(seed)
        completions += [rollout.completion for rollout in all_of(engine, [prompt])]
    return completions


@pytest.mark.parametrize("weights", ["files", "broadcast"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_completions_are_those_of_the_trainers_engine(family: str, weights: str) -> None:
    lm, given = model(family), prompts(*TEXTS)
    config = GenerationConfig(max_new_tokens=6)
    engine = HFEngine(lambda: lm, TOKENIZER, config, version=lambda: 0)
    wanted = [rollout.completion for rollout in all_of(engine, given, greedy=True)]
    with (
        served(model(family, seed=1), TOKENIZER) as server,
        engine_over(server, lm=lm, weights=weights) as remote,
    ):
        found = all_of(remote, given, greedy=True)
        assert_alike(found, wanted)
        assert {rollout.policy_version for rollout in found} == {3}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7, "top_k": 5},
        {"top_p": 0.8},
        {"stop": ("g",)},
        {"stop_token_ids": (3,), "max_new_tokens": 12},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_seeded_completions_are_those_of_the_trainers_engine(family: str, settings: dict[str, Any]) -> None:
    lm, given = model(family), prompts(*TEXTS)
    torch.manual_seed(5)
    seeds = draw_seeds(len(given))
    wanted = in_process(lm, given, seeds, **settings)
    with (
        served(model(family, seed=1), TOKENIZER, max_num_seqs=4) as server,
        engine_over(server, lm=lm, **settings) as remote,
    ):
        torch.manual_seed(5)
        assert_alike(all_of(remote, given), wanted)


def test_completions_do_not_depend_on_which_server_samples_them() -> None:
    lm, given, found = model("gpt2"), prompts(*TEXTS * 3), []
    with served(lm, TOKENIZER) as one, served(lm, TOKENIZER, max_num_seqs=3) as other:
        for servers in ((one,), (one, other)):
            with engine_over(*servers, lm=lm) as remote:
                torch.manual_seed(0)
                found.append([rollout.completion.token_ids for rollout in all_of(remote, given)])
    assert found[0] == found[1]
    assert len(set(found[0])) > len(TEXTS), "equal prompts have completions of their own"


def test_logprobs_are_those_of_the_distribution_that_was_drawn_from() -> None:
    lm, given = model("llama"), prompts(*TEXTS)
    with served(lm, TOKENIZER) as server, engine_over(server, lm=lm, temperature=0.7) as remote:
        for rollout in all_of(remote, given):
            response = rollout.completion.token_ids
            ids = torch.tensor([[*rollout.prompt.token_ids, *response]])
            inputs = ForwardInputs(ids, torch.ones_like(ids, dtype=torch.bool), len(response))
            with torch.no_grad():
                logprobs = logprobs_of_labels(response_logits(lm, inputs), torch.tensor([response]), 0.7)
            assert rollout.completion.logprobs == pytest.approx(logprobs[0].tolist(), abs=1e-6)


def test_a_row_draws_what_multinomial_draws_for_it_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (7, 50_257):
        probs = torch.randn(5, size, generator=generator).softmax(dim=-1)
        tokens = draw_seeded(probs, [seeded_generator(seed, probs.device) for seed in range(5)])
        for seed in range(5):
            torch.manual_seed(seed)
            assert int(tokens[seed]) == int(torch.multinomial(probs[seed : seed + 1], 1))


def test_frequencies_are_the_probabilities() -> None:
    probs = torch.tensor([0.5, 0.25, 0.15, 0.1]).expand(4000, 4).contiguous()
    tokens = draw_seeded(probs, [seeded_generator(seed, probs.device) for seed in range(4000)])
    shares = torch.bincount(tokens, minlength=4) / 4000
    assert torch.allclose(shares, probs[0], atol=4 * (0.25 / 4000) ** 0.5)


# ------------------------------------------------------------------------------------------- several at once


def test_requests_of_several_ranks_are_sampled_together() -> None:
    lm = model("gpt2")
    with served(lm, TOKENIZER, max_num_seqs=64) as server, engine_over(server, lm=lm) as remote:
        all_of(remote, prompts("a"))
        weights = remote._pool.weight_version(3)
        batches: list[list[Any]] = []
        sample = server.sampler._sample
        gate = threading.Event()

        def watched(requests: Any) -> None:
            batches.append(requests)
            gate.wait(60)
            sample(requests)

        server.sampler._sample = watched  # pyright: ignore[reportAttributeAccessIssue]
        generation = with_end_ids(GenerationConfig(max_new_tokens=6), lm, TOKENIZER)
        replies: list[list[Any]] = []

        def ask(seed: int, generation: GenerationConfig) -> None:
            prompt = PromptRequest(token_ids=(0, 1), seeds=(seed, seed + 100))
            request = GenerateRequest(
                weights=weights, generation=generation, greedy=False, eos_id=22, prompts=(prompt,)
            )
            with closing(ServerClient(server.address, 60.0)) as client:
                replies.append(list(client.completions(request)))

        colder = generation.model_copy(update={"temperature": 0.5})
        threads = [threading.Thread(target=ask, args=(seed, generation)) for seed in range(4)]
        threads.append(threading.Thread(target=ask, args=(9, colder)))
        for thread in threads:
            thread.start()
        sampler = server.sampler
        wait_until(
            lambda: len(sampler._jobs) + sum(map(len, batches)) == 5,
            lambda: f"{batches} of 5 requests have come",
        )
        gate.set()
        for thread in threads:
            thread.join(60)
        assert sorted(len(each) for each in replies) == [2] * 5
        assert len(batches) <= 3, "what is alike joins what is under way"


@pytest.mark.parametrize("slots", [2, 5, 64])
def test_prompts_that_join_are_sampled_as_if_they_were_alone(slots: int) -> None:
    lm, given = model("llama"), prompts(*TEXTS)
    seeds = [*range(len(given))]
    wanted = in_process(lm, given, seeds, max_new_tokens=8)
    config = GenerationConfig(max_new_tokens=8, chunk_size=slots)
    engine = HFEngine(lambda: lm, TOKENIZER, config, version=lambda: 0)
    later = [[*range(2, 3)], [], [], [*range(3, 9)], [], [9]]
    found: dict[int, Rollout] = {}

    def join(under_way: UnderWay) -> None:
        places = later.pop(0) if later else []
        under_way.add([given[place] for place in places], places)

    def note(ended: Mapping[int, Rollout]) -> None:
        assert not found.keys() & ended.keys()
        found.update(ended)

    engine.generate_joined(given[:2], seeds[:2], join, greedy=False, on_finished=note)
    assert [found[place].prompt for place in range(len(given))] == given
    assert_alike([found[place] for place in range(len(given))], wanted)


def test_request_joins_what_is_under_way() -> None:
    lm = model("gpt2")
    with served(lm, TOKENIZER, max_num_seqs=8) as server, engine_over(server, lm=lm) as remote:
        all_of(remote, prompts("a"))
        generation = with_end_ids(GenerationConfig(max_new_tokens=28), lm, TOKENIZER)
        sampler, ran, joined = server.sampler, threading.Event(), []
        take = sampler._jobs.take_joining

        def watched(*arguments: Any) -> Any:
            if arguments[0] != (generation, False):  # the last step of the rollout above
                return take(*arguments)
            ran.set()
            # What has come and may not join yet is looked at again in the next step.
            come = lambda: bool(joined or len(sampler._jobs))  # noqa: E731
            wait_until(come, lambda: "nothing comes")
            joined.extend(take(*arguments))
            return joined[-1:] if len(joined) == 1 else []

        sampler._jobs.take_joining = watched  # pyright: ignore[reportAttributeAccessIssue]
        replies: dict[int, list[Any]] = {}

        def ask(seed: int) -> None:
            prompt = PromptRequest(token_ids=(0, 1), seeds=(seed,))
            request = GenerateRequest(
                weights=remote._pool.weight_version(3),
                generation=generation,
                greedy=False,
                eos_id=22,
                prompts=(prompt,),
            )
            with closing(ServerClient(server.address, 60.0)) as client:
                replies[seed] = list(client.completions(request))

        first, second = (threading.Thread(target=ask, args=(seed,)) for seed in (1, 2))
        first.start()
        assert ran.wait(60)
        second.start()
        first.join(60)
        second.join(60)
        assert len(joined) == 1 and {seed: len(each) for seed, each in replies.items()} == {1: 1, 2: 1}


def test_failure_is_told_and_the_server_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    lm = model("gpt2")
    with served(lm, TOKENIZER) as server, engine_over(server, lm=lm) as remote:
        all_of(remote, prompts("a"))
        right = server.sampler._engine
        failures: list[int] = []

        def fail_once(generation: GenerationConfig) -> HFEngine:
            if not failures:
                failures.append(1)
                raise RuntimeError("no memory left")
            return right(generation)

        server.sampler._engine = fail_once  # pyright: ignore[reportAttributeAccessIssue]
        assert len(all_of(remote, prompts("a", "b"))) == 2
        assert failures and "transformers failed: no memory left" in caplog.text


# --------------------------------------------------------------------------------------------------- refusals


def test_other_models_weights_are_refused() -> None:
    for lm, complaint in (
        (
            tiny_decoder("gpt2", n_embd=48),
            r"has the shape .*, here .*: serve the policy's own",
        ),
        (tiny_decoder("llama"), r"not the weights of a GPT2LMHeadModel of this shape"),
        (tiny_decoder("gpt2", tie_word_embeddings=False), r"of this shape \(lm_head\.weight\)"),
    ):
        for weights in ("files", "broadcast"):
            with (
                served(model("gpt2"), TOKENIZER) as server,
                engine_over(server, lm=lm, weights=weights) as remote,
                pytest.raises(RolloutError, match=complaint),
            ):
                all_of(remote, prompts("a"))


def test_prompts_beyond_window_or_vocabulary_are_refused() -> None:
    lm = model("gpt2")
    with served(lm, TOKENIZER) as server:
        with (
            engine_over(server, lm=lm, max_new_tokens=30) as remote,
            pytest.raises(ConfigError, match=r"fit .* `max_model_len` of 32"),
        ):
            all_of(remote, prompts("abc"))
        with engine_over(server, lm=lm) as remote, pytest.raises(RolloutError, match="has token 99"):
            all_of(remote, [Prompt("", (99,))])
    with pytest.raises(ConfigError, match="`max_model_len` = 33 is longer than the model's window of 32"):
        served(lm, TOKENIZER, max_model_len=33).__enter__()


@pytest.mark.parametrize("setting", ["gpu_memory_utilization", "max_lora_rank", "tensor_parallel_size"])
def test_settings_of_vllm_are_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match=f"`{setting}` is a setting of vLLM"):
        load(
            ServerConfig,
            {"model": "x", "engine": "transformers", setting: 0.5 if "gpu" in setting else 1},
        )


# ------------------------------------------------------------------------------------------------------- runs


def test_experts_that_checkpoints_hold_apart_are_loaded() -> None:
    shape = {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_local_experts": 2,
        "max_position_embeddings": 32,
    }
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("mixtral", vocab_size=24, pad_token_id=21, eos_token_id=22, **shape)
    torch.manual_seed(0)
    lm, other = (AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
    engine = HFEngine(lambda: lm, TOKENIZER, GenerationConfig(max_new_tokens=6), version=lambda: 0)
    wanted = [rollout.completion for rollout in all_of(engine, prompts(*TEXTS), greedy=True)]
    with served(other, TOKENIZER) as server, engine_over(server, lm=lm) as remote:
        assert_alike(all_of(remote, prompts(*TEXTS), greedy=True), wanted)


@pytest.mark.parametrize("make", [ppo_trainer, grpo_trainer])
def test_run_learns_from_what_a_server_samples(make: Any, tmp_path: Path) -> None:
    with served(policy(seed=4), RUN_TOKENIZER) as server:
        trainer = make(tmp_path, rollout={"urls": server.address}, optimizer={"learning_rate": 0.01})
        for _ in range(3):
            metrics = trainer.step()
            assert metrics["rollout/logprob_diff"] < 1e-6, "it samples from the policy as it is"
        trainer.close()


def test_model_is_the_one_that_the_settings_name() -> None:
    settings: dict[str, Any] = {"revision": "v2", "trust_remote_code": True, "dtype": "bfloat16"}
    config = ServerConfig(model="some/model", engine="transformers", **settings)
    assert model_config_of(config) == ModelConfig(path="some/model", **settings)
