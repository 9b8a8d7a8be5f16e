"""How step time, memory and checkpoints grow with the model, the batch, the length and the ranks.

    python -m benchmarks.growth --picture growth.png

SFT steps and GRPO steps of GPT-2 shapes of 1 to 100 million weights in float32 on the CPU. One row is the
base; the others move one of size, batch, length and ranks (under DDP) away from it, each in its own process.
GRPO samples `batch` completions of `length` tokens for prompts of four letters in groups of four, without a
reference, with one update: each token passes the model once when it is sampled and is trained on once.

Beside each row stands the arithmetic that it needs at the least, in multiplications and additions (FLOP):

    a token's pass    2 (12 d^2 L + d V) + 2 d L (T + 1)   blocks and head; attention to half of T tokens
    a step of SFT     3 passes a token: forward, and backward twice as much
    a step of GRPO    4: the same and the pass that samples it

so what grows as its arithmetic has the same rate (GFLOP/s) in all rows, and what grows slower a higher one.
The least memory is 16 bytes a weight (weight, gradient, two moments) on each rank.
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

from benchmarks.measuring import forget_peak, head, resident_bytes, run_unbound, timed
from benchmarks.sized import launched, shape_of, sized_grpo, sized_sft
from conch.cli import run_main
from conch.training.checkpointing import save_checkpoint, settle_checkpoint

BASE: dict[str, Any] = {"size": "10M", "batch": 8, "length": 128, "ranks": 1}
MOVES: dict[str, Sequence[Any]] = {
    "size": ("1M", "10M", "30M", "100M"),
    "batch": (4, 8, 16, 32),
    "length": (64, 128, 256, 512),
    "ranks": (1, 2),
}
SMALL_BASE: dict[str, Any] = {"size": "0.1M", "batch": 4, "length": 8, "ranks": 1}
SMALL_MOVES: dict[str, Sequence[Any]] = {
    "size": ("0.1M", "1M"),
    "batch": (4,),
    "length": (8, 16),
    "ranks": (1,),
}
KINDS = ("sft", "grpo")
TIMEOUT_S = 1800.0


def weights(size: str) -> int:
    """Weights of a shape: blocks, the embeddings that head and input share, and positions."""
    config = shape_of(size)
    blocks = config.n_layer * (12 * config.n_embd**2 + 13 * config.n_embd)
    return blocks + (config.vocab_size + config.n_positions + 2) * config.n_embd


def pass_flop(size: str, length: int) -> float:
    """FLOP of a token's forward pass, on average over `length` tokens."""
    config = shape_of(size)
    width, layers = config.n_embd, config.n_layer
    return 2.0 * (12 * width**2 * layers + width * config.vocab_size) + 2.0 * width * layers * (length + 1)


def rows_of(base: dict[str, Any], moves: dict[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The base first, then all that move one of its values."""
    moves_of = ((name, value) for name, values in moves.items() for value in values)
    return [base, *({**base, name: value} for name, value in moves_of if value != base[name])]


def worker(folder: Path, kind: str, size: str, batch: int, length: int, steps: int) -> None:
    """Measure one row on all ranks; rank 0 writes `found.json`."""
    trainer = (sized_sft if kind == "sft" else sized_grpo)(folder, size, batch=batch, length=length)
    trainer.step()
    forget_peak()
    seconds, tokens = [], []
    for _ in range(steps):
        metrics, taken = timed(trainer.step)
        seconds.append(taken)
        tokens.append(batch * (length if kind == "sft" else metrics["rollout/length_mean"]))
        trainer.run.step += 1
    peak = resident_bytes("VmHWM")
    found: dict[str, Any] = {"step_s": median(seconds), "tokens": median(tokens), "peak_bytes": peak}
    if kind == "sft":
        stops, writes = [], []
        for _ in range(2):  # the first warms up
            trainer.run.take_times()
            save_checkpoint(trainer, background=True)
            stops.append(trainer.run.checkpoint_times["time/checkpoint_s"])
            settle_checkpoint(trainer)
            writes.append(trainer.run.take_times()["time/checkpoint_write_s"])
            trainer.step()
            trainer.run.step += 1
        [newest] = (folder / "run" / "checkpoints").glob("step_*")
        size_on_disk = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
        found |= {"stop_s": stops[-1], "write_s": writes[-1], "checkpoint_bytes": size_on_disk}
    if trainer.collectives.is_main:
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")
    trainer.close()


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All rows, SFT and GRPO of each."""
    base, moves = (SMALL_BASE, SMALL_MOVES) if arguments.small else (BASE, MOVES)
    wanted = {name: moves[name] for name in arguments.moves or moves}
    results = [row for file in arguments.add for row in json.loads(file.read_text())["results"]]
    for row in rows_of(base, wanted):
        if any(all(each[name] == value for name, value in row.items()) for each in results):
            continue
        found = {kind: _measured(arguments, folder, kind, row) for kind in KINDS}
        results.append({**row, **with_arithmetic(row, found)})
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    report = {**head(arguments), "base": base, "moves": moves, "results": results}
    if arguments.picture is not None:
        draw(report, arguments.picture)
    return report


def _measured(arguments: argparse.Namespace, folder: Path, kind: str, row: dict[str, Any]) -> dict[str, Any]:
    place = Path(tempfile.mkdtemp(dir=folder))
    numbers = (row["batch"], row["length"], arguments.steps)
    try:
        launched(
            "benchmarks.growth",
            ["--worker", str(place), kind, row["size"], *map(str, numbers)],
            ranks=row["ranks"],
            deepspeed=False,
            threads=arguments.threads,
            timeout_s=TIMEOUT_S,
        )
        return json.loads((place / "found.json").read_text(encoding="utf-8"))
    finally:
        shutil.rmtree(place, ignore_errors=True)


def with_arithmetic(row: dict[str, Any], found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Figures of both kinds with what they need at the least."""
    result: dict[str, Any] = {"weights": weights(row["size"]), "least_bytes": 16 * weights(row["size"])}
    for kind, passes in zip(KINDS, (3, 4), strict=True):
        figures = found[kind]
        gflop = passes * pass_flop(row["size"], row["length"]) * figures["tokens"] / 1e9
        result[kind] = {**figures, "gflop": gflop, "gflop_per_s": gflop / figures["step_s"]}
    return result


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| weights, M | batch | length | ranks | SFT step, s | GFLOP | GFLOP/s | GRPO step, s | GFLOP "
        "| GFLOP/s | peak SFT, GRPO, MB | 16 bytes a weight, MB | checkpoint, MB | stop, s | write, s |",
        "|---" * 15 + "|",
    ]
    for each in report["results"]:
        sft, grpo = each["sft"], each["grpo"]
        cells = [f"{each['weights'] / 1e6:.1f}", str(each["batch"]), str(each["length"]), str(each["ranks"])]
        for kind in (sft, grpo):
            cells += [f"{kind['step_s']:.3f}", f"{kind['gflop']:,.0f}", f"{kind['gflop_per_s']:.0f}"]
        cells += [f"{sft['peak_bytes'] / 1e6:,.0f}, {grpo['peak_bytes'] / 1e6:,.0f}"]
        cells += [f"{each['least_bytes'] / 1e6:,.0f}", f"{sft['checkpoint_bytes'] / 1e6:,.0f}"]
        cells += [f"{sft['stop_s']:.2f}", f"{sft['write_s']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    """One panel a value that moves: seconds and memory over those of the base, beside the arithmetic's."""
    from matplotlib.figure import Figure

    base = report["results"][0]
    curves = (
        ("SFT step", "sft", "step_s", "o-", "tab:blue"),
        ("SFT arithmetic", "sft", "gflop", "--", "tab:blue"),
        ("GRPO step", "grpo", "step_s", "o-", "tab:orange"),
        ("GRPO arithmetic", "grpo", "gflop", "--", "tab:orange"),
        ("SFT peak memory", "sft", "peak_bytes", "s-", "tab:green"),
        ("checkpoint's write", "sft", "write_s", "^-", "tab:red"),
    )
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, 4, sharey=True), report["moves"], strict=True):
        others = [key for key in report["moves"] if key != name]
        rows = [each for each in report["results"] if all(each[key] == base[key] for key in others)]
        what = "weights" if name == "size" else name
        rows.sort(key=lambda row: row[what])
        places = [row[what] for row in rows]
        for label, kind, quantity, style, colour in curves:
            curve = [row[kind][quantity] / base[kind][quantity] for row in rows]
            axes.plot(places, curve, style, color=colour, label=label)
        axes.set(xscale="log", yscale="log", xlabel=what)
        axes.set_xticks(places, [f"{place / 1e6:.3g}M" if name == "size" else str(place) for place in places])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("over the base")
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--moves", nargs="+", choices=list(MOVES), help="measure only these; default: all")
    add("--add", type=Path, nargs="+", default=[], help="reports (--json) whose rows are taken over")
    add("--steps", type=int, default=3, help="counted in each row; default: %(default)s")
    add("--threads", type=int, default=2, help="of the machine, shared by the ranks; default: %(default)s")
    add("--json", type=Path, help="also write every figure to this file")
    add("--picture", type=Path, help="also draw this PNG file")
    add("--small", action="store_true", help="tiny shapes, to try the script itself")
    return run_unbound(parser.parse_args(argv), measure, table)


def _worker_main(argv: Sequence[str]) -> None:
    folder, kind, size, *numbers = argv
    batch, length, steps = map(int, numbers)
    worker(Path(folder), kind, size, batch, length, steps)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        run_main(lambda argv: _worker_main(argv[1:]))
    else:
        sys.exit(main())
