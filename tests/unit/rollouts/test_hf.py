"""What HFEngine samples from, what it reports of it, and where a completion ends."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig as HFGenerationConfig
from transformers import PreTrainedModel

from conch.config import GenerationConfig
from conch.models.forward import ForwardInputs, takes_packed_rows
from conch.models.policy import response_logits
from conch.ops import logprobs_of_labels
from conch.rollouts.hf.engine import HFEngine
from conch.rollouts.stopping import cut_at_end
from conch.types import Prompt, Rollout
from tests.numerics import rounding
from tests.tiny import LANGUAGE_MODELS, char_tokenizer, constant_decoder, cycle_decoder, tiny_decoder

LETTERS = "abcdefghijklmnopqrstu"
TOKENIZER = char_tokenizer(LETTERS)
EOS = TOKENIZER.eos_token_id
LOGITS = [2.0, 1.0, 0.0, -1.0]


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(text, tuple(TOKENIZER(text)["input_ids"])) for text in texts]


def sample(
    lm: PreTrainedModel, batch: Sequence[Prompt], *, greedy: bool = False, seed: int = 0, **generation: Any
) -> list[Rollout]:
    engine = HFEngine(lambda: lm, TOKENIZER, GenerationConfig(**generation), version=lambda: 7)
    torch.manual_seed(seed)
    return [rollout for chunk in engine.generate(batch, greedy=greedy) for rollout in chunk]


def outputs(rollouts: Sequence[Rollout]) -> list[str]:
    return [rollout.completion.text for rollout in rollouts]


def softmax(logits: Sequence[float]) -> list[float]:
    total = sum(math.exp(logit) for logit in logits)
    return [math.exp(logit) / total for logit in logits]


# ------------------------------------------------------------------------------------------- the distribution


@pytest.mark.parametrize(
    ("settings", "distribution"),
    [
        ({}, softmax(LOGITS)),
        ({"temperature": 0.5}, softmax([4.0, 2.0, 0.0, -2.0])),
        ({"temperature": 2.0}, softmax([1.0, 0.5, 0.0, -0.5])),
        ({"top_k": 2}, softmax([2.0, 1.0])),
        # 0.644 + 0.237 hold less than 0.9; the third makes it full
        ({"top_p": 0.9}, softmax([2.0, 1.0, 0.0])),
        # the temperature comes first: 0.867 + 0.117 hold 0.9 now
        ({"temperature": 0.5, "top_p": 0.9}, softmax([4.0, 2.0])),
        ({"temperature": 2.0, "top_k": 3, "top_p": 0.6}, softmax([1.0, 0.5])),
    ],
)
def test_samples_and_logprobs_are_of_the_configured_distribution(
    settings: dict[str, Any], distribution: list[float]
) -> None:
    lm = constant_decoder(LOGITS, TOKENIZER)
    number = 2000
    rollouts = sample(lm, prompts("a") * number, max_new_tokens=1, chunk_size=number, **settings)
    ids = Counter(rollout.completion.token_ids[0] for rollout in rollouts)
    logprobs = {r.completion.token_ids[0]: r.completion.logprobs[0] for r in rollouts}

    assert sorted(ids) == list(range(len(distribution))), (
        "sampled outside of the truncated set, or never inside"
    )
    for token, probability in enumerate(distribution):
        assert math.exp(logprobs[token]) == pytest.approx(probability, rel=1e-5)
        assert abs(ids[token] / number - probability) < 5 * math.sqrt(probability / number)
    assert sum(math.exp(logprob) for logprob in logprobs.values()) == pytest.approx(1.0, abs=1e-5)


def test_what_the_checkpoint_says_about_sampling_is_ignored() -> None:
    lm = constant_decoder(LOGITS, TOKENIZER)
    wild = HFGenerationConfig(
        do_sample=True,
        temperature=9.0,
        top_k=1,
        top_p=0.1,
        min_p=0.9,
        repetition_penalty=50.0,
        no_repeat_ngram_size=1,
        suppress_tokens=[0],
        min_new_tokens=3,
        max_new_tokens=2,
        num_beams=2,
        num_return_sequences=2,
    )
    plain = sample(lm, prompts("a") * 50, max_new_tokens=4, temperature=0.7, top_k=3)
    lm.generation_config = wild

    assert sample(lm, prompts("a") * 50, max_new_tokens=4, temperature=0.7, top_k=3) == plain
    assert lm.generation_config is wild, "what is saved with the model stays what it was"


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@torch.no_grad()
def test_sampling_logprobs_equal_recomputed_ones(family: str, temperature: float) -> None:
    lm = tiny_decoder(family)
    batch = prompts("abc", "d", "efghi", "jk")
    rollouts = sample(lm, batch, max_new_tokens=6, temperature=temperature)
    for rollout in rollouts:
        prompt, response = rollout.prompt.token_ids, rollout.completion.token_ids
        ids = torch.tensor([[*prompt, *response]])
        logits = response_logits(
            lm, ForwardInputs(ids, torch.ones_like(ids, dtype=torch.bool), len(response))
        )
        expected = logprobs_of_labels(logits, torch.tensor([response]), temperature)[0]

        sampled = torch.tensor(rollout.completion.logprobs, dtype=torch.float64)
        # Log-probs are sampled in float32: division, exponential, a sum over 24 tokens, logarithm.
        torch.testing.assert_close(sampled, expected, rtol=0, atol=rounding(logits / temperature, 8))


@torch.no_grad()
def test_mean_ratio_is_one_under_the_truncated_distribution_only() -> None:
    """The importance ratio of the truncated to the sampling distribution is 1; of the full one it is less."""
    lm = tiny_decoder("gpt2")
    rollouts = sample(lm, prompts("abc") * 300, max_new_tokens=1, top_p=0.6, chunk_size=300)
    ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.completion.token_ids] for rollout in rollouts])
    logits = response_logits(lm, ForwardInputs(ids, torch.ones_like(ids, dtype=torch.bool), 1))
    full = logprobs_of_labels(logits, ids[:, -1:])[:, 0]
    sampled = torch.tensor([rollout.completion.logprobs[0] for rollout in rollouts])
    kept = _nucleus_mass(logits[0, 0], 0.6)

    assert (full - sampled).exp().mean().item() == pytest.approx(kept, rel=1e-4)
    assert 0.6 <= kept < 1


def _nucleus_mass(logits: Tensor, top_p: float) -> float:
    """Probability of the likeliest tokens that hold `top_p` together."""
    total = 0.0
    for probability in sorted(logits.double().softmax(-1).tolist(), reverse=True):
        total += probability
        if total >= top_p:
            break
    return total


Told = list[dict[int, Rollout]]


def sample_telling(
    lm: PreTrainedModel, batch: Sequence[Prompt], **generation: Any
) -> tuple[list[Rollout], Told]:
    """Rollouts, and what `on_finished` was told of them, call by call."""
    engine = HFEngine(lambda: lm, TOKENIZER, GenerationConfig(**generation), version=lambda: 7)
    told: Told = []
    torch.manual_seed(0)
    chunks = engine.generate(batch, on_finished=lambda finished: told.append(dict(finished)))
    return [rollout for chunk in chunks for rollout in chunk], told


@pytest.mark.parametrize("settings", [{}, {"stop": ("c", "ab")}, {"top_p": 0.8, "stop": ("e",)}])
@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_handing_over_early_changes_nothing_of_what_is_sampled(family: str, settings: dict[str, Any]) -> None:
    lm = tiny_decoder(family)
    batch = prompts("abc", "d", "ef", "a") * 6
    expected = sample(lm, batch, max_new_tokens=9, chunk_size=7, **settings)
    found, told = sample_telling(lm, batch, max_new_tokens=9, chunk_size=7, **settings)

    assert found == expected
    assert len({r.completion.finish_reason for r in found}) > 1, "some end early, some do not"
    pairs = [pair for call in told for pair in call.items()]
    assert sorted(place for place, _ in pairs) == list(range(len(batch)))
    assert all(rollout is found[place] for place, rollout in pairs)
    assert len(told) > 4, "more calls than chunks"


def test_each_completion_is_handed_over_the_moment_it_ends() -> None:
    lm, steps = cycle_decoder(TOKENIZER), []
    config = GenerationConfig(max_new_tokens=8, stop=("de",), chunk_size=3)
    engine = HFEngine(lambda: lm, TOKENIZER, config, version=lambda: 0)
    list(engine.generate(prompts("t")))  # it has found out by now how the model may be run
    lm.register_forward_hook(lambda *_: steps.append(1))
    told: dict[int, tuple[int, str]] = {}

    def note(finished: Mapping[int, Rollout]) -> None:
        told.update({n: (len(steps), rollout.completion.text) for n, rollout in finished.items()})

    # t: u and the end; s is read in its place, in the third pass; b: stopped at c|de; f: reaches the limit.
    list(engine.generate(prompts("t", "b", "f", "s"), on_finished=note))

    assert told == {0: (2, "u"), 1: (4, "c"), 3: (5, "tu"), 2: (9, "ghijklmn")}


def test_seed_reproduces_a_rollout_and_another_seed_does_not() -> None:
    lm, batch = tiny_decoder("gpt2"), prompts("abc", "d") * 4
    first, again, other = (sample(lm, batch, max_new_tokens=8, seed=seed) for seed in (3, 3, 4))

    assert first == again
    assert outputs(first) != outputs(other)


def test_greedy_takes_the_likeliest_token() -> None:
    rollouts = sample(
        constant_decoder([0.0, 0.3, 0.1], TOKENIZER), prompts("a"), greedy=True, max_new_tokens=3
    )

    assert outputs(rollouts) == ["bbb"]


# ------------------------------------------------------------------------------------------------- the engine


def test_chunks_keep_the_order_and_the_size() -> None:
    lm = cycle_decoder(TOKENIZER)
    engine = HFEngine(
        lambda: lm, TOKENIZER, GenerationConfig(max_new_tokens=2, chunk_size=2), version=lambda: 7
    )
    chunks = list(engine.generate(prompts("a", "bcd", "e", "fg", "h")))

    assert [[r.sample for r in chunk] for chunk in chunks] == [["abc", "bcdef"], ["efg", "fghi"], ["hij"]]
    assert all(rollout.policy_version == 7 for chunk in chunks for rollout in chunk)


@pytest.mark.parametrize("training", [True, False])
def test_generation_puts_the_mode_back(training: bool) -> None:
    lm = cycle_decoder(TOKENIZER).train(training)
    sample(lm, prompts("a"), max_new_tokens=1)

    assert all(module.training is training for module in lm.modules())


def test_generation_runs_without_dropout_in_training_mode() -> None:
    lm = tiny_decoder("gpt2", resid_pdrop=0.5)
    calm = sample(lm.eval(), prompts("abc"), max_new_tokens=6)

    assert sample(lm.train(), prompts("abc"), max_new_tokens=6) == calm


def test_ids_text_and_logprobs_have_one_length() -> None:
    for rollout in sample(tiny_decoder("gpt2"), prompts("abc", "d") * 20, max_new_tokens=8):
        completion = rollout.completion
        assert len(completion.token_ids) == len(completion.logprobs)
        assert completion.text == TOKENIZER.decode(completion.token_ids, skip_special_tokens=True)
        assert (completion.finish_reason == "eos") == (completion.token_ids[-1] == EOS)


# --------------------------------------------------------------------------------------------------- the end


def test_completion_of_an_encoder_decoder_leaves_out_the_start_token() -> None:
    lm = tiny_decoder("t5", decoder_start_token_id=20)
    for rollout in sample(lm, prompts("abc", "d") * 20, max_new_tokens=5):
        completion = rollout.completion
        ids, ended = completion.token_ids, completion.finish_reason == "eos"
        assert ended == (EOS in ids) and (len(ids) == 5 or ended)
        assert len(ids) == len(completion.logprobs)
    forced = torch.full((24,), -1e4).index_fill(0, torch.tensor([EOS]), 0.0)
    lm.lm_head.register_forward_hook(lambda _module, _args, logits: logits * 0 + forced)

    assert [r.completion.token_ids for r in sample(lm, prompts("abc"), max_new_tokens=5)] == [(EOS,)]


def test_stop_string_ends_an_encoder_decoders_response() -> None:
    lm = tiny_decoder("t5")
    free = sample(lm, prompts("abc"), greedy=True, max_new_tokens=6)[0].completion
    stop = free.text[1]
    stopped = sample(lm, prompts("abc"), greedy=True, max_new_tokens=6, stop=(stop,))[0].completion

    assert (stopped.text, stopped.finish_reason) == (free.text[: free.text.index(stop)], "stop")


def test_completion_ends_with_its_eos_and_nothing_behind() -> None:
    early, late = sample(cycle_decoder(TOKENIZER), prompts("s", "f"), max_new_tokens=6)

    assert (early.completion.token_ids, early.completion.finish_reason) == ((19, 20, EOS), "eos")
    assert (early.completion.text, len(early.completion.logprobs)) == ("tu", 3)
    assert (late.completion.text, late.completion.finish_reason) == ("ghijkl", "length")


def test_stop_string_over_several_tokens_is_cut_off() -> None:
    rollouts = sample(cycle_decoder(TOKENIZER), prompts("a", "c", "i"), max_new_tokens=8, stop=("def", "kl"))
    ends = [(r.completion.text, r.completion.token_ids, r.completion.finish_reason) for r in rollouts]

    assert ends == [("bc", (1, 2), "stop"), ("", (), "stop"), ("j", (9,), "stop")]
    assert [len(r.completion.logprobs) for r in rollouts] == [2, 0, 1]
    assert all(logprob == pytest.approx(0, abs=1e-3) for r in rollouts for logprob in r.completion.logprobs)


def test_stop_string_that_begins_in_the_prompt_does_not_count() -> None:
    rollouts = sample(cycle_decoder(TOKENIZER), prompts("a", "xab"), max_new_tokens=4, stop=("ab", "bc"))
    ends = [(r.completion.text, r.completion.finish_reason) for r in rollouts]

    assert ends == [("", "stop"), ("cdef", "length")]


def test_generation_stops_where_all_rows_have_stopped() -> None:
    lm, steps = cycle_decoder(TOKENIZER), []
    tried = takes_packed_rows(lm)
    lm.register_forward_hook(lambda *_: steps.append(1))
    takes_packed_rows(lm)
    num_tried = len(steps)
    sample(lm, prompts("a", "b"), max_new_tokens=12, stop=("de",))

    assert tried and len(steps) == num_tried + num_tried + 4, "a: bcde"


def test_stop_string_far_behind_many_tokens_is_found() -> None:
    long = GenerationConfig(max_new_tokens=14, stop=("op",))
    lm = cycle_decoder(TOKENIZER)
    [[rollout]] = list(HFEngine(lambda: lm, TOKENIZER, long, version=lambda: 0).generate(prompts("b")))

    assert rollout.completion.text == "cdefghijklmn"


PIECES = ["a", "b", "cd", "ef", "\n", "<", "|", "end", "|>x", "<eos>"]


def decode(ids: Sequence[int]) -> str:
    return "".join(PIECES[i] for i in ids if PIECES[i] != "<eos>")


@pytest.mark.parametrize(
    ("ids", "stop", "kept", "reason"),
    [
        ([0, 1, 2], (), [0, 1, 2], "length"),
        ([0, 9, 9, 1], (), [0, 9], "eos"),
        ([9, 9], (), [9], "eos"),
        ([0, 1, 4, 0], ("\n",), [0, 1], "stop"),
        ([0, 5, 6, 7, 8, 1], ("<|end|>",), [0], "stop"),
        (
            [0, 1, 2, 3],
            ("de",),
            [0, 1],
            "stop",
        ),  # "cd" holds the beginning of the stop string and goes with it
        ([0, 1, 2, 3], ("bc",), [0], "stop"),
        ([0, 1, 2, 3], ("f", "d"), [0, 1], "stop"),  # the first in the text, not the first in the list
        ([0, 1, 0, 1], ("a", "b"), [], "stop"),
        ([0, 9, 4], ("\n",), [0, 9], "eos"),  # what stands behind the eos was never said
        ([0, 4, 9], ("\n",), [0], "stop"),
        ([], ("\n",), [], "length"),
    ],
)
def test_cut_at_end(ids: list[int], stop: tuple[str, ...], kept: list[int], reason: str) -> None:
    assert cut_at_end(ids, [9], stop, decode) == (kept, reason)


def test_cut_decodes_nothing_without_stop_strings() -> None:
    def refused(_ids: Sequence[int]) -> str:
        raise AssertionError("decoded for nothing")

    assert cut_at_end([0, 9, 1], [9], (), refused) == ([0, 9], "eos")
    assert cut_at_end([0, 1], [9], (), refused) == ([0, 1], "length")


def test_cut_decodes_a_long_response_few_times() -> None:
    calls = []

    def counting(ids: Sequence[int]) -> str:
        calls.append(len(ids))
        return decode(ids)

    ids = [0] * 5 + [4] + [1] * 2000
    assert cut_at_end(ids, [9], ("\n",), counting) == ([0] * 5, "stop")
    assert len(calls) < 20


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_prompts_of_unequal_length_continue_as_each_does_alone(family: str) -> None:
    lm = tiny_decoder(family)
    batch = prompts("a", "bcdef", "gh")
    together = sample(lm, batch, greedy=True, max_new_tokens=6)
    alone = [sample(lm, [prompt], greedy=True, max_new_tokens=6)[0] for prompt in batch]
    for one, other in zip(together, alone, strict=True):
        assert one.completion.token_ids == other.completion.token_ids
        assert one.completion.logprobs == pytest.approx(other.completion.logprobs, abs=1e-5)
