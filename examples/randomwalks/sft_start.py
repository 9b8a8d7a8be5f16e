"""The policy that the online examples start from: SFT on 1,000 random walks, made once and kept.

python -m examples.randomwalks.sft_start [OUTPUT_DIR]
"""

from __future__ import annotations

import argparse
import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from conch.cli import load_run_config, run_main
from conch.config import RunConfig
from conch.config.algorithms.sft import SFTRunConfig
from conch.errors import ConchError
from conch.log import get_logger
from examples.randomwalks.task import RandomWalks, letter_tokenizer

_log = get_logger("conch.sft_start")

ROOT = Path(__file__).resolve().parents[2]
GRAPH_SEED = 1000
_OF_A_LAUNCHER = (
    *("WORLD_SIZE", "RANK", "LOCAL_", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_", "ACCELERATE_"),
)
"""Beginnings of the variables by which a launcher tells a process that it is one of several."""


def sft_folder(output_dir: Path) -> Path:
    """Where the policy is kept."""
    return output_dir / "randomwalks" / "sft_start"


def sft_start(output_dir: Path) -> Path:
    """The policy's folder; trains it first where there is none, with `configs/randomwalks/sft.yaml`.

    A process of its own trains, alone: so every run starts from the same weights, however many ranks it has,
    and its own random state is left as it was. All ranks may call this; one trains and the others wait.

    Raises:
        ConchError: the training failed; its output says why.
    """
    folder = sft_folder(output_dir)
    with _locked(folder.parent):
        if not folder.is_dir():
            _log.info("training the starting policy %s", folder)
            _train_apart(output_dir)
    return folder


def ensure_sft_start(config: RunConfig) -> None:
    """Train the policy that `config` starts from, where it is this one and is not there yet."""
    if config.model.path is not None and Path(config.model.path) == sft_folder(config.train.output_dir):
        sft_start(config.train.output_dir)


def _train_apart(output_dir: Path) -> None:
    alone = {name: value for name, value in os.environ.items() if not name.startswith(_OF_A_LAUNCHER)}
    command = [sys.executable, "-m", "examples.randomwalks.sft_start", str(output_dir.resolve())]
    if subprocess.run(command, cwd=ROOT, env=alone, check=False).returncode:
        raise ConchError("the starting policy could not be trained; the lines above say why")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".sft_start.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(argv: Sequence[str]) -> None:
    """Command line: the output folder, by default `outputs`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("output_dir", nargs="?", type=Path, default=ROOT / "outputs")
    output_dir = parser.parse_args(list(argv)).output_dir
    from conch.trainers.sft import SFTTrainer  # loads torch, which help and mistyped keys do without

    with tempfile.TemporaryDirectory() as scratch:
        config = load_run_config(
            SFTRunConfig,
            [f"train.run_dir={scratch}/run", "train.total_steps=250"],
            default_name="randomwalks/sft",
            config_dir=ROOT / "configs",
        )
        trainer = SFTTrainer(config, samples=RandomWalks(GRAPH_SEED).walks, tokenizer=letter_tokenizer())
        try:
            trainer.fit()
            trainer.save_pretrained(sft_folder(output_dir))
        finally:
            trainer.close()


if __name__ == "__main__":
    run_main(main)
