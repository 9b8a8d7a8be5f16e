"""Peaks of cards, and what a report says of the machine."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
from typing import Any

import torch

from benchmarks.measuring import machine

_PEAKS = (
    (r"H200 NVL", 835.5, "datasheet of the H200: 1,671 TFLOPS with sparsity"),
    (r"H200", 989.5, "datasheet of the H200: 1,979 TFLOPS with sparsity"),
    (r"H100 PCIe", 756.5, "datasheet of the H100 PCIe: 1,513 TFLOPS with sparsity"),
    (r"H100 NVL", 835.5, "datasheet of the H100: 1,671 TFLOPS with sparsity"),
    (r"H100.*HBM3", 989.5, "datasheet of the H100 SXM: 1,979 TFLOPS with sparsity"),
    (r"A100", 312.0, "datasheet of the A100: 312 TFLOPS, 624 with sparsity"),
)
"""Name of a card (the first that fits), its peak in bfloat16 on dense matrices in TFLOP/s, and NVIDIA's page
that says so; where that gives the figure with sparsity, it is twice the dense one."""

_PACKAGES = ("transformers", "accelerate", "trl", "vllm", "flash-attn", "liger-kernel", "triton")


def peak_of(card: str) -> tuple[float, str] | None:
    """Peak in operations a second and where it is from; None for a card that the table lacks."""
    for pattern, teraflops, source in _PEAKS:
        if re.search(pattern, card):
            return teraflops * 1e12, source
    return None


def host() -> dict[str, Any]:
    """Processor, system and versions; asks CUDA nothing."""
    told = machine()
    for name in _PACKAGES:
        try:
            told["versions"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return told


def driver() -> str | None:
    """Version of NVIDIA's driver; None where `nvidia-smi` does not tell."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)


def card(device: str) -> dict[str, Any]:
    """Name, memory and peak of the card, once it has computed something; of a CPU its threads."""
    if device == "cpu":
        return {"name": "cpu", "threads": torch.get_num_threads(), "cores": os.cpu_count()}
    assert float(torch.ones(8, device=device).sum()) == 8.0
    facts = torch.cuda.get_device_properties(0)
    told: dict[str, Any] = {
        "name": facts.name,
        "memory_bytes": facts.total_memory,
        "capability": f"{facts.major}.{facts.minor}",
        "multiprocessors": facts.multi_processor_count,
        "cuda": torch.version.cuda,
    }
    peak = peak_of(facts.name)
    if peak is not None:
        told["peak_flops"], told["peak_source"] = peak
    return told
