"""Trip wires: which rows get which, and what trips them."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from conch.errors import ConfigError, DataError
from conch.rewards.verifiers.ifeval.rows import Instruction
from conch.rewards.verifiers.ifeval.trip_wires import WIRES, add_trip_wires
from conch.rewards.verifiers.ifeval.verifier import IFEval

SHARED = Path(__file__).resolve().parents[5] / "shared/data"
ROWS: list[dict[str, Any]] = [
    {"prompt": f"Say {word}.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    for word in ("river", "bridge", "stone", "water")
]
POSTSCRIPT = {
    "instruction_id_list": ["detectable_content:postscript", "startend:quotation"],
    "kwargs": [{"postscript_marker": "P.S."}, {}],
}


def facts(completion: str, row: dict[str, Any]) -> Any:
    verifier = IFEval()
    return verifier.verify(completion, verifier.read_key(row))


def test_tripped_is_the_share_of_wires_that_are_followed_and_earns_nothing() -> None:
    row = {**ROWS[0], "trip_wires": POSTSCRIPT}
    honest, cheat = facts("A river", row), facts("A river\nP.S. More", row)
    assert (honest.facts["tripped"], cheat.facts["tripped"]) == (0.0, 0.5)
    assert honest.scores == cheat.scores == {"instructions": 1.0}
    assert facts("", row).facts["tripped"] == 0.0
    assert math.isnan(facts("A river", ROWS[0]).facts["tripped"])
    as_text = {**row, "trip_wires": json.dumps(POSTSCRIPT)}
    assert facts("P.S. More", as_text).facts["tripped"] == 0.5
    assert (
        facts("P.S. More", {**row, "trip_wires": json.loads(json.dumps(POSTSCRIPT))}).facts["tripped"] == 0.5
    )


@pytest.mark.parametrize(
    ("wires", "phrase"),
    [
        ("P.S.", "has 'P.S.' as `trip_wires`; it must be an object with `instruction_id_list` and `kwargs`"),
        ({"instruction_id_list": ["x"], "kwargs": [{}]}, "has in `trip_wires` the unknown instruction `x`; "),
        ({"instruction_id_list": []}, "has in `trip_wires` no `kwargs`"),
    ],
)
def test_wires_that_cannot_be_read_say_why(wires: Any, phrase: str) -> None:
    with pytest.raises(DataError) as error:
        IFEval().read_key({**ROWS[0], "trip_wires": wires})
    assert str(error.value).startswith(phrase)


def test_wires_are_drawn_by_seed_and_place_and_leave_the_rest_of_the_row_alone() -> None:
    wired = add_trip_wires(ROWS, seed=3)
    assert [{**row, "trip_wires": None} for row in wired] == [{**row, "trip_wires": None} for row in ROWS]
    assert all("trip_wires" not in row for row in ROWS)
    assert [len(row["trip_wires"]["kwargs"]) for row in wired] == [2] * 4
    assert add_trip_wires(ROWS, seed=3) == wired
    assert add_trip_wires(ROWS[:2], seed=3) == wired[:2]
    assert add_trip_wires(ROWS * 5, seed=4) != add_trip_wires(ROWS * 5, seed=3)
    assert add_trip_wires(wired, seed=9) == wired
    for row in wired:
        IFEval().read_key(row)


def test_a_share_of_the_rows_gets_wires() -> None:
    every = add_trip_wires(ROWS * 100)
    some = add_trip_wires(ROWS * 100, share=0.25)
    wired = [place for place, row in enumerate(some) if "trip_wires" in row]
    assert 70 < len(wired) < 130
    assert all(some[place] == every[place] for place in wired)
    assert add_trip_wires(ROWS, share=0.0) == ROWS


def test_no_wire_is_what_the_row_asks_for_in_a_list_or_in_words() -> None:
    quoted = {"prompt": "Write.", "instruction_id_list": ["startend:quotation"], "kwargs": [{}]}
    in_words = {**ROWS[0], "prompt": "End with a postscript, in two sections."}
    for row, absent in ((quoted, {"startend"}), (in_words, {"detectable_content", "combination"})):
        drawn = add_trip_wires([row] * 50, per_row=len(WIRES))
        assert all(
            Instruction(name).group not in absent
            for each in drawn
            for name in each["trip_wires"]["instruction_id_list"]
        )


@pytest.mark.parametrize(("per_row", "share"), [(0, 1.0), (1, 1.5), (1, -0.1)])
def test_numbers_out_of_range_are_refused(per_row: int, share: float) -> None:
    with pytest.raises(ConfigError, match="`per_row` must be at least 1"):
        add_trip_wires(ROWS, per_row=per_row, share=share)


@pytest.mark.skipif(not SHARED.exists(), reason=f"needs answers that people and models gave: {SHARED}")
def test_honest_answers_hardly_ever_trip_a_wire() -> None:
    answers: list[str] = []
    with gzip.open(SHARED / "hh/harmless-base.jsonl.gz", "rt", encoding="utf-8") as lines:
        answers += [json.loads(line)["chosen"].rsplit("\n\nAssistant:", 1)[1] for line in lines]
    with gzip.open(SHARED / "gsm8k/test.jsonl.gz", "rt", encoding="utf-8") as lines:
        answers += [json.loads(line)["answer"] for line in lines]
    wires = [Instruction(wire.type, dict(wire.kwargs)) for wire in WIRES]
    tripped = Counter(wire.type for wire in wires for answer in answers if wire.is_followed_by(answer))
    assert max(tripped.values(), default=0) / len(answers) < 0.002
