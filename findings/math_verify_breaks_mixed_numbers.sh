#!/usr/bin/env bash
# math-verify reads "3 1/2" as 1 in text, and as 2 inside \boxed{}; neither is 7/2, nor is it refused.
#
# Seen with math-verify 0.9.0, latex2sympy2_extended 1.11.0, sympy 1.14.0 (Python 3.11).
# Guess: a mixed number is 7/2, as `3\frac{1}{2}` is in LaTeX; or, where the reader knows no mixed numbers, it is not
#   understood and gives nothing, so that a right answer is at worst not recognised.
# Seen: the pattern for formulas takes "3 1/2" whole, sympy cannot read it, and the search goes on inside of what it has
#   just taken: the next match is a number with a blank before it, the numerator. So 3 1/2 and 12 1/2 are 1, 2 3/4 is 3,
#   "5 × 3" is 3 and "5 ÷ 2" is 2, though both signs stand in the pattern. The list that `parse` returns shows the
#   whole text beside the wrong value: [1, '3 1/2']. In dollars or a box the grammar of LaTeX adds the whole number to
#   the numerator: 3 1/2 is (3 + 1) / 2 = 2 and 2 1/2 is 3/2. `\frac{1}{2}` instead of `1/2` makes it right. A
#   right 3.5 is therefore no match for a gold answer of 3 1/2, nor the other way round.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet math-verify==0.9.0 latex2sympy2_extended==1.11.0 sympy==1.14.0
"$folder/venv/bin/python" - <<'PY'
import sympy
from math_verify import parse, verify

SEEN = {
    "The recipe needs 3 1/2 cups.": "1",
    "The plank is 12 1/2 feet long.": "1",
    "2 3/4": "3",
    "5 × 3": "3",
    "5 ÷ 2": "2",
    "$3 1/2$": "2",
    r"The answer is \boxed{3 1/2}.": "2",
    r"\boxed{2 1/2}": "3/2",
    # what is read right
    r"\boxed{3\frac{1}{2}}": "7/2",
    "3 + 1/2": "7/2",
    "7/2": "7/2",
    "5 / 2": "5/2",
}
for text, value in SEEN.items():
    found = parse(text)
    print(f"{text!r:<36}{found}")
    assert sympy.simplify(found[0]) == sympy.Rational(value), text
for text in (text for text in SEEN if "3 1/2" in text):
    assert not verify(parse("3.5"), parse(text)) and not verify(parse(text), parse("3.5")), text
print("as stated")
PY
