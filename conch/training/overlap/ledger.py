"""The ledger of a run: a line for each group that was trained, so that anyone can see that each prompt of the
data was learned from once, whatever died meanwhile.

A line: {"step": of training, "rank", "number": of the group, "position": in the walk over the data, "row": of
the data, "epoch", "versions": [lowest, highest] of the weights that sampled it, "scored": completions with a
reward}.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conch.atomic_files import replace_text

LEDGER_FILE = "ledger.jsonl"


def append_to_ledger(run_dir: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Append a step's lines in one write; they are on disk before a checkpoint counts on them."""
    with (run_dir / LEDGER_FILE).open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


def cut_ledger(run_dir: Path, last_step: int) -> None:
    """Drop the lines of steps after `last_step`, which a resumed run does again, and one that a kill cut."""
    if (run_dir / LEDGER_FILE).exists():
        kept = [line for line in read_ledger(run_dir) if line["step"] <= last_step]
        replace_text(run_dir / LEDGER_FILE, "".join(json.dumps(line) + "\n" for line in kept))


def read_ledger(run_dir: Path) -> list[dict[str, Any]]:
    """All whole lines of a run's ledger."""
    lines: list[dict[str, Any]] = []
    for text in (run_dir / LEDGER_FILE).read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:  # a kill cut it short: its step was not saved either
            continue
    return lines


def ledger_faults(run_dir: Path, num_rows: int) -> list[str]:
    """What is wrong with a run's ledger, in words; nothing where each position of the walk over the data,
    from the first to the last that was trained, stands in it once.

    num_rows: of the data.
    """
    lines = read_ledger(run_dir)
    counts = Counter(line["position"] for line in lines)
    missing = sorted(set(range(max(counts, default=-1) + 1)) - set(counts))
    doubled = sorted(position for position, count in counts.items() if count > 1)
    faults = [f"position {position} was not trained" for position in missing]
    faults += [f"position {position} was trained {counts[position]} times" for position in doubled]
    in_epochs = Counter((line["position"] // num_rows, line["row"]) for line in lines)
    faults += [
        f"row {row} was trained {count} times in epoch {epoch}"
        for (epoch, row), count in sorted(in_epochs.items())
        if count > 1
    ]
    return faults
