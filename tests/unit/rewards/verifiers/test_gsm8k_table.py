"""Completions that a person has labelled: what each extractor accepts, and who is wrong where in the docs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import math_verify
import pytest

from benchmarks.completions import make_samples
from conch.config.verifiers import GSM8KConfig, GSM8KExtractor
from conch.rewards.verifiers.gsm8k import GSM8K

TABLE = Path(__file__).with_name("gsm8k_completions.jsonl")
DOCS = Path(__file__).resolve().parents[4] / "docs" / "verifiable_rewards.md"
EXTRACTORS: tuple[GSM8KExtractor, ...] = get_args(GSM8KExtractor)
KINDS = (
    *("after ####", "units", "currency", "thousands", "fractions", "percent", "several answers"),
    *("answer repeated in a check", "LaTeX", "bold", "words", "negative", "time", "empty", "truncated"),
    *("<think> and <answer> tags", "punctuation"),
)


@dataclass(frozen=True)
class Row:
    """kind: of difficulty.
    is_right: what a person says who reads the completion and knows the answer `gold`.
    accepted_by: extractors that call it right, as recorded."""

    kind: str
    completion: str
    gold: str
    is_right: bool
    accepted_by: list[GSM8KExtractor]


ROWS = [Row(**json.loads(line)) for line in TABLE.read_text(encoding="utf-8").splitlines()]


def accepted(extractor: GSM8KExtractor, completion: str, gold: str) -> bool:
    """Whether the extractor calls it right by itself, in the whole completion."""
    verifier = GSM8K(GSM8KConfig(extractor=extractor, version="whole"))
    return bool(verifier.verify(completion, verifier.read_key({"answer": gold})).facts["correct"])


def wrong(extractor: GSM8KExtractor, rows: list[Row]) -> tuple[int, int]:
    """False positives and false negatives."""
    verdicts = [(extractor in row.accepted_by, row.is_right) for row in rows]
    return verdicts.count((True, False)), verdicts.count((False, True))


def test_table_holds_every_kind_with_right_and_wrong_completions() -> None:
    assert len(ROWS) >= 120
    assert len({(row.completion, row.gold) for row in ROWS}) == len(ROWS)
    assert {row.kind for row in ROWS} == set(KINDS)
    assert {row.kind for row in ROWS if row.is_right} == set(KINDS) - {"empty"}
    assert {row.kind for row in ROWS if not row.is_right} == set(KINDS)


@pytest.mark.parametrize("extractor", EXTRACTORS)
def test_extractor_accepts_what_is_recorded(extractor: GSM8KExtractor) -> None:
    found = {(row.completion, row.gold) for row in ROWS if accepted(extractor, row.completion, row.gold)}
    assert found == {(row.completion, row.gold) for row in ROWS if extractor in row.accepted_by}


@pytest.mark.parametrize(
    ("completion", "by"),
    [
        ("#### 18.00", (0, 0, 0, 1)),
        ("#### 18.", (1, 1, 0, 1)),
        ("#### $18", (0, 1, 0, 1)),
        ("#### 17 ... #### 18", (0, 1, 1, 1)),
        ("#### 18\nCheck: 18 / 2 = 9.", (1, 0, 1, 0)),
        ("The answer is 18 dollars.", (0, 1, 0, 1)),
    ],
)
def test_known_differences_come_out_as_in_the_originals(completion: str, by: tuple[int, ...]) -> None:
    """lm-eval 0.4.13 strict and flexible, verl 0.9.1, math-verify 0.9.0, each run by itself."""
    (row,) = [row for row in ROWS if (row.completion, row.gold) == (completion, "18")]
    assert tuple(int(extractor in row.accepted_by) for extractor in EXTRACTORS) == by


def table_line(title: str, rows: list[Row]) -> str:
    """A line of the table in the docs: how many completions, how many of them right, and who is wrong."""
    cells = [f"{positives} / {negatives}" for positives, negatives in (wrong(e, rows) for e in EXTRACTORS)]
    return f"| {' | '.join([title, str(len(rows)), str(sum(row.is_right for row in rows)), *cells])} |"


def test_docs_tell_who_is_wrong_where() -> None:
    lines = [table_line(f"`{kind}`", [row for row in ROWS if row.kind == kind]) for kind in KINDS]
    lines += [table_line("all", ROWS)]
    docs = DOCS.read_text(encoding="utf-8")
    assert "\n".join(lines) in docs
    math, flexible, verl, strict = (sum(wrong(e, ROWS)) for e in ("math", "flexible", "verl", "strict"))
    assert f"{math} times of {len(ROWS)}, `flexible` {flexible}, `verl` {verl}, `strict` {strict}." in docs


def test_default_extractor_is_the_one_that_is_wrong_least_often() -> None:
    errors = {extractor: sum(wrong(extractor, ROWS)) for extractor in EXTRACTORS}
    assert GSM8KConfig().extractor == min(EXTRACTORS, key=errors.__getitem__)


def test_default_reads_tags_and_judges_other_completions_as_its_extractor_by_itself() -> None:
    verifier = GSM8K()
    tagged = [row for row in ROWS if "<think>" in row.completion or "<answer>" in row.completion]
    mistaken: list[str] = []
    for row in ROWS:
        correct = bool(verifier.verify(row.completion, row.gold).facts["correct"])
        if row not in tagged:
            assert correct == ("math" in row.accepted_by), row
        elif correct != row.is_right:
            mistaken.append(row.completion)
    assert mistaken == ["<think>9 * 2 = 18</think><answer>She earns $18 in 1 day</answer>"]
    by_itself = sum(wrong("math", tagged))
    told = f"wrong about {len(mistaken)} of the {len(tagged)} completions with tags instead of {by_itself}"
    assert told in " ".join(DOCS.read_text(encoding="utf-8").split())


def test_math_judges_as_math_verify_does_by_itself() -> None:
    """Its time limits are off here and on there, and the gold is parsed once here."""
    for row in ROWS:
        theirs = math_verify.verify(math_verify.parse(row.gold), math_verify.parse(row.completion))
        assert ("math" in row.accepted_by) == theirs, row
    samples = make_samples([f"{n} + {n} is {2 * n}.\n#### {2 * n:,}" for n in range(0, 3000, 23)], 500)
    for sample in samples:
        gold = GSM8K().read_key({"answer": sample.answer})
        theirs = math_verify.verify(math_verify.parse(gold), math_verify.parse(sample.completion))
        assert accepted("math", sample.completion, gold) == theirs, sample
