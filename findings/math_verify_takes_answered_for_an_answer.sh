#!/usr/bin/env bash
# Where a solution says that somebody answers calls, math-verify takes the number of the calls for the result.
#
# Seen with math-verify 0.9.0, latex2sympy2_extended 1.11.0, sympy 1.14.0 (Python 3.11).
# Guess: "The answer is" leads to the result; in a text without it the last number counts, so that the "#### 24" at the
#   end of a solution in the form of GSM8K is found.
# Seen: any word that has "answer" in it leads to one, "answers", "answered" and "unanswered" too, and it goes before
#   the last number, however many lines later that comes. What is taken is the first number within 50 characters behind
#   the word, not the last of the sentence: "The answer is 4 calls an hour times 6, which makes 24." is 4. An "=" up to
#   100 characters behind the word turns it round: then the number behind the last "=" counts. The same solution with
#   "takes" in the place of "answers" is read right, and so is a \boxed{24} behind either.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet math-verify==0.9.0 latex2sympy2_extended==1.11.0 sympy==1.14.0
"$folder/venv/bin/python" - <<'PY'
from math_verify import parse

SEEN = {
    "Mia answers 4 calls an hour for 6 hours, which makes 24.\n#### 24": 4,
    "Mia takes 4 calls an hour for 6 hours, which makes 24.\n#### 24": 24,
    "Sam answered 3 of 20 questions, so 17 are left.\n#### 17": 3,
    "Sam did 3 of 20 questions, so 17 are left.\n#### 17": 17,
    "Of all letters 5 stay unanswered after 2 days, so 30 were sent.\n\nThe total is 30": 2,
    "The answer is 4 calls an hour times 6, which makes 24.": 4,
    "18 or 20": 20,
    "The answer is 18 or 20": 18,
    # what is read right
    "Mia answers 4 calls an hour for 6 hours, 4 * 6 = 24.\n#### 24": 24,
    "Mia answers 4 calls an hour for 6 hours, which makes 24.\nThe answer is 24.": 24,
    "Mia answers 4 calls an hour for 6 hours, which makes 24.\n\\boxed{24}": 24,
}
for text, value in SEEN.items():
    found = parse(text)
    print(f"{text!r:<90}{found}")
    assert found[0] == value, (text, found, value)
print("as stated")
PY
