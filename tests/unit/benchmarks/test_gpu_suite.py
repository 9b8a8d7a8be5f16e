"""The GPU suite's own parts: lengths, arithmetic, gaps, comparisons, its budget and its processes."""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_suite
from benchmarks.gpu.cards import peak_of
from benchmarks.gpu.cases import EOS, PAD, Arithmetic, CountDown, Work, arithmetic_of, check_shape, work_of
from benchmarks.gpu.checks import CHECKS, FAILED, PASSED, Greedy, Line, compare_greedy, judged
from benchmarks.gpu.profiling import Span, busy_ns, figures_of, longest, outermost
from benchmarks.gpu.report import markdown
from benchmarks.gpu_suite import chosen, failures, missing, plan, run_suite
from conch.errors import ConchError
from conch.types import Completion, Prompt, Rollout

LONGEST = 3  # a token's id modulo 4 is what is still to come


def allowed(rows: list[list[int]]) -> list[list[int]]:
    scores = CountDown(LONGEST)(torch.tensor(rows), torch.zeros(len(rows), 12))
    return [[token for token, score in enumerate(row) if score > -torch.inf] for row in scores.tolist()]


def test_a_row_goes_on_until_its_last_token_says_that_one_is_left() -> None:
    assert allowed([[7], [6], [5], [EOS], [PAD]]) == [[2, 6, 10], [5, 9], [EOS], [EOS], [EOS]]
    assert allowed([[6, 7], [7, 5]]) == [[2, 6, 10], [EOS]]


def test_prompts_say_how_long_their_responses_are() -> None:
    for algorithm in ("grpo", "ppo"):
        work = work_of(algorithm, "125m", 512, small=True)
        assert [prompt[-1] % (work.longest + 1) for prompt in work.prompts] == list(work.lengths)
        assert work.tokens == work.group_size * sum(work.lengths) and max(work.lengths) <= work.longest


def test_arithmetic_is_that_of_a_hand_calculation() -> None:
    of = Arithmetic(block_weights=10, head_weights=100, attention=1000)
    # A prompt of 2 tokens, responses of 3 and 1: 2 + 2 + 0 are read, 4 chosen; contexts 1 + 2 and 3 + 4.
    assert of.forward(2, [3, 1]) == 2 * (10 * 4 + 100 * 4) + 4 * 1000 * (1 + 2 + 3 + 4)
    group = Work("grpo", ((5, 6),), (3,), 2, 8, 1)
    assert of.step(group) == 5 * of.forward(2, [3, 3])
    assert of.step(Work("ppo", ((5, 6),), (3,), 1, 8, 1)) == 6 * of.forward(2, [3])
    # Four tokens and the end: four are read and four chosen.
    assert of.step(Work("sft", ((5, 6, 7, 8),), (1,), 1, 1, 1)) == 3 * (2 * 440 + 4 * 1000 * 10)


def test_weights_of_lookups_are_no_arithmetic() -> None:
    of = arithmetic_of(check_shape("gpt2", small=True))
    assert of.head_weights == 256 * 64 and of.attention == 2 * 64
    assert of.block_weights == 2 * (4 + 4 + 4) * 64 * 64


def test_gaps_lie_between_what_ran() -> None:
    spans = [Span("b", 5, 9), Span("a", 0, 4), Span("c", 6, 7), Span("a", 8, 12)]
    assert busy_ns(spans) == 4 + 7
    assert outermost(spans) == [Span("a", 0, 4), Span("b", 5, 9)]
    assert longest(spans, 1e-8, 1) == [{"name": "a", "seconds": 8e-9, "share": 0.8, "calls": 2}]
    assert figures_of(spans, 22e-9)["idle_share"] == pytest.approx(0.5)


def test_a_profiler_that_saw_nothing_tells_no_idle_share() -> None:
    assert figures_of([], 1.0)["idle_share"] is None


def test_peaks_are_those_of_the_card_named() -> None:
    assert [peak_of(name) for name in ("NVIDIA T1000", "cpu")] == [None, None]
    cards = ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB")
    assert [(peak_of(card) or (0, ""))[0] / 1e12 for card in cards] == [989.5, 989.5, 756.5, 312.0]


def greedy_pair(ids: list[int], logprobs: list[float]) -> tuple[list[Rollout], list[Greedy]]:
    """Ours, and the plain completion 2, 3 of a vocabulary of 4, where 1 was nearly as likely as 3."""
    completion = Completion("", tuple(ids), tuple(logprobs), "length")
    scores = torch.tensor([[-9.0, -9.0, -0.1, -9.0], [-9.0, -0.7001, -9.0, -0.7]])
    return [Rollout(Prompt("", (2,)), completion, 0)], [Greedy([2, 3], scores)]


@pytest.mark.parametrize(
    ("ids", "logprobs", "ties", "differing", "tokens"),
    [
        ([2, 3], [-0.1, -0.7], 0, 0, 2),
        ([2, 1], [-0.1, -0.7], 1, 0, 1),
        ([2, 0], [-0.1, -0.7], 0, 1, 1),
        ([2], [-0.1], 0, 1, 1),
    ],
)
def test_rows_part_at_ties_only(
    ids: list[int], logprobs: list[float], ties: int, differing: int, tokens: int
) -> None:
    found = compare_greedy(*greedy_pair(ids, logprobs), bound=1e-3)
    assert (found["ties"], found["rows that differ"], found["tokens"]) == (ties, differing, tokens)
    assert found["largest log-prob distance"] == pytest.approx(0.0, abs=1e-6)


def test_a_log_prob_that_is_none_fails() -> None:
    found = compare_greedy(*greedy_pair([2, 3], [math.nan, -0.7]), bound=1e-3)
    assert judged("x", found, {"largest log-prob distance": 1e-3}).result == FAILED


def test_parts_are_named_by_their_words() -> None:
    parts = plan("cuda", small=False)
    names = [part.name for part in chosen(parts, ["slots", "conch"])]
    assert names[0] == "slots" and names[1:] == [
        each.name for each in parts if each.name.startswith("conch-")
    ]
    assert len(names) == 7
    assert [part.name for part in chosen(parts, ["1b-ppo"])] == ["conch-ppo-1b", "plain-ppo-1b", "trl-ppo-1b"]
    with pytest.raises(ConchError, match="--only nonsense: no such part; parts are named by 125m, 1b, bf16"):
        chosen(parts, ["nonsense"])


def test_trl_is_asked_for_what_it_has() -> None:
    parts = {part.name: part for part in plan("cpu", small=True)}
    assert missing(parts["conch-ppo-1b"]) is None and missing(parts["slots"]) is None
    assert missing(parts["trl-ppo-1b"]) in ("not installed", "TRL has no such trainer")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_failed_part_stops_no_other_and_one_without_time_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: Any) -> list[Line]:
        raise ConchError("broken kernels")

    def hangs(*_: Any) -> list[Line]:
        time.sleep(1000)
        return []

    results = {"slots": FAILED, "flash": PASSED}
    for name, result in results.items():
        lines = [Line(name, result, {"gap": 0.5, "gap at most": 0.1})]
        monkeypatch.setitem(CHECKS, name, lambda *_, lines=lines: lines)
    monkeypatch.setitem(CHECKS, "packing", breaks)
    monkeypatch.setitem(CHECKS, "bf16", hangs)
    monkeypatch.setattr(gpu_suite, "lacks_packages", lambda name: False)
    names = ("slots", "packing", "flash", "bf16", "fp16")
    parts = [gpu_suite.Part(name, "checks", 1.0) for name in names]
    arguments = argparse.Namespace(device="cpu", small=True, budget_s=8.0, argv=["--small"])
    report = run_suite(arguments, parts, tmp_path)
    assert report == json.loads((tmp_path / "gpu_suite.json").read_text()) and report["complete"]
    checks = report["checks"]
    assert checks["slots"]["lines"][0] == asdict(Line("slots", FAILED, {"gap": 0.5, "gap at most": 0.1}))
    assert checks["packing"]["error"] == "conch.errors.ConchError: broken kernels"
    assert checks["flash"]["lines"][0]["result"] == PASSED and checks["bf16"]["cut_off"]
    assert list(report["left_out"]) == ["fp16"] and report["left_out"]["fp16"]["needs_s"] == 1.0
    assert failures(report) == ["slots", "packing"]
    table = (tmp_path / "gpu_suite.md").read_text()
    assert table == markdown(report)
    assert "| slots | failed | gap 0.5 (at most 0.1) |" in table
    assert "| packing | failed | conch.errors.ConchError: broken kernels |" in table
    assert "| bf16 | cut off | after " in table
    assert "- fp16: left out; it would have needed about 1 s (a guess), and 0 s of 8 were left" in table
