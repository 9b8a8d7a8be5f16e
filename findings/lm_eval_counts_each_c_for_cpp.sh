#!/usr/bin/env bash
# IFEval in lm-eval counts the keyword "c++" wherever there is a letter c, since Python 3.11.
#
# Seen with lm_eval 0.4.13 (Python 3.11).
# Guess: a keyword is searched for as it is written; or, if it is taken for a regular expression, "c++" is none and
#   raises an error ("multiple repeat"), so that the row is noticed.
# Seen: keywords are regular expressions, and since Python 3.11 a second plus is valid: it makes the first one
#   possessive, so "c++" means one c or more. A text about Python with six letters c in it has "c++" six times and does
#   not follow "less than 3 times"; one that writes c++ once has as many as it has letters c. A forbidden "c++" forbids
#   vitamin C. "g++" and "notepad++" lose both plus signs likewise. Python 3.10 raises the error.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet lm_eval==0.4.13 langdetect==1.0.9 immutabledict==4.3.1 nltk==3.10.4
# The rank keeps it from downloading a tokenizer of sentences, which is not needed here.
LOCAL_RANK=1 "$folder/venv/bin/python" - <<'PY'
import sys

from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

assert sys.version_info >= (3, 11), "before Python 3.11 it raises an error"


def follows(instruction, text, **kwargs):
    checker = INSTRUCTION_DICT[instruction]("row")
    print(checker.build_description(**kwargs), repr(text), end=" ")
    print(followed := checker.check_following(text))
    return followed


def count(keyword, text):
    """How often lm-eval finds a keyword: the first number that it is less than, less one."""
    kind = INSTRUCTION_DICT["keywords:frequency"]
    for limit in range(1, 100):
        checker = kind("row")
        checker.build_description(keyword=keyword, frequency=limit, relation="less than")
        if checker.check_following(text):
            return limit - 1
    raise AssertionError("found without end")


SCRIPTS = "Python scripts can call each function once."
assert not follows("keywords:frequency", SCRIPTS, keyword="c++", frequency=3, relation="less than")
assert not follows("keywords:forbidden_words", "An orange has vitamin C.", forbidden_words=["c++"])
for keyword, text, number in (
    ("c++", SCRIPTS, 6),
    ("c++", "I teach c++.", 2),
    ("g++", "It is compiled by gcc, not by g++.", 2),
    ("notepad++", "Open it in notepad.", 1),
):
    found = count(keyword, text)
    print(f"{keyword} in {text!r}: {found} times")
    assert found == number, (keyword, text, found)
print("as stated")
PY
