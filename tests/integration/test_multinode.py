"""Two machines: two launchers that find each other at a loopback address of their own."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.launches import ROOT, SLURM_FAKES, finish, slurm_job, start

SCRIPT = ROOT / "examples" / "slurm" / "train.sbatch"
PROGRAM = "tests.integration.launched_run"


def slurm(*arguments: str) -> str:
    """Run the script as a job of two machines with two "GPUs" each. Slurm itself is stood in for; the script,
    accelerate's two launchers and their four ranks are real."""
    path = os.pathsep.join([str(SLURM_FAKES), str(Path(sys.executable).parent), os.environ["PATH"]])
    return finish(start([str(SCRIPT), *arguments], **slurm_job(ROOT), PATH=path))


def test_the_slurm_script_brings_the_ranks_of_two_machines_together(tmp_path: Path) -> None:
    slurm("-m", "tests.integration.rendezvous_run", str(tmp_path / "found.json"))
    ranks = json.loads((tmp_path / "found.json").read_text())
    assert [rank["RANK"] for rank in ranks] == ["0", "1", "2", "3"]
    assert [rank["GROUP_RANK"] for rank in ranks] == ["0", "0", "1", "1"]  # the machines
    assert {rank["MASTER_ADDR"] for rank in ranks} == {"127.0.0.2"}
    assert {rank["ACCELERATE_USE_DEEPSPEED"] for rank in ranks} == {"true"}
    assert {rank["ACCELERATE_MIXED_PRECISION"] for rank in ranks} == {"bf16"}


@pytest.mark.slow
def test_the_slurm_script_trains_on_two_machines_as_one(tmp_path: Path) -> None:
    output = slurm("-m", PROGRAM, str(tmp_path), "4", "sft")
    found = json.loads((tmp_path / "found.json").read_text())["sft"]
    assert found["num_processes"] == 4 and found["different"] == [], output


@pytest.mark.slow
def test_torchrun_on_two_machines_is_one_run(tmp_path: Path) -> None:
    port = str(free_port())
    machines = [
        start(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"),
                *("--node_rank", str(rank), "--master_addr", "127.0.0.2", "--master_port", port),
                *("--local_addr", f"127.0.0.{2 + rank}", "-m", PROGRAM, str(tmp_path), "2", "sft"),
            ]
        )
        for rank in range(2)
    ]
    for machine in machines:
        finish(machine)
    assert json.loads((tmp_path / "found.json").read_text())["sft"]["num_processes"] == 2
