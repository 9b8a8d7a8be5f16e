#!/usr/bin/env bash
# math-verify does not see the number in `<answer>18</answer>`, and takes an earlier one if there is one.
#
# Seen with math-verify 0.9.0, latex2sympy2_extended 1.11.0, sympy 1.14.0 (Python 3.11).
# Guess: the last number of a text is found whatever mark stands before it; a tag or a bracket around the answer makes
#   it plainer, if anything.
# Seen: outside of LaTeX a number counts only behind white space, "=" or the beginning of the text (with ** or a sign of
#   currency between). Behind ">", ":", "(", a quotation mark, "+" or U+2212 it is not there: `<answer>18</answer>` and
#   "Answer:18" give an empty list, `<answer> 18 </answer>` and "Answer: 18" give 18. Texts with other numbers give one
#   of those without any sign of it: "12 apples and 6 pears: <answer>18</answer>" is 6. A minus belongs behind the
#   dollar: "$-18" is -18, "-$18" is nothing. U+2212 does no harm in LaTeX.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet math-verify==0.9.0 latex2sympy2_extended==1.11.0 sympy==1.14.0
"$folder/venv/bin/python" - <<'PY'
from math_verify import parse

SEEN = {
    "<answer>18</answer>": None,
    "<answer> 18 </answer>": 18,
    "Answer:18": None,
    "Answer: 18": 18,
    "answer=18": 18,
    "(18)": None,
    "( 18 )": 18,
    '"18"': None,
    "**18**": 18,
    "+18": None,
    "-18": -18,
    "\N{MINUS SIGN}18": None,
    "$\N{MINUS SIGN}18$": -18,
    "-$18": None,
    "$-18": -18,
    "12 apples and 6 pears: <answer>18</answer>": 6,
    "12 apples and 6 pears: <answer> 18 </answer>": 18,
    "12 apples and 6 pears make (18)": 6,
    "12 less 30 is -$18": 30,
    "12 less 30 is \N{MINUS SIGN}18": 30,
}
for text, value in SEEN.items():
    found = parse(text)
    print(f"{text!r:<50}{found}")
    assert (found[0] if found else None) == value, (text, found, value)
print("as stated")
PY
