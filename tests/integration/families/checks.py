"""What holds for every family; the files `test_*.py` beside this one import these tests for their families.

Each takes `runs`, a `FamilyRuns` of one family. Bounds are for float32 and two layers of width 16.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from conch.data.samples import TokenizedSample
from tests.integration.families.models import LONGEST, greedy_completion
from tests.integration.families.runs import ANSWER, FamilyRuns, OnlineRun

LARGEST_GAP = 1e-5
"""Nats a token."""


def learned_runs(sample: TokenizedSample) -> list[list[int]]:
    """Tokens that are learned, in pieces that stand together."""
    marked = itertools.groupby(zip(sample.token_ids, sample.loss_mask, strict=True), key=lambda pair: pair[1])
    return [[token for token, _ in run] for is_learned, run in marked if is_learned]


def plain_answer(text: str) -> str:
    """What the assistant said, without what templates put around it."""
    return text.strip().removeprefix("<think>\n\n</think>\n\n").removeprefix("final")


@pytest.fixture(params=["ppo", "grpo"])
def run(request: pytest.FixtureRequest, runs: FamilyRuns) -> OnlineRun:
    """The runs that sample."""
    return getattr(runs, request.param)


def test_prompts_have_the_special_tokens_of_their_tokenizer_or_template_once(runs: FamilyRuns) -> None:
    given = [row if isinstance(row, str) else row["prompt"] for row in runs.prompts]
    expected = [runs.prompt_ids(prompt) for prompt in given]
    assert [list(prompt.token_ids) for prompt in runs.ppo.prompts] == expected


def test_completions_end_where_those_of_transformers_end(runs: FamilyRuns) -> None:
    ends = runs.lm.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    for rollout in runs.ppo.greedy:
        expected = greedy_completion(runs.lm, rollout.prompt.token_ids, LONGEST)
        assert list(rollout.completion.token_ids) == expected
        assert rollout.completion.finish_reason == ("eos" if expected[-1] in ends else "length")


def test_sampled_logprobs_are_those_of_each_sample_alone(runs: FamilyRuns, run: OnlineRun) -> None:
    for rollout in run.rollouts[0]:
        completion = rollout.completion
        alone = runs.logprobs_alone(rollout.prompt.token_ids, completion.token_ids)
        assert torch.tensor(completion.logprobs) == pytest.approx(alone, abs=10 * LARGEST_GAP)


def test_policy_begins_at_its_reference_and_its_sampler(run: OnlineRun) -> None:
    first, second = run.metrics
    assert first["policy/kl"] == pytest.approx(0, abs=LARGEST_GAP * LONGEST)
    for step in (first, second):
        assert step["train/ratio_first"] == pytest.approx(1, abs=LARGEST_GAP)
        assert step["train/clip_fraction_first"] == 0
        assert step["rollout/logprob_diff"] < LARGEST_GAP
        assert math.isfinite(step["train/grad_norm"])


def test_reward_reads_what_decoding_prompt_and_response_together_gives(
    runs: FamilyRuns, run: OnlineRun
) -> None:
    rollouts = [rollout for step in run.rollouts for rollout in step]
    expected = [runs.response_text(each.prompt.token_ids, each.completion.token_ids) for each in rollouts]
    assert [output for _, output in run.seen] == expected
    for each in (*rollouts, *run.greedy, *run.sampled):
        text = runs.response_text(each.prompt.token_ids, each.completion.token_ids)
        assert each.completion.text == text


def test_sft_loss_is_that_of_each_sample_alone(runs: FamilyRuns) -> None:
    first, second = runs.sft.metrics
    assert first["train/loss"] == pytest.approx(runs.sft_loss_alone(runs.sft.samples), abs=LARGEST_GAP)
    assert second["train/loss"] < first["train/loss"]


def test_sft_learns_what_the_policy_would_have_to_sample(runs: FamilyRuns) -> None:
    tokenizer, samples = runs.tokenizer, runs.sft.samples
    for given, sample in zip(runs.samples, samples, strict=True):
        ids = list(sample.token_ids)
        learned = [token for token, is_learned in zip(ids, sample.loss_mask, strict=True) if is_learned]
        if isinstance(given, list):
            rendered = tokenizer.apply_chat_template(given, tokenize=True)
            assert ids == list(rendered["input_ids"])
            answers = [tokenizer.decode(run, skip_special_tokens=True) for run in learned_runs(sample)]
            assert [plain_answer(answer) for answer in answers] == [
                message["content"] for message in given if message["role"] == "assistant"
            ]
            continue
        text = given if isinstance(given, str) else given["prompt"] + given["completion"]
        prompt = [] if isinstance(given, str) else runs.prompt_ids(given["prompt"])
        if runs.is_encoder_decoder:
            assert ids[: len(prompt)] == prompt
            assert ids[-1] == tokenizer.eos_token_id and ids[len(prompt) :].count(ids[-1]) == 1
            assert runs.response_text(prompt, learned).strip() == ANSWER
            continue
        assert ids == [*runs.prompt_ids(text), tokenizer.eos_token_id]
        assert learned == ids[max(1, len(prompt)) :]
