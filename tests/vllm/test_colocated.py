"""vLLM in the trainer's process samples what `transformers.generate` does from the same weights."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pydantic import ByteSize
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from conch.config import GenerationConfig, RolloutConfig
from conch.errors import ConfigError, ModelError, RolloutError
from conch.rollouts.hf.engine import HFEngine
from conch.rollouts.vllm.engine import ColocatedVLLM, VLLMEngine
from conch.types import Prompt, Rollout
from tests.vllm.conftest import make_lm, prompts, trainers_logprobs

VERSIONS = itertools.count(1)
"""Each test takes one of its own, so that it gets the weights as they are then."""


class Both:
    """The same policy behind both engines."""

    def __init__(
        self, lm: GPT2LMHeadModel, vllm: ColocatedVLLM, tokenizer: PreTrainedTokenizerFast, **generation: Any
    ) -> None:
        config = GenerationConfig(**{"max_new_tokens": 24, "chunk_size": 5, **generation})
        self.lm = lm
        self.config = config
        self.tokenizer = tokenizer
        self.version = next(VERSIONS)
        self.hf = HFEngine(lambda: lm, tokenizer, config, version=lambda: self.version)
        self.vllm = VLLMEngine(vllm, tokenizer, config, version=lambda: self.version)

    def prompts(self, *texts: str) -> list[Prompt]:
        return prompts(self.tokenizer, *texts)


@pytest.fixture
def both(lm: GPT2LMHeadModel, colocated: ColocatedVLLM, tokenizer: PreTrainedTokenizerFast) -> Any:
    return lambda **generation: Both(lm, colocated, tokenizer, **generation)


def all_of(engine: Any, prompts: Sequence[Prompt], seed: int = 0, **settings: Any) -> list[Rollout]:
    torch.manual_seed(seed)
    return [rollout for chunk in engine.generate(prompts, **settings) for rollout in chunk]


TEXTS = ("a", "bc", "a b c", "tsrq", "hhhhhhhh", "a", "klm nop")


def assert_alike(found: Sequence[Rollout], wanted: Sequence[Rollout]) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.prompt == theirs.prompt
        assert ours.completion.token_ids == theirs.completion.token_ids
        assert ours.completion.text == theirs.completion.text
        assert ours.completion.finish_reason == theirs.completion.finish_reason
        assert ours.completion.logprobs == pytest.approx(theirs.completion.logprobs, abs=1e-4)


@pytest.mark.parametrize("stop", [(), ("g",), ("kh", "b")])
def test_greedy_completions_are_those_of_transformers(both: Any, stop: tuple[str, ...]) -> None:
    pair = both(stop=stop)
    prompts = pair.prompts(*TEXTS)
    found = all_of(pair.vllm, prompts, greedy=True)
    assert_alike(found, all_of(pair.hf, prompts, greedy=True))
    assert {rollout.policy_version for rollout in found} == {pair.version}


def test_some_completion_ends_at_each_end(both: Any) -> None:
    """Else the comparison above would say little."""
    free, stopped = both(), both(stop=("g", "kh", "b"))
    reasons = {each.completion.finish_reason for each in all_of(free.vllm, free.prompts(*TEXTS * 4))}
    reasons |= {each.completion.finish_reason for each in all_of(stopped.vllm, stopped.prompts(*TEXTS))}
    assert reasons == {"eos", "length", "stop"}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_trainer(both: Any, temperature: float) -> None:
    pair = both(temperature=temperature)
    for rollout in all_of(pair.vllm, pair.prompts(*TEXTS)):
        wanted = trainers_logprobs(pair.lm, rollout, temperature)
        torch.testing.assert_close(torch.tensor(rollout.completion.logprobs), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shaping", [{"top_k": 1}, {"top_p": 1e-6}])
def test_logprobs_are_of_the_distribution_that_was_cut(both: Any, shaping: dict[str, Any]) -> None:
    pair = both(**shaping)
    found = all_of(pair.vllm, pair.prompts(*TEXTS))
    assert {logprob for each in found for logprob in each.completion.logprobs} == {0.0}
    greedy = all_of(both().vllm, pair.prompts(*TEXTS), greedy=True)
    assert [each.completion.token_ids for each in found] == [each.completion.token_ids for each in greedy]


def test_stop_strings_are_cut_as_transformers_engine_cuts_them(both: Any) -> None:
    pair = both(stop=("g", "kh", "b"))
    for rollout in all_of(pair.vllm, pair.prompts(*TEXTS * 3)):
        found = rollout.completion
        made = pair.hf._stop_condition.completion(rollout.prompt.token_ids, found.token_ids, found.logprobs)
        assert made.token_ids == found.token_ids and made.text == found.text
        assert not any(stop in rollout.completion.text for stop in pair.config.stop)


def test_nothing_is_sampled_behind_a_stop_string(both: Any, colocated: ColocatedVLLM) -> None:
    pair = both(stop=("g",), max_new_tokens=100)
    colocated.update_weights(pair.version)
    ended: list[int] = []
    sample = colocated.sample

    def watched(*arguments: Any) -> Any:
        for sampled in sample(*arguments):
            yield sampled
            stopped = [each.token_ids for each in sampled.values() if 6 in each.token_ids]  # a "g"
            ended.extend(ids.index(6) - len(ids) for ids in stopped)

    colocated.sample = watched  # pyright: ignore[reportAttributeAccessIssue]
    try:
        all_of(pair.vllm, pair.prompts(*TEXTS))
    finally:
        colocated.sample = sample  # pyright: ignore[reportAttributeAccessIssue]
    assert set(ended) == {-1}


def test_samples_of_a_prompt_differ_and_a_run_repeats(both: Any) -> None:
    pair = both()
    prompts = pair.prompts(*["a b"] * 8, *["c"] * 8)
    first, again, other = (all_of(pair.vllm, prompts, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert len({rollout.completion.token_ids for rollout in first[:8]}) > 4


def test_frequencies_are_the_probabilities(both: Any) -> None:
    pair = both(max_new_tokens=1)
    prompt = pair.prompts("a b")[0]
    found = [each.completion.token_ids[0] for each in all_of(pair.vllm, [prompt] * 2000)]
    with torch.no_grad():
        wanted = pair.lm(torch.tensor([prompt.token_ids])).logits[0, -1].softmax(-1)
    shares = torch.bincount(torch.tensor(found), minlength=len(wanted)) / len(found)
    assert (shares - wanted).abs().max() < 4 * (0.25 / len(found)) ** 0.5


def test_prompt_of_a_group_is_computed_once(both: Any, colocated: ColocatedVLLM) -> None:
    pair = both(max_new_tokens=2)
    prompt = pair.prompts("abcdefghij" * 10)[0]
    cached: list[int] = []
    step = colocated._engine.step

    def watched() -> list[Any]:
        outputs = step()
        cached.extend(output.num_cached_tokens for output in outputs if output.finished)
        return outputs

    colocated._engine.step = watched
    try:
        assert len(all_of(pair.vllm, [prompt] * 8)) == 8
    finally:
        colocated._engine.step = step
    assert sorted(cached) == [0] + [96] * 7  # of 100 tokens, in blocks of 32


def test_more_prompts_than_one_pass_takes_are_sampled(both: Any) -> None:
    pair = both(max_new_tokens=8, chunk_size=40)
    prompts = pair.prompts(*[f"{a}{b}" * 50 for a in "abcdefgh" for b in "ijklm"])
    assert sum(len(prompt.token_ids) for prompt in prompts) == 4000
    assert len(all_of(pair.vllm, prompts)) == 40  # first, while nothing of them is in the cache
    assert_alike(all_of(pair.vllm, prompts, greedy=True), all_of(pair.hf, prompts, greedy=True))


def test_completions_are_told_of_as_they_end_and_come_in_order(both: Any) -> None:
    pair = both()
    prompts = pair.prompts(*TEXTS * 2)
    told: list[int] = []
    chunks = list(pair.vllm.generate(prompts, on_finished=lambda ended: told.extend(ended)))
    assert [len(chunk) for chunk in chunks] == [5, 5, 4]
    assert [rollout.prompt for chunk in chunks for rollout in chunk] == prompts
    assert sorted(told) == list(range(14)) and told != sorted(told)


def test_new_weights_take_effect_and_no_cache_is_stale(
    lm: GPT2LMHeadModel, both: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    pair = both()
    prompts = pair.prompts("abcdefghij" * 8, "abcdefghij" * 8 + "k", "a")
    before = all_of(pair.vllm, prompts, greedy=True)
    lm.load_state_dict(make_lm(tokenizer, 1).state_dict())
    pair.version = next(VERSIONS)
    after = all_of(pair.vllm, prompts, greedy=True)
    assert_alike(after, all_of(pair.hf, prompts, greedy=True))
    assert [each.completion.token_ids for each in after] != [each.completion.token_ids for each in before]
    assert {rollout.policy_version for rollout in after} == {pair.version}


def test_sampling_that_was_broken_off_leaves_nothing_behind(both: Any, colocated: ColocatedVLLM) -> None:
    pair = both()
    chunks = pair.vllm.generate(pair.prompts(*TEXTS * 40))  # more than are sampled at once
    next(chunks)
    assert colocated._engine.has_unfinished_requests()
    chunks.close()
    assert not colocated._engine.has_unfinished_requests()
    pair.version = next(VERSIONS)
    assert len(all_of(pair.vllm, pair.prompts("a"))) == 1


def test_generators_of_the_process_are_left_alone(lm: GPT2LMHeadModel, both: Any) -> None:
    pair = both()
    torch.manual_seed(3)
    list(pair.vllm.generate(pair.prompts("a", "b"), greedy=True))
    after = torch.rand(1)
    torch.manual_seed(3)
    torch.randint(2**31, (2,))  # the seeds
    assert torch.equal(after, torch.rand(1))


# -------------------------------------------------------------------------------------------------- bad input


def test_prompt_beyond_max_model_len_is_refused_before_any_is_sampled(both: Any) -> None:
    pair = both()
    with pytest.raises(ConfigError, match="a prompt of 150 tokens"):
        all_of(pair.vllm, pair.prompts("a", "a" * 150))


def test_heads_without_a_kernel_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    from tests.tiny import tiny_gpt2_config

    lm = GPT2LMHeadModel(tiny_gpt2_config(tokenizer, n_embd=24, n_head=2))
    with pytest.raises(ModelError, match=r"no attention for heads of 12 \(it has 32, .*rollout.engine=hf"):
        ColocatedVLLM(lambda: lm, RolloutConfig(engine="vllm"), torch.float32, several_ranks=False)


def test_model_that_vllm_does_not_know_is_refused() -> None:
    lm = T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(ModelError, match=r"vLLM 0.32.0 cannot serve a T5ForConditionalGeneration"):
        ColocatedVLLM(lambda: lm, RolloutConfig(engine="vllm"), torch.float32, several_ranks=False)


def test_too_little_memory_says_what_to_lower(lm: GPT2LMHeadModel) -> None:
    config = RolloutConfig(engine="vllm", kv_cache_memory_bytes=ByteSize(2**50))
    with pytest.raises(RolloutError, match=r"not fit into memory: lower .*`rollout.kv_cache_memory_bytes`"):
        ColocatedVLLM(lambda: lm, config, torch.float32, several_ranks=False)
