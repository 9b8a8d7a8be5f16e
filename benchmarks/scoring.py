"""`conch score` over long files: rows per second, and how much memory it takes for more of them.

    python -m benchmarks.scoring --url 127.0.0.1:8001/walks --rows 20000 200000

Each run is a process of its own, whose largest resident memory the kernel counts. A row is a prompt and a
completion of 200 characters; every one is different, so that the client's cache knows none. Without --url a
Python function that returns lengths scores them, which shows what reading and writing cost.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow
from pyarrow import parquet

_FUNCTION = """
def lengths(samples, prompts, outputs):
    return [float(len(sample)) for sample in samples]
"""
_PART = 10_000


def row_of(number: int) -> dict[str, object]:
    """One row; all are different."""
    return {"id": number, "prompt": f"question {number}: " + "q" * 80, "completion": "a" * (60 + number % 80)}


def write_rows(path: Path, count: int) -> None:
    """Write a file of the kind that its ending names."""
    parts = (range(start, min(count, start + _PART)) for start in range(0, count, _PART))
    if path.suffix == ".parquet":
        schema = pyarrow.Table.from_pylist([row_of(0)]).schema
        with parquet.ParquetWriter(path, schema) as writer:
            for part in parts:
                writer.write_table(pyarrow.Table.from_pylist([row_of(number) for number in part]))
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(row_of(0)))
        if path.suffix == ".csv":
            table.writeheader()
        for number in range(count):
            if path.suffix == ".csv":
                table.writerow(row_of(number))
            else:
                file.write(json.dumps(row_of(number)) + "\n")


def measure(path: Path, output: Path, reward: list[str]) -> tuple[float, float, float]:
    """Score a file in a process of its own; returns its seconds, those of processor time, and its largest
    memory in MiB."""
    command = [sys.executable, "-c", _CHILD, "score", str(path), *reward, "--keep", "-o", str(output)]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    cpu, memory = map(float, done.stdout.splitlines()[-1].split())
    return time.monotonic() - started, cpu, memory


# What `getrusage` says of a process counts the one that started it, too.
_CHILD = """
import sys, time
from pathlib import Path
from conch.__main__ import main
code = main(sys.argv[1:])
memory = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
print(time.process_time(), memory)
sys.exit(code)
"""


def main() -> None:
    """Measure each number of rows in each kind of file, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--url", help="a served model; by default a Python function")
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 200_000])
    parser.add_argument("--endings", nargs="+", default=["jsonl", "csv", "parquet"])
    arguments = parser.parse_args()
    print("| input and output | rows | rows/s | rows per s of processor time | peak memory, MiB |")
    print("|---|---|---|---|---|", flush=True)
    with TemporaryDirectory() as folder:
        own = Path(folder) / "own.py"
        own.write_text(_FUNCTION)
        reward = ["--url", arguments.url] if arguments.url else ["--reward", f"{own}:lengths"]
        for ending in arguments.endings:
            for count in arguments.rows:
                path, output = Path(folder) / f"in.{ending}", Path(folder) / f"{count}.{ending}"
                write_rows(path, count)
                seconds, cpu, memory = measure(path, output, reward)
                rates = f"{count / seconds:,.0f} | {count / cpu:,.0f}"
                print(f"| {ending} | {count:,} | {rates} | {memory:.0f} |", flush=True)


if __name__ == "__main__":
    main()
