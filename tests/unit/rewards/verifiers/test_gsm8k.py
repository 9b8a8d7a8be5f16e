"""GSM8K's answers: keys, tags and what each version pays. What extractors judge: test_gsm8k_table."""

from __future__ import annotations

import pickle
import sys
from typing import Any

import numpy as np
import pytest

from conch.config.verifiers import GSM8KConfig
from conch.errors import ConfigError, DataError
from conch.rewards.verifiers.gsm8k import GSM8K, numbers_in, plain_number


@pytest.mark.parametrize(
    ("answer", "key"),
    [
        ("9 eggs at $2 make 9 * 2 = <<9*2=18>>18.\n#### 18", "18"),
        ("First #### 17, then\n#### 2,125", "2125"),
        ("#### -3", "-3"),
        ("#### 1,234,567\n", "1234567"),
        ("18", "18"),
        (" $1,234.50 ", "1234.5"),
        ("-$5", "-5"),
        ("$-5.", "-5"),
        ("\N{MINUS SIGN}4", "-4"),
        ("007", "7"),
        (".5", "0.5"),
        ("-0.0", "0"),
        (18, "18"),
        (18.0, "18"),
        (0.25, "0.25"),
        (1e16, "10000000000000000"),
        (np.int64(7), "7"),
        (np.float32(2.5), "2.5"),
        (0, "0"),
    ],
)
def test_key_is_the_number_as_plain_digits(answer: Any, key: str) -> None:
    assert GSM8K().read_key({"question": "?", "answer": answer}) == key


@pytest.mark.parametrize(
    ("row", "phrase"),
    [
        ({}, "has no `answer`"),
        ({"answer": None}, "has no `answer`"),
        ({"answer": ""}, "has no `answer`"),
        ({"answer": "#### "}, "does not end in a number"),
        ({"answer": "Eighteen eggs.\n#### eighteen"}, "'eighteen'"),
        ({"answer": "#### 18 eggs"}, "'18 eggs'"),
        ({"answer": "#### 12,34"}, "'12,34'"),
        ({"answer": "#### 1/2"}, "'1/2'"),
        ({"answer": "."}, "does not end in a number"),
        ({"answer": True}, "no text and no number: True"),
        ({"answer": float("nan")}, "no text and no number: nan"),
        ({"answer": float("inf")}, "no text and no number: inf"),
        ({"answer": ["18"]}, "no text and no number: ['18']"),
    ],
)
def test_key_that_cannot_be_read_is_told(row: dict[str, Any], phrase: str) -> None:
    with pytest.raises(DataError) as caught:
        GSM8K().read_key(row)
    assert phrase in str(caught.value)


RIGHT, WRONG = "<think>9 * 2 = 18</think><answer>18</answer>", "<think>9 + 2 = 11</think><answer>11</answer>"


@pytest.mark.parametrize(
    ("version", "completion", "answer", "form", "correct", "in_form"),
    [
        ("torchrl", RIGHT, 0.9, 0.1, 1, 1),
        ("torchrl", WRONG, 0.0, 0.1, 0, 1),
        ("torchrl", "#### 18", 0.0, 0.0, 0, 0),
        ("torchrl", "", 0.0, 0.0, 0, 0),
        ("torchrl", "<answer></answer>", 0.0, 0.0, 0, 0),
        ("torchrl", "<answer> \n </answer>", 0.0, 0.0, 0, 0),
        ("torchrl", "<answer>18", 0.0, 0.0, 0, 0),
        ("torchrl", "<answer>18.00</answer>", 0.9, 0.1, 1, 1),
        ("torchrl", "<answer> $18 </answer>", 0.9, 0.1, 1, 1),
        ("torchrl", "<answer>18.00%</answer>", 0.9, 0.1, 1, 1),
        ("torchrl", "<answer>She saw 18 snakes</answer>", 0.9, 0.1, 1, 1),
        ("torchrl", "<answer>17</answer><answer>18</answer>", 0.0, 0.1, 0, 1),
        ("torchrl", "<think>Is it <answer>17</answer>? No.</think><answer>18</answer>", 0.9, 0.1, 1, 1),
        ("torchrl", "<think>Is it <answer>18</answer>?</think>", 0.0, 0.0, 0, 0),
        ("torchrl", "<think>Is it <answer>18</answer>?", 0.0, 0.0, 0, 0),
        ("torchrl", "<think>a < b & c > d</think><answer>18</answer>", 0.9, 0.1, 1, 1),
        ("seed", RIGHT, 90.0, 10.0, 1, 1),
        ("seed", "9 * 2 = 18</think><answer>18</answer>", 90.0, 10.0, 1, 1),
        ("seed", "<answer>18</answer>", 95.0, 5.0, 1, 0),
        ("seed", WRONG, 0.0, 10.0, 0, 1),
        ("seed", "", 0.0, 0.0, 0, 0),
        ("seed", "It is 18.", 0.0, 0.0, 0, 0),
        ("seed", "<think></think>", 0.0, 5.0, 0, 0),
        ("seed", "<answer>18 of 25</answer>", 10.0, 5.0, 0, 0),
        ("seed", "<answer>1834</answer>", 0.0, 5.0, 0, 0),
        ("seed", "<think></think><answer>17</answer><answer>18</answer>", 30.0, 5.0, 0, 0),
        ("seed", "<think>a < b & c</think><answer>18</answer>", 90.0, 10.0, 1, 1),
    ],
)
def test_versions_pay_for_answer_and_form(
    version: Any, completion: str, answer: float, form: float, correct: float, in_form: float
) -> None:
    verdict = GSM8K(GSM8KConfig(version=version, extractor="flexible")).verify(completion, "18")
    assert verdict.scores == pytest.approx({"answer": answer, "format": form})
    assert (verdict.facts["correct"], verdict.facts["format"]) == (correct, in_form)


@pytest.mark.parametrize("extractor", ["strict", "flexible", "verl", "math"])
@pytest.mark.parametrize(
    ("completion", "plain", "found", "whole"),
    [
        ("<think>9 eggs at 2 dollars make eighteen.</think><answer>18</answer>", 1, 1, {"flexible"}),
        (RIGHT, 1, 1, {"flexible", "math"}),
        ("<think>#### 18</think><answer>17</answer>", 0, 1, {"strict", "verl", "math"}),
        ("<think>So $18 it is: #### 18</think>", 0, 0, {"strict", "flexible", "verl", "math"}),
        ("<think>#### 18", 0, 0, {"strict", "flexible", "verl", "math"}),
        ("#### 18</think>no more", 0, 0, {"strict", "flexible", "verl", "math"}),
        ("<think>#### 17</think>\n#### 18", 1, 1, {"flexible", "verl", "math"}),
        ("<answer> </answer> #### 18", 0, 0, {"strict", "flexible", "verl", "math"}),
        ("<answer>17</answer> #### 18", 0, 1, {"strict", "flexible", "verl", "math"}),
        ("#### 17 <answer>18.00%</answer>", 1, 1, set()),
    ],
)
def test_plain_reads_the_answer_and_never_the_thinking(
    extractor: Any, completion: str, plain: int, found: int, whole: set[str]
) -> None:
    verdict = GSM8K(GSM8KConfig(extractor=extractor)).verify(completion, "18")
    assert verdict.scores == {"answer": plain}
    assert (verdict.facts["correct"], verdict.facts["extracted"]) == (plain, found)
    assert verdict.facts["format"] == found
    verdict = GSM8K(GSM8KConfig(extractor=extractor, version="whole")).verify(completion, "18")
    assert (verdict.scores, verdict.facts["correct"]) == ({"answer": extractor in whole}, extractor in whole)


@pytest.mark.parametrize("extractor", ["strict", "flexible", "verl", "math"])
def test_marked_answer_in_tags_is_read_by_every_extractor(extractor: Any) -> None:
    verifier = GSM8K(GSM8KConfig(version="torchrl", extractor=extractor))
    assert verifier.verify("<answer>So:\n#### 18</answer>", "18").facts["correct"] == 1
    assert verifier.verify("<answer>18</answer>", "18").facts["correct"] == 1


def test_plain_version_has_one_score_and_three_facts() -> None:
    verdict = GSM8K(GSM8KConfig(extractor="strict")).verify("#### 18", "18")
    assert verdict.scores == {"answer": 1.0}
    assert verdict.facts == {"correct": 1.0, "extracted": 1.0, "format": 1.0}
    verdict = GSM8K(GSM8KConfig(extractor="strict")).verify("It is 18.", "18")
    assert verdict.facts == {"correct": 0.0, "extracted": 0.0, "format": 0.0}


@pytest.mark.parametrize("extractor", ["strict", "flexible", "verl", "math"])
def test_extracted_tells_an_answer_from_none(extractor: Any) -> None:
    verifier = GSM8K(GSM8KConfig(extractor=extractor))
    assert verifier.verify("#### 7", "18").facts == {"correct": 0.0, "extracted": 1.0, "format": 1.0}
    assert verifier.verify("I do not know", "18").facts == {"correct": 0.0, "extracted": 0.0, "format": 0.0}


def test_verl_looks_at_the_last_characters_only_where_it_is_told_to() -> None:
    completion = "#### 18\n" + "x" * 299
    whole, clipped = (
        GSM8K(GSM8KConfig(extractor="verl", last_characters=limit)).verify(completion, "18").scores["answer"]
        for limit in (None, 300)
    )
    assert (whole, clipped) == (1.0, 0.0)


def test_checks_that_can_hang_say_so() -> None:
    assert GSM8K(GSM8KConfig(extractor="flexible")).timeout_s is None
    verifier = GSM8K(GSM8KConfig(extractor="math", check_timeout_s=1.5, processes=3))
    assert (verifier.timeout_s, verifier.processes) == (1.5, 3)


def test_verifier_and_key_survive_pickling() -> None:
    verifier = pickle.loads(pickle.dumps(GSM8K(GSM8KConfig(extractor="math", version="seed"))))
    assert verifier.config == GSM8KConfig(extractor="math", version="seed")
    assert verifier.verify(RIGHT, "18").facts["correct"] == 1


def test_plain_number_refuses_what_is_more_than_a_number() -> None:
    for text in ("", "-", "$", ".", "18 eggs", "1,23", "1 2", "18..", "--5", "1e5", "\u0661\u0668", "12:30"):
        assert plain_number(text) is None, text


def test_numbers_in_are_whole_numbers() -> None:
    assert numbers_in("1337, not 3: 13-7 = 6.0 and -2 or 1,024.") == {
        "1337",
        "3",
        "13",
        "7",
        "6",
        "-2",
        "1024",
    }


@pytest.mark.parametrize("module", ["math_verify", "latex2sympy2_extended", "antlr4"])
def test_missing_extra_is_told_before_the_run(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # as importlib sees a module that is not installed
    with pytest.raises(ConfigError, match=rf"needs {module}; install it with pip install -e .*\[math\]'"):
        GSM8K(GSM8KConfig(extractor="math"))
    GSM8K(GSM8KConfig(extractor="flexible"))
