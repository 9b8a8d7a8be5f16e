#!/usr/bin/env bash
# langdetect knows of a word in capitals no more than its first letter and its last two.
#
# Seen with langdetect 1.0.9 (Python 3.11).
# Guess: a sentence in capitals has the language of the same sentence in small letters: either case is folded, or the
#   profiles have counted capitals, too.
# Seen: from the second capital of a word on nothing is counted until the word ends, and then the last letters with the
#   blank behind them. If an X stands in the place of all letters between, the probabilities are the same to the last
#   digit: "THE WINDOW" and "THE WXXXOW" are one. What is left is little: of twelve plain English sentences two become
#   Vietnamese with more than 0.99, and a German one English. In small letters all twelve are English. Checks for
#   "English, in capital letters only", as in IFEval, ask langdetect with the capitals.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet langdetect==1.0.9
"$folder/venv/bin/python" - <<'PY'
from langdetect import DetectorFactory, detect_langs

ENGLISH = """she walked home slowly and thought about the letter
the train to boston leaves an hour late this morning because the track is closed
please close the window before you leave the house tonight
we will go there again next year
my brother sold his old bicycle to the man who lives next door
the soup was too salty but nobody at the table said a word
there are three reasons why this plan will not work
i have never seen so many birds in one tree before
you should water the plants twice a week during the summer
the library opens at nine and closes at six on weekdays
nobody knows who painted the small picture in the hall
rain is expected in the north tomorrow with strong winds in the evening""".splitlines()
GERMAN = "morgen soll es im norden regnen am abend mit starkem wind"
DetectorFactory.seed = 0


def languages(text):
    return str(detect_langs(text))


def hollow(word):
    return word if len(word) < 4 else word[0] + "X" * (len(word) - 3) + word[-2:]


wrong = []
for text in ENGLISH:
    small, capitals = languages(text), languages(text.upper())
    hollowed = " ".join(map(hollow, text.upper().split()))
    print(f"{small} {capitals} {languages(hollowed)} {hollowed}")
    assert small.startswith("[en:") and languages(hollowed) == capitals != small, text
    if not capitals.startswith("[en:"):
        wrong.append(capitals)
print(f"not English in capitals: {wrong} of {len(ENGLISH)}; German in capitals: {languages(GERMAN.upper())}")
assert len(wrong) == 2 and all(found.startswith("[vi:0.99") for found in wrong)
assert languages(GERMAN.upper()).startswith("[en:0.99") and "en" not in languages(GERMAN)
print("as stated")
PY
