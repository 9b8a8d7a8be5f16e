"""Check of an answer to a word problem in GSM8K's form, whose solution ends in `#### 18`.

    verifier = GSM8K(GSM8KConfig(extractor="strict"))
    key = verifier.read_key({"answer": "She sells 9 at $2, 9 * 2 = 18.\\n#### 18"})     # "18"
    verifier.verify("9 eggs at $2 make 18.\\n#### 18", key).scores                       # {"answer": 1.0}

Extractors find the answer in a completion. `strict` and `flexible` are the two filters of lm-eval's task
gsm8k version 3 with the normalisation of its exact match (lm-eval 0.4.13), `verl` is verl's strict method
(0.9.1), `math` is math-verify (0.9.0). They compare text with text, except `math`, so that 18.00 is not 18.
docs/verifiable_rewards.md tells what each gets wrong.

Versions say what is read, and what a right answer, a wrong one and the form are worth:

    plain     1 for a right answer, else 0. The first <answer> is read, and where there is none the text
              outside of the thinking.
    whole     the same, but the extractor reads the whole completion, thinking and tags included, as the
              program does that it is named after.
    torchrl   1.0 for a right answer in <answer> tags, 0.1 for a wrong one there, 0 without one.
    seed      100 for a right answer in <answer> tags, else the sum of 20 (a later <answer> is right), 10 (an
              <answer> contains the right number), 5 (exactly one <answer>) and 5 (exactly one <think>).

`torchrl` and `seed` judge the first <answer>, as TorchRL's GSM8K reward and its first version do, and so does
`plain`. An <answer> that is nothing but a number, with or without $, % and commas, is compared as a number
(18.00 is 18); other text in it is read by the extractor, where TorchRL compares the whole text and finds
"36 snakes" wrong.

Mended in `torchrl` and `seed`: tags are found as text, so that "<" and "&" in the reasoning lose nothing (an
XML parser read them once); an <answer> inside the thinking is no answer; an empty or missing <answer> earns
nothing (each counted as one, since the text was wrapped in a list); "contains" asks for a whole number, so
that 3 is not in 1337. Kept: reasoning that the prompt opened needs no <think> of its own, and `seed` pays for
guesses: ten of them in one <answer> earn the 10 if one is right.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from numbers import Real
from typing import Any

from conch.config.verifiers import GSM8KConfig
from conch.errors import DataError
from conch.rewards.verifiers import gsm8k_math
from conch.rewards.verifiers.base import Verdict, Verifier
from conch.rewards.verifiers.tags import read_tags

_MARKED = re.compile(r"#### (-?[0-9.,]+)")
_ANYWHERE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
_NUMBER = re.compile(r"(?:\$?([-+]?)|([-+])\$)([0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.([0-9]*))?")
_NUMBERS_IN_TEXT = re.compile(r"(?:(?<![0-9])-)?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?")


class GSM8K(Verifier[str]):
    """Checks a completion's number against the one that the row's `answer` ends in.

    Scores: `answer`, and with `version=torchrl` or `seed` also `format`, what the form alone is worth.
    Facts: `correct`; `extracted`, whether an answer to compare was found at all; `format`, whether the form
    is there: an <answer> with content, or without any <answer> a number after `####` (plain), a number after
    `####` (whole), an <answer> with content (torchrl), one <answer> and one <think> (seed).
    """

    name = "gsm8k"
    columns = ("answer",)

    def __init__(self, config: GSM8KConfig = GSM8KConfig()) -> None:  # noqa: B008 (sections are frozen)
        self.config = config
        if config.extractor == "math":
            gsm8k_math.check_installed()
            self.timeout_s = config.check_timeout_s
            self.processes = config.processes

    def warm_up(self) -> None:
        if self.config.extractor == "math":
            gsm8k_math.warm_up()

    def read_key(self, row: Mapping[str, Any]) -> str:
        """Plain digits of the number after the last `####` in the row's `answer`, or of an `answer` that is a
        number."""
        value = row.get("answer")
        if value is None or value == "":
            raise DataError("has no `answer`")
        if isinstance(value, str):
            text = value.rpartition("####")[2]
        elif isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
            text = format(Decimal(str(value)), "f")
        else:
            raise DataError(f"has an `answer` that is no text and no number: {value!r}")
        number = plain_number(text)
        if number is None:
            raise DataError(
                "has an `answer` that does not end in a number such as `#### 1,234`, nor is one: "
                f"{text.strip()[-80:]!r}"
            )
        return number

    def verify(self, completion: str, key: str) -> Verdict:
        version = self.config.version
        if version == "whole":
            return self._verify_text(completion, key)
        tags = read_tags(completion)
        if version == "plain" and not tags.answers:
            return self._verify_text(tags.outside, key)
        first = tags.answers[0] if tags.answers else ""
        correct, extracted = self._compare_answer(first, key) if first else (False, False)
        if version == "plain":
            return Verdict({"answer": float(correct)}, _facts(correct, extracted, bool(first)))
        if version == "torchrl":
            in_form = bool(first)
            form, other, right = 0.1 * in_form, 0.0, 1.0
        else:
            one_answer, one_thought = len([*filter(None, tags.answers)]) == 1, len(tags.thoughts) == 1
            in_form = one_answer and one_thought
            form, right = 5.0 * one_answer + 5.0 * one_thought, 100.0
            later_is_right = any(self._compare_answer(answer, key)[0] for answer in tags.answers[1:])
            other = 20.0 * later_is_right + 10.0 * any(key in numbers_in(answer) for answer in tags.answers)
        scores = {"answer": right - form if correct else other, "format": form}
        return Verdict(scores, _facts(correct, extracted, in_form))

    def _verify_text(self, text: str, key: str) -> Verdict:
        """1 where the extractor finds `key` in a text without tags that matter, else 0."""
        correct, extracted = self._compare(text, key)
        marked = _MARKED.search(text) is not None
        return Verdict({"answer": float(correct)}, _facts(correct, extracted, marked))

    def _compare(self, text: str, key: str) -> tuple[bool, bool]:
        """Whether the extractor finds `key` in a text, and whether it finds anything."""
        if self.config.extractor == "math":
            return gsm8k_math.compare(text, key)
        if self.config.extractor == "verl":
            number = extract_verl(text, self.config.last_characters)
        else:
            number = {"strict": extract_strict, "flexible": extract_flexible}[self.config.extractor](text)
        return number == key, number is not None

    def _compare_answer(self, answer: str, key: str) -> tuple[bool, bool]:
        """The same for the content of an <answer>, which may be nothing but the number."""
        number = plain_number(answer.removesuffix("%"))
        return self._compare(answer, key) if number is None else (number == key, True)


def extract_strict(completion: str) -> str | None:
    """First number after `#### `, as lm-eval's `strict-match` compares it; None where there is none."""
    match = _MARKED.search(completion)
    return None if match is None else _ignore_signs(match[1])


def extract_flexible(completion: str) -> str | None:
    """Last run of digits, dots, commas and $, as lm-eval's `flexible-extract` compares it.

    The run need hold no digit: of "18..." and of "18 eggs ..." nothing is left that equals 18. None where
    there is no run.
    """
    runs = _ANYWHERE.findall(completion)
    return _ignore_signs(runs[-1]) if runs else None


def extract_verl(completion: str, last_characters: int | None = None) -> str | None:
    """Last number after `#### ` in the last `last_characters` characters, as verl's strict method compares
    it; None where there is none."""
    numbers = _MARKED.findall(completion if last_characters is None else completion[-last_characters:])
    return numbers[-1].replace(",", "") if numbers else None


def _ignore_signs(number: str) -> str:
    """Drop commas, $ and one dot at the end, as lm-eval's exact match does."""
    return number.replace(",", "").replace("$", "").removesuffix(".")


def plain_number(text: str) -> str | None:
    """A number alone in a text as plain digits, "$1,234.50" as "1234.5"; None where it is anything else.

    Commas must separate thousands: "12,34" is none. A dollar sign, a dot at the end and zeros that say
    nothing are dropped.
    """
    match = _NUMBER.fullmatch(text.strip().replace("\N{MINUS SIGN}", "-"))
    if match is None or not (match[3] or match[4]):
        return None
    whole = match[3].replace(",", "").lstrip("0") or "0"
    fraction = (match[4] or "").rstrip("0")
    number = f"{whole}.{fraction}" if fraction else whole
    return f"-{number}" if "-" in (match[1] or match[2] or "") and number != "0" else number


def numbers_in(text: str) -> set[str]:
    """All whole numbers of a text as plain digits: "13, not 7.0" gives 13 and 7, and no 3."""
    return {number for match in _NUMBERS_IN_TEXT.findall(text) if (number := plain_number(match)) is not None}


def _facts(correct: bool, extracted: bool, in_form: bool) -> dict[str, float]:
    return {"correct": float(correct), "extracted": float(extracted), "format": float(in_form)}
