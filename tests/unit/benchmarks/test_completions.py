"""Completions for verifiers: the same for the same seed, of every form, right and wrong ones among them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from benchmarks.completions import make_samples, read_answers
from conch.config.verifiers import GSM8KConfig
from conch.errors import ConchError
from conch.rewards.verifiers.gsm8k import GSM8K

ANSWERS = [
    "Tom has 3 + 4 = <<3+4=7>>7 pens.\n#### 7",
    "It is 1000 + 234 = <<1000+234=1234>>1234.\n#### 1,234",
]


def test_samples_repeat_with_their_seed_and_differ_with_another() -> None:
    assert make_samples(ANSWERS, 50, seed=1) == make_samples(ANSWERS, 50, seed=1)
    assert make_samples(ANSWERS, 50, seed=1) != make_samples(ANSWERS, 50, seed=2)


def test_samples_are_right_and_wrong_whole_and_cut_with_thoughts_and_latex() -> None:
    samples = make_samples(ANSWERS, 400)
    assert {sample.answer for sample in samples} == set(ANSWERS)
    texts = [sample.completion for sample in samples]
    for part in (
        "<<3+4=7>>",
        "($3+4 = 7$)",
        "<think>",
        "<answer>",
        r"\boxed{",
        "1,234",
        "1234.00",
        "\nCheck: ",
    ):
        assert any(part in text for text in texts), part
    assert len(set(texts)) > 200
    verifier = GSM8K(GSM8KConfig(extractor="flexible"))
    keys = [verifier.read_key({"answer": sample.answer}) for sample in samples]
    right = [verifier.verify(text, key).facts["correct"] for text, key in zip(texts, keys, strict=True)]
    assert 0.2 < sum(right) / len(right) < 0.8


def test_answers_are_read_packed_or_not(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"question": "?", "answer": answer}) + "\n" for answer in ANSWERS)
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    assert read_answers(tmp_path / "rows.jsonl") == read_answers(tmp_path / "rows.jsonl.gz") == ANSWERS
    (tmp_path / "other.jsonl").write_text('{"text": "?"}\n')
    with pytest.raises(ConchError, match="does not hold JSON lines with `answer`"):
        read_answers(tmp_path / "other.jsonl")
