#!/usr/bin/env bash
# MTLD gives a text without any repetition the lowest diversity, and five to thirty times as much once a word is repeated.
#
# Seen with lexicalrichness 0.5.1 and taaled 0.32, threshold 0.72 (Python 3.11).
# Guess: MTLD measures lexical diversity, so of two texts that differ by one repeated word the one without it has more;
#   of a text whose words are all different it is at least as many words as it has, and both packages say the same.
# Seen: 16 different words have 16.0 by lexicalrichness and 0 by taaled, which is the least that it ever gives. With the
#   first word once more at the end it is 80.92 by both, with another one more 45.36. Of 40 different words: 40.0 and 0,
#   then 470.68. The unfinished stretch counts as (1 - TTR) / (1 - threshold) of a factor, so the closer its TTR is to 1
#   the less the words are divided by; at 1 itself there is nothing to divide by, and each package has its own way out.
#   A policy that is rewarded for diversity of short texts learns to say one word twice.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet lexicalrichness==0.5.1 taaled==0.32
"$folder/venv/bin/python" - <<'PY'
import string

from lexicalrichness import LexicalRichness
from taaled import ld


def both(words):
    return round(LexicalRichness(" ".join(words)).mtld(threshold=0.72), 2), round(ld.lexdiv(words).mtld, 2)


letters = string.ascii_lowercase
for number, without, repeated in ((16, (16.0, 0), (80.92, 80.92)), (40, (40.0, 0), (470.68, 470.68))):
    words = [f"word{letters[index // 26]}{letters[index % 26]}" for index in range(number)]
    found = both(words), both([*words, words[0]])
    print(f"{number} different words: {found[0]}; the first of them again: {found[1]}")
    assert found == (without, repeated), found
words = [f"word{letter}" for letter in letters[:16]]
again = both([*words, *words[:2]])
print(f"16 different words, two of them again: {again}")
assert again == (45.36, 45.36), again
PY
echo "as stated"
