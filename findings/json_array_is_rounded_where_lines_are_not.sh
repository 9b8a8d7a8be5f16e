#!/usr/bin/env bash
# Rows of scores that datasets reads from a JSON array have ten decimals and no NaN; the same rows as lines are whole.
#
# Seen with datasets 5.2.0, pandas 3.0.6, pyarrow 25.0.1 (Python 3.11).
# Guess: `load_dataset("json")` gives the numbers that the file holds, float64 as Python's json reads them; whether the
#   rows stand in an array, as evaluation files of reward models have them, or one a line, changes nothing. If NaN is
#   no JSON, both forms refuse it.
# Seen: an array is written out again, row by row, by pandas' encoder with its ten decimals, and only that text is
#   read. From lines all values keep every bit. From an array a third is 0.3333333333; probabilities of 3e-12 and
#   -4.9e-11 are 0.0 and -0.0, though 1e-17, which is written with an exponent, stays; the largest float64 is infinite;
#   NaN, a score that failed, is None. Two rewards that differ in the eleventh decimal tie, and best-of-n takes the
#   other answer. There is no warning.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0 pandas==3.0.6 pyarrow==25.0.1
cd "$folder"
HF_HUB_OFFLINE=1 HF_HOME="$folder" "$folder/venv/bin/python" - <<'PY'
import json
import logging
import math
import sys
import warnings
from pathlib import Path

import datasets

warnings.simplefilter("error")
datasets.disable_progress_bars()
said = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("datasets").addHandler(handler)

LARGEST = sys.float_info.max
VALUES = [0.1 + 0.2, 1 / 3, -7.123456789012345, 3e-12, -4.9e-11, 1e-17, LARGEST, math.nan, 2.5]
TIE = [0.50000000001, 0.50000000004]
rows = [{"answers": ["a", "b"], "proxy_scores": TIE, "score": value} for value in VALUES]
Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
Path("eval-0.json").write_text(json.dumps(rows))


def read(path):
    return datasets.load_dataset("json", data_files=path, split="train")


def same(left, right):
    """Whether two floats are the same, NaN and the sign of zero included."""
    return repr(left) == repr(right)


def best(row):
    return row["answers"][max((0, 1), key=lambda i: row["proxy_scores"][i])]


lines, array = read("rows.jsonl"), read("eval-0.json")
for value, from_lines, from_array in zip(VALUES, lines["score"], array["score"]):
    print(f"written {value!r}: read from lines {from_lines!r}, from an array {from_array!r}")
print(f"best answer of a row: from lines {best(lines[0])}, from an array {best(array[0])}")
assert all(map(same, lines["score"], VALUES)) and best(lines[0]) == "b"
expected = [0.3, 0.3333333333, -7.123456789, 0.0, -0.0, 1e-17, math.inf, None, 2.5]
assert all(map(same, array["score"], expected)), array["score"]
assert array[0]["proxy_scores"] == [0.5, 0.5] and best(array[0]) == "a"
assert not said, said
print("as stated")
PY
