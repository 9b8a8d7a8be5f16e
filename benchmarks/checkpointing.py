"""How long training stands still for a checkpoint, written beside it or waited for.

    python -m benchmarks.checkpointing --ranks 1 2

SFT of a GPT-2 shape of 100 million weights in float32 under DeepSpeed ZeRO-2 on the CPU, one process and two.
In each round one checkpoint is waited for and one is written beside training, in turns; between them steps
are taken with nothing beside them. Every checkpoint replaces the one before, on the disk of `--folder`.

Stop: seconds in which training stood still, the deletion of the former checkpoint among it. Write: until the
folder has its name; of one written beside training, from the end of the copy. Longer: by how much the steps
beside the write took longer than those of the round with nothing beside them, all together; a cost of shared
processors that is no stop. Lost is both.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measuring import cell, forget_peak, head, resident_bytes, run_unbound, spread, timed
from benchmarks.sized import SHAPES, launched, sized_sft
from conch.cli import run_main
from conch.trainers.sft import SFTTrainer
from conch.training.checkpointing import look_after_checkpoint, save_checkpoint

WAYS = ("waited for", "beside training")
QUIET_STEPS = 3
TIMEOUT_S = 3600.0


def one_checkpoint(trainer: SFTTrainer, *, background: bool) -> dict[str, float]:
    """Seconds of one checkpoint, of the steps beside it, and the memory that its copy took."""
    run = trainer.run
    quiet = [timed(lambda: _step(trainer))[1] for _ in range(QUIET_STEPS)]
    run.take_times()
    before = resident_bytes()
    save_checkpoint(trainer, background=background)
    copied = resident_bytes() - before if background else 0
    beside: list[float] = []
    while run.pending is not None:
        beside.append(timed(lambda: _step(trainer))[1])
        look_after_checkpoint(trainer)
    times = run.take_times()
    usual = median(quiet)
    return {
        "stop": times["time/checkpoint_s"],
        "write": times["time/checkpoint_write_s"],
        "beside": sum(seconds - usual for seconds in beside),
        "steps": len(beside),
        "step": usual,
        "copied_bytes": copied,
    }


def _step(trainer: SFTTrainer) -> None:
    trainer.step()
    trainer.run.step += 1


def worker(folder: Path, size: str, batch: int, length: int, rounds: int) -> None:
    """Measure on all ranks; rank 0 writes `found.json`."""
    trainer = sized_sft(folder, size, batch=batch, length=length)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    forget_peak()
    for number in range(1 + rounds):  # the first warms up
        for way in WAYS if number % 2 else reversed(WAYS):
            figures = one_checkpoint(trainer, background=way == WAYS[1])
            if number:
                found[way].append(figures)
    [newest] = (folder / "run" / "checkpoints").glob("step_*")
    size_on_disk = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    if trainer.collectives.is_main:
        report = {"ways": found, "bytes": size_on_disk, "peak_bytes": resident_bytes("VmHWM")}
        (folder / "found.json").write_text(json.dumps(report), encoding="utf-8")
    trainer.close()


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both ways with each number of ranks."""
    results = []
    for ranks in arguments.ranks:
        place = Path(tempfile.mkdtemp(prefix="conch-benchmark-", dir=arguments.folder or folder))
        words = [
            str(place),
            arguments.size,
            str(arguments.batch),
            str(arguments.length),
            str(arguments.rounds),
        ]
        try:
            launched(
                "benchmarks.checkpointing",
                ["--worker", *words],
                ranks=ranks,
                deepspeed=not arguments.ddp,
                threads=arguments.threads,
                timeout_s=TIMEOUT_S,
            )
            found = json.loads((place / "found.json").read_text(encoding="utf-8"))
        finally:
            shutil.rmtree(place, ignore_errors=True)
        results.append({"ranks": ranks, **summary(found)})
    return {**head(arguments), "results": results}


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Spreads of both ways, and the ratios of each round's pair."""
    waited, beside = (found["ways"][way] for way in WAYS)
    names = ("stop", "write", "beside", "step", "copied_bytes")
    ways = {
        way: {name: spread([each[name] for each in rows]) for name in names}
        for way, rows in found["ways"].items()
    }
    pairs = list(zip(waited, beside, strict=True))
    ratios = {
        "stop_over_own_write": spread([each["stop"] / each["write"] for each in beside]),
        "stop_over_waited_write": spread([new["stop"] / old["write"] for old, new in pairs]),
        "lost_over_waited": spread([(new["stop"] + new["beside"]) / old["stop"] for old, new in pairs]),
    }
    return {"ways": ways, "ratios": ratios, "bytes": found["bytes"], "peak_bytes": found["peak_bytes"]}


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| ranks | checkpoint, MB | written | stop, s | write, s | steps longer by, s | copy on rank 0, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in report["results"]:
        for way in WAYS:
            row = each["ways"][way]
            copied = f"{row['copied_bytes']['high'] / 1e6:,.0f}" if way == WAYS[1] else ""
            cells = [cell(row["stop"], 2), cell(row["write"], 2), cell(row["beside"], 2), copied]
            lines.append(f"| {each['ranks']} | {each['bytes'] / 1e6:,.0f} | {way} | {' | '.join(cells)} |")
    for each in report["results"]:
        ratios = {name: cell(figures, 2) for name, figures in each["ratios"].items()}
        lines.append(
            f"\n{each['ranks']} rank(s): beside training the stop is {ratios['stop_over_own_write']} of its "
            f"own write and {ratios['stop_over_waited_write']} of the one that is waited for; with what "
            f"steps took longer, {ratios['lost_over_waited']} of the time is lost."
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=[1, 2], help="processes; default: 1 2")
    add("--size", choices=list(SHAPES), default="100M", help="of the model; default: %(default)s")
    add("--batch", type=int, default=4, help="texts a step, over all ranks; default: %(default)s")
    add("--length", type=int, default=64, help="tokens of a text; default: %(default)s")
    add("--rounds", type=int, default=5, help="pairs of checkpoints; default: %(default)s")
    add("--threads", type=int, default=2, help="of the machine, shared by the ranks; default: %(default)s")
    add("--ddp", action="store_true", help="DDP in place of DeepSpeed ZeRO-2")
    add("--folder", type=Path, help="where checkpoints are written; default: the system's temporary folder")
    add("--json", type=Path, help="also write every figure to this file")
    add("--small", action="store_true", help="a tiny shape under DDP, to try the script itself")
    arguments = parser.parse_args(argv)
    if arguments.small:
        arguments.size, arguments.ddp, arguments.length, arguments.rounds = "0.1M", True, 8, 2
    return run_unbound(arguments, measure, table)


def _worker_main(argv: Sequence[str]) -> None:
    folder, size, *numbers = argv
    batch, length, rounds = map(int, numbers)
    worker(Path(folder), size, batch, length, rounds)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        run_main(lambda argv: _worker_main(argv[1:]))
    else:
        sys.exit(main())
