"""What asynchronous training is watched by, against numbers made by hand."""

from __future__ import annotations

import bisect
import math
import random
from dataclasses import replace

import pytest
import torch

from conch.data.rollout_batch import collate
from conch.ops import only_this_rank
from conch.training.overlap.correction import CorrectionConfig, importance_metrics
from conch.training.overlap.metrics import (
    LengthAudit,
    Split,
    better_split,
    kolmogorov_smirnov,
    split_advice,
    staleness_metrics,
)
from conch.training.overlap.sampling import idle_shares
from conch.types import Rollout
from tests.runs import PAD, letters_rollout

ALONE = (only_this_rank, only_this_rank)


def of_versions(output: str, version: int, *runs: tuple[int, int]) -> Rollout:
    return replace(letters_rollout("a", output, "stop"), policy_version=version, version_runs=runs)


def test_staleness_is_counted_by_token() -> None:
    rollouts = [of_versions("abc", 5), of_versions("abcd", 3, (3, 1), (4, 2), (6, 1)), of_versions("", 0)]
    # 3 tokens of age 2; then 1 of 4, 2 of 3 and 1 of 1. The empty response has no token that could be old.
    metrics = staleness_metrics(rollouts, 7, *ALONE)
    assert metrics == {"staleness/mean": pytest.approx((3 * 2 + 4 + 6 + 1) / 7), "staleness/max": 4.0}


def test_no_token_has_no_staleness() -> None:
    metrics = staleness_metrics([of_versions("", 2)], 2, *ALONE)
    assert all(math.isnan(value) for value in metrics.values())


def test_synchronous_samples_are_not_stale() -> None:
    metrics = staleness_metrics([of_versions("ab", 4)], 4, *ALONE)
    assert metrics == {"staleness/mean": 0.0, "staleness/max": 0.0}


@pytest.mark.parametrize(
    ("settings", "tokens", "responses"),
    [
        ({"kind": "truncate", "cap": 3.0}, 1 / 3, 1 / 2),
        ({"kind": "truncate", "cap": 4.0}, 0.0, 0.0),
        ({"kind": "mask", "low": 0.6, "high": 3.0}, 2 / 3, 1.0),
        ({"kind": "truncate", "cap": 1.5, "level": "sequence"}, 1 / 3, 1 / 2),
        ({"kind": "mask", "low": 1.5, "high": 5.0, "level": "geometric"}, 2 / 3, 1 / 2),
    ],
)
def test_importance_ratios_are_measured_before_they_are_cut(
    settings: dict[str, float | str], tokens: float, responses: float
) -> None:
    sequences = collate([letters_rollout("a", text, "stop", -2.0) for text in ("ab", "c", "")], PAD)
    # Ratios 2 and 1/2 of a response, 4 of another; a third has no tokens, and padding is no number.
    logprobs = torch.tensor([[2.0, 0.5], [4.0, math.nan], [math.nan] * 2]).log() - 2.0
    expected = {
        "rollout/effective_sample_size": 6.5**2 / (3 * (4 + 0.25 + 16)),
        "rollout/importance_ratio_mean": 6.5 / 3,
        "rollout/importance_ratio_max": 4.0,
        "rollout/sequence_effective_sample_size": 5**2 / (2 * (1 + 16)),
        "rollout/sequence_importance_ratio_mean": 2.5,
        "rollout/sequence_importance_ratio_max": 4.0,
    }
    metrics = importance_metrics(logprobs, sequences, CorrectionConfig(), *ALONE)
    assert metrics == pytest.approx(expected)
    metrics = importance_metrics(logprobs, sequences, CorrectionConfig.model_validate(settings), *ALONE)
    assert metrics.pop("rollout/importance_ratio_cut_fraction") == pytest.approx(tokens)
    assert metrics.pop("rollout/sequence_importance_ratio_cut_fraction") == pytest.approx(responses)
    assert metrics == pytest.approx(expected), "the cut changes none of them"


def audit_of(sampled: list[int], trained: list[int], longest: int = 10) -> LengthAudit:
    audit = LengthAudit(longest)
    for length in sampled:
        audit.note_sampled(length)
    for length in trained:
        audit.note_trained(length)
    return audit


def test_lengths_that_are_lost_are_seen() -> None:
    metrics = audit_of([1, 2, 3, 10], [1, 2, 3]).metrics(only_this_rank)
    assert metrics == {
        "async/length_sampled_mean": 4.0,
        "async/length_trained_mean": 2.0,
        "async/length_distance": pytest.approx(1 / 4),
    }


def test_equal_lengths_have_no_distance() -> None:
    assert audit_of([0, 3, 3], [3, 0, 3, 3, 3, 0]).metrics(only_this_rank)["async/length_distance"] < 1e-12


def test_nothing_to_compare_is_no_number() -> None:
    metrics = audit_of([3], []).metrics(only_this_rank)
    assert metrics["async/length_sampled_mean"] == 3.0
    assert math.isnan(metrics["async/length_trained_mean"]) and math.isnan(metrics["async/length_distance"])


def test_distance_is_that_of_the_empirical_distributions() -> None:
    draw = random.Random(0)
    first, second = ([min(200, int(draw.lognormvariate(3, s))) for _ in range(500)] for s in (0.8, 1.0))
    counts = [torch.bincount(torch.tensor(each), minlength=201).double() for each in (first, second)]
    ordered = [sorted(each) for each in (first, second)]
    shares = [[bisect.bisect_right(each, length) / 500 for length in range(201)] for each in ordered]
    expected = max(abs(one - other) for one, other in zip(*shares, strict=True))
    assert kolmogorov_smirnov(*counts) == pytest.approx(expected) and expected > 0.03


def test_audit_goes_on_after_a_checkpoint() -> None:
    audit = audit_of([1, 2, 3, 10], [1, 2])
    kept = audit.state_dict()
    audit.note_sampled(9)
    audit.note_trained(10)
    for longest in (8, 10, 12):
        resumed = LengthAudit(longest)
        resumed.load_state_dict(kept)
        for length in (3, 10, 9):  # those that the buffer kept, and what comes
            resumed.note_sampled(length)
        resumed.note_trained(10)
        assert resumed.metrics(only_this_rank) == audit.metrics(only_this_rank)


@pytest.mark.parametrize(
    ("present", "idle", "expected"),
    [
        # Trainers do 4 device-steps, samplers 1: 4 of 5 train; 1 step -> max(4 / 6, 1 / 2).
        ((4, 4), (0.0, 0.75), Split(6, 2, 1 / 3)),
        ((2, 2), (0.6, 0.0), Split(1, 3, 1 - max(0.8 / 1, 2 / 3))),
        # Work 6 to 2 divides 8 devices by 6 + 2 already.
        ((6, 2), (0.0, 0.0), None),
        ((1, 1), (0.0, 0.9), None),
        # 0.9 device-steps each: any other split is slower.
        ((1, 1), (0.1, 0.1), None),
        # 7 and 6.79 device-steps: one device more for the trainer makes the samplers the longer side.
        ((7, 7), (0.0, 0.03), None),
        ((2, 6), (1.0, 1.0), None),
        ((2, 2), (math.nan, 0.0), None),
    ],
)
def test_better_split_is_that_of_the_shortest_step(
    present: tuple[int, int], idle: tuple[float, float], expected: Split | None
) -> None:
    found = better_split(*present, *idle)
    if expected is None or found is None:
        assert found == expected
    else:
        assert (found.num_train, found.num_inference) == (expected.num_train, expected.num_inference)
        assert found.gain == pytest.approx(expected.gain)


@pytest.mark.parametrize(
    ("present", "idle", "said"),
    [
        (
            (4, 4),
            (0.0, 0.75),
            "`train_model.num_devices=6 inference_model.num_devices=2` would take up to 33% less",
        ),
        # One device more halves the samplers' 1.0; the trainer's 0.5 is then as long.
        (
            (1, 1),
            (0.5, 0.0),
            "1 + 1 is best; with one more, `inference_model.num_devices=2` would save up to 50%",
        ),
        ((1, 1), (0.0, 0.9), "`train_model.num_devices=2` would save up to 50%"),
        ((1, 1), (0.0, 0.0), "split 1 + 1 is best, and one more on either side alone would save nothing"),
        ((1, 1), (0.5, 0.4), "both waited for each other; a larger `max_staleness`"),
        ((2, 2), (math.nan, math.nan), "no step was measured"),
    ],
)
def test_advice_names_the_settings(present: tuple[int, int], idle: tuple[float, float], said: str) -> None:
    advice = split_advice(
        *present, *idle, settings=("train_model.num_devices", "inference_model.num_devices")
    )
    assert said in advice
    assert "nan" not in advice


def test_idle_shares_of_what_tells_nothing_are_no_numbers() -> None:
    trainer, sampler = idle_shares(torch.tensor([1.0, 4.0, 0.0, 0.0]))
    assert trainer == 0.25
    assert math.isnan(sampler), "no sampler has told how long it was busy, which is not that it always was"
