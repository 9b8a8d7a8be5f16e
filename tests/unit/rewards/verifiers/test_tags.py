"""Thoughts and answers in tags, right and wrong ones."""

from __future__ import annotations

import time

import pytest

from conch.rewards.verifiers.tags import read_tags


@pytest.mark.parametrize(
    ("completion", "thoughts", "answers", "outside"),
    [
        ("", [], [], ""),
        ("<think>a</think> b <answer> 1\n</answer> c", ["a"], ["1"], " b <answer> 1\n</answer> c"),
        (
            "<answer>1</answer> <answer>2<answer>3</answer></answer><answer>4",
            [],
            ["1", "2<answer>3"],
            "<answer>1</answer> <answer>2<answer>3</answer></answer><answer>4",
        ),
        ("<think>a<think>b</think><answer>1</answer>", ["a<think>b"], ["1"], "<answer>1</answer>"),
        (
            "<think>a <answer>0</answer></think><answer>1</answer>",
            ["a <answer>0</answer>"],
            ["1"],
            "<answer>1</answer>",
        ),
        ("began before</think><answer>1</answer>", ["began before"], ["1"], "<answer>1</answer>"),
        ("<answer>1</answer><think>never ends <answer>2</answer>", [], ["1"], "<answer>1</answer>"),
        ("<answer>1 <think>a</think>8</answer>", ["a"], ["1 8"], "<answer>1 8</answer>"),
        ("<THINK>a</THINK><answer >1</answer>", [], [], "<THINK>a</THINK><answer >1</answer>"),
        ("a < b & c > d <answer>&lt;</answer>", [], ["&lt;"], "a < b & c > d <answer>&lt;</answer>"),
        ("a <think>b</think> c <think>d</think> e", ["b", "d"], [], "a  c  e"),
        ("#### 18", [], [], "#### 18"),
    ],
)
def test_answers_stand_outside_of_the_thoughts(
    completion: str, thoughts: list[str], answers: list[str], outside: str
) -> None:
    assert read_tags(completion) == (thoughts, answers, outside)


@pytest.mark.parametrize(
    "piece", ["<think>", "</think>", "<answer>", "<answer>1</answer>", "<think>1</think>", "<think></answer>"]
)
def test_time_grows_with_the_text(piece: str) -> None:
    """A pattern with a lazy star would look to the end from each open tag of 4 MB, and a text that is copied
    at each tag be copied 200,000 times: minutes."""
    started = time.process_time()
    found = read_tags(piece * (4_000_000 // len(piece)))
    assert time.process_time() - started < 10
    assert len(found.answers) == (222_222 if piece == "<answer>1</answer>" else 0)
