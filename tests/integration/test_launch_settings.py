"""DeepSpeed does what a run's settings say, whatever its own configuration has."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.launches import CONFIGS, LONGEST_S, finish, free_port, kill_all, start

ZERO2: dict[str, Any] = yaml.safe_load((CONFIGS / "zero2-bf16.yaml").read_text())
PLAIN = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}


def launch(folder: Path, name: str, *, file: dict[str, Any] | None = None, **section: Any) -> list[str]:
    """A command line under accelerate's launcher.

    file: keys of a DeepSpeed JSON file, which then stands for the section `deepspeed_config`.
    section: further keys of that section.
    """
    config = {**ZERO2, "deepspeed_config": {**ZERO2["deepspeed_config"], **section}}
    if file is not None:
        (folder / f"{name}-ds.json").write_text(json.dumps(file))
        config["deepspeed_config"] = {"deepspeed_config_file": str(folder / f"{name}-ds.json")}
        del config["mixed_precision"]
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(folder / f"{name}.yaml")]
    place = ["--num_processes", "1", "--main_process_port", str(free_port())]
    program = ["-m", "tests.integration.accumulation_run", str(folder / f"{name}.json")]
    return [sys.executable, *launcher, *place, *program]


@pytest.mark.slow  # DeepSpeed compiles an operator in each new environment
def test_deepspeed_takes_count_and_clipping_from_the_run(tmp_path: Path) -> None:
    own = {"gradient_accumulation_steps": 4, "gradient_clipping": 1e-3}
    finish(start(launch(tmp_path, "plain")))
    finish(start(launch(tmp_path, "yaml", **own)))
    finish(start(launch(tmp_path, "file", file={**PLAIN, **own, "train_batch_size": 12})))
    expected, *others = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("plain", "yaml", "file"))
    assert expected["optimizer_steps"] == 4
    assert others == [expected, expected]


@pytest.mark.slow
def test_a_schedule_in_a_deepspeed_file_is_refused(tmp_path: Path) -> None:
    schedule = {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}
    process = start(launch(tmp_path, "own", file={**PLAIN, "scheduler": schedule}))
    try:
        output, _ = process.communicate(timeout=LONGEST_S)
    finally:
        kill_all(process)
    assert process.returncode != 0
    assert "the DeepSpeed configuration has a section `scheduler`: remove it" in output
