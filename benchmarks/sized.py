"""GPT-2 shapes of 1 to 100 million weights, and SFT and GRPO of them on texts of one length."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.measuring import ROOT, parent_variable
from conch.config import load
from conch.errors import ConchError
from conch.trainers.grpo import GRPORunConfig, GRPOTrainer
from conch.trainers.sft import SFTRunConfig, SFTTrainer
from examples.randomwalks.task import tokenizer_of

SHAPES = {"0.1M": (64, 1, 512), "1M": (128, 4, 1024), "10M": (320, 8, 2048), "30M": (512, 8, 8192)}
SHAPES |= {"100M": (768, 12, 16384)}
"""Width, blocks and vocabulary."""

WINDOW = 1024
ROWS = 64
"""Texts; a step takes the next of them."""


def shape_of(size: str) -> GPT2Config:
    """The configuration of a GPT-2 without dropout."""
    width, layers, vocabulary = SHAPES[size]
    return GPT2Config(
        vocab_size=vocabulary,
        n_positions=WINDOW,
        n_embd=width,
        n_layer=layers,
        n_head=width // 64,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    )


def sized_sft(folder: Path, size: str, *, batch: int, length: int, **train: Any) -> SFTTrainer:
    """A trainer of `batch` texts of `length` tokens a step, over all ranks."""
    tokenizer = tokenizer_of(ascii_lowercase, max_length=WINDOW)
    draw = random.Random(0)
    texts = ["".join(draw.choices(ascii_lowercase, k=length - 1)) for _ in range(max(ROWS, batch))]
    torch.manual_seed(0)
    settings = {
        "model": {"architecture": {"model_type": "gpt2"}, "trial": False},
        "sft": {"batch_size": batch},
        "train": {
            **{"run_dir": folder / "run", "total_steps": 100_000, "eval_every": 0, "keep_last": 1},
            **{"save_every": 1, **train},
        },
    }
    config = load(SFTRunConfig, settings)
    return SFTTrainer(config, samples=texts, model=GPT2LMHeadModel(shape_of(size)), tokenizer=tokenizer)


def sized_grpo(folder: Path, size: str, *, batch: int, length: int) -> GRPOTrainer:
    """A trainer of `batch` completions of `length` tokens a step, over all ranks, in groups of four. Few end
    before: the end is one token of a random model's vocabulary."""
    settings = {
        "model": {"architecture": {"model_type": "gpt2"}, "trial": False},
        "generation": {"max_new_tokens": length, "chunk_size": batch},
        "grpo": {"prompts_per_step": batch // 4, "group_size": 4, "kl": {"coef": 0.0}},
        "train": {"run_dir": folder / "run", "total_steps": 100_000, "eval_every": 0},
        "tracking": {"rollouts": False},
    }
    torch.manual_seed(0)
    return GRPOTrainer(
        load(GRPORunConfig, settings),
        reward=lambda samples, **_: [float(sample.count("a")) for sample in samples],
        prompts=["".join(letters) for letters in zip(*[iter(ascii_lowercase[:24])] * 4, strict=True)],
        model=GPT2LMHeadModel(shape_of(size)),
        tokenizer=tokenizer_of(ascii_lowercase, max_length=WINDOW),
    )


def launched(
    module: str, arguments: Sequence[str], *, ranks: int, deepspeed: bool, threads: int, timeout_s: float
) -> None:
    """Run a module of ours as so many processes on the CPU, under ZeRO-2 or under DDP.

    threads: of the machine, shared by the ranks.

    Raises:
        ConchError: it fails; its own words stand above.
    """
    if deepspeed:
        file = ROOT / "configs" / "accelerate" / "zero2-bf16.yaml"
        launcher = ["accelerate.commands.launch", "--config_file", str(file), "--num_processes", str(ranks)]
        launcher += ["--mixed_precision", "no", "--main_process_port", "0"]
    else:
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [sys.executable, "-m", *launcher, "-m", module, *arguments]
    variables = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(max(1, threads // ranks))}
    if not deepspeed:
        variables["ACCELERATE_USE_CPU"] = "true"
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **variables, **parent_variable()},
        stdout=sys.stderr,
        timeout=timeout_s,
        check=False,
    )
    if done.returncode:
        raise ConchError(f"`{' '.join(command[1:])}` ended with code {done.returncode}")
