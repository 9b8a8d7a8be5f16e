"""Tokens a second, MFU, peak memory and idle gaps of one side's steps, and their profile by phase."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.cases import Algorithm, Work, arithmetic_of, build, speed_shape, word_tokenizer, work_of
from benchmarks.gpu.profiling import profiled, synchronize, whole
from benchmarks.gpu.sides import Side, conch_side, plain_side
from benchmarks.gpu.trl_side import Timer, trl_trainer
from benchmarks.measuring import forget_peak, resident_bytes, spread

Note = Callable[[dict[str, Any]], None]
"""Writes what has been found so far; later figures are added to earlier ones."""

STEPS, SECONDS = 3, 12.0
"""Steps that are timed at most, and seconds after which no further one is."""


def measure(
    side_name: str, algorithm: Algorithm, shape: str, *, device: str, small: bool, folder: Path, note: Note
) -> None:
    """One side's figures, noted as soon as each is there.

    side_name: `conch`, `plain` or `trl`.
    """
    config = speed_shape(shape, small=small)
    work = work_of(algorithm, shape, int(config.vocab_size), small=small)
    needed = arithmetic_of(config).step(work)
    model = build(config, device)
    note(
        {
            "parameters": sum(p.numel() for p in model.parameters()),
            "rows": work.rows,
            "tokens": work.tokens,
            "needed_flops": needed,
        }
    )
    tokenizer = word_tokenizer(int(config.vocab_size))
    start_peak(device)
    if side_name == "trl":
        timer = Timer(device, STEPS, SECONDS)
        trainer = trl_trainer(work, model, tokenizer, folder, device, timer)
        del model
        trainer.train()
        note(timed_figures(work, needed, timer.column, device))
        note({"phases": {"whole step": timer.recorded}, "profiled": whole({"step": timer.recorded})})
        return
    side = (
        conch_side(work, model, tokenizer, folder, device)
        if side_name == "conch"
        else plain_side(work, model, tokenizer, device)
    )
    try:
        note(timed_figures(work, needed, take_steps(side, device), device))
        phases = profiled(side.phases, device)
        note({"phases": phases, "profiled": whole(phases)})
    finally:
        side.close()


def start_peak(device: str) -> None:
    """From here on, the peak is that of what follows, and of what is held already."""
    if device == "cpu":
        forget_peak()
    else:
        torch.cuda.reset_peak_memory_stats()


def peak_bytes(device: str) -> int:
    """Of tensors on the GPU; on a CPU of the whole process."""
    return resident_bytes("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()


def take_steps(side: Side, device: str) -> list[float]:
    """Seconds of each step that counts; one before them warms up."""
    column: list[float] = []
    until = time.perf_counter() + SECONDS
    for number in range(1 + STEPS):
        synchronize(device)
        started = time.perf_counter()
        side.step()
        synchronize(device)
        if number:
            column.append(time.perf_counter() - started)
            if time.perf_counter() > until:
                break
    return column


def timed_figures(work: Work, needed: float, column: list[float], device: str) -> dict[str, Any]:
    """Of the steps that count."""
    seconds = spread(column)
    return {
        "steps": len(column),
        "step_s": seconds,
        "tokens_per_s": work.tokens / seconds["median"],
        "flops_per_s": needed / seconds["median"],
        "peak_bytes": peak_bytes(device),
    }
