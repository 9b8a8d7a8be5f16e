"""Types the commands of the GRPO example as a user does, on tiny random models, and reads what they leave."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import string
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import char_tokenizer

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples/grpo"
LONGEST_S = 400
LIMITS = (
    *("env.max_rows=24", "env.num_envs=2", "env.repeats=2", "train.total_dialog_turns=8"),
    *("train.optim_batch_size=2", "inference_model.max_tokens=4", "conch.model.trial=false"),
)
"""Two steps of two prompts, with two completions of at most four tokens each, in two optimizer steps."""

PROBLEMS = "env.data=problems.jsonl"
TASKS = "env.data=tasks.jsonl"
DEFAULT_MODEL, OTHER_MODEL = "Qwen/Qwen2.5-3B", "meta-llama/Llama-2-7b-hf"

EACH = ("train_model.num_devices=2", "ref_model.num_devices=2", "inference_model.num_devices=2")
HANDS = ("train_model.devices=[0,1]", "ref_model.devices=[2,3]", "inference_model.devices=[4,5]")
ONE_EACH = ("train_model.num_devices=1", "ref_model.num_devices=1", "inference_model.num_devices=1")
_MARK = "CONCH_TEST_RUN"

SIGNALS = {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}
"""That end a command, and the code that it leaves with."""


def write_model(folder: Path, width: int = 16) -> None:
    """A random model of one layer with two heads over letters, with its tokenizer."""
    tokenizer = char_tokenizer(string.printable)
    torch.manual_seed(0)
    shape = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(
        "qwen2", vocab_size=len(tokenizer), num_key_value_heads=1, bos_token_id=None, **shape, **special
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_inputs(folder: Path) -> None:
    """What is there where the commands are typed: programs, models under their names on the hub, rows of both
    tasks."""
    for name in ("grpo.py", "grpo-async.py"):
        (folder / name).symlink_to(FOLDER / name)
    for name in (DEFAULT_MODEL, OTHER_MODEL):
        write_model(folder / name)
    rng = random.Random(0)
    pairs = [(rng.randint(2, 9), rng.randint(2, 9)) for _ in range(24)]
    problems = [
        {"question": f"What is {a} * {b}?", "answer": f"It is {a * b}.\n#### {a * b}"} for a, b in pairs
    ]
    tasks = [
        {
            "key": number,
            "prompt": f"Write about the number {number}, without any comma.",
            "instruction_id_list": ["punctuation:no_comma"],
            "kwargs": [{}],
        }
        for number in range(24)
    ]
    for name, rows in (("problems", problems), ("tasks", tasks)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def only_run(folder: Path) -> Path:
    """The one folder `outputs/DATE/TIME` below."""
    (run,) = folder.glob("outputs/*/*")
    assert re.fullmatch(r"outputs/\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d", str(run.relative_to(folder)))
    return run


def settings_of(run: Path) -> dict[str, Any]:
    """What `.hydra/config.yaml` says."""
    return yaml.safe_load((run / ".hydra/config.yaml").read_text())


def metrics_of(run: Path) -> list[dict[str, float]]:
    """Lines of `metrics.jsonl`."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def check_outputs(run: Path, steps: Sequence[int] = (2,), *, overlaps: bool = False) -> None:
    """What the document draws: checkpoints and the configuration, whole; all 8 turns were trained on.

    overlaps: sampling went on meanwhile, so that rewards were asked for before their step.
    """
    files = {path.name for path in (run / "checkpoints").glob("*.pt")}
    assert files == {f"checkpoint_{step}.pt" for step in steps}
    for name in files:
        content = torch.load(run / "checkpoints" / name, weights_only=True)
        assert content.keys() == {"step", "model", "optimizer", "scaler", "config"}
        assert content["model"] and content["optimizer"]["state"]
    assert {path.name for path in (run / ".hydra").iterdir()} == {
        "config.yaml",
        "overrides.yaml",
        "hydra.yaml",
    }
    assert (run / "checkpoints" / f"step_{steps[-1]}").is_dir()
    assert [line["step"] for line in metrics_of(run)] == [1, 2]
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert settings["grpo"]["prompts_per_step"] * settings["grpo"]["group_size"] == 4
    share = 4 // settings["train"]["num_processes"]  # of the first process
    assert overlaps or all(line["reward/requests"] == share for line in metrics_of(run))


def start(folder: Path, *words: str, program: Sequence[str] = ("grpo.py",), **environment: str) -> Any:
    """A command as a user types it. All processes that it starts have a mark in their environment."""
    process: Any = subprocess.Popen(
        [sys.executable, *program, *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", _MARK: (mark := uuid4().hex), **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    process.mark = mark
    return process


def finish(process: Any, code: int = 0) -> str:
    """Output of a command that leaves with this code, and leaves no process behind."""
    with all_ended(process):
        output, _ = process.communicate(timeout=LONGEST_S)
    assert process.returncode == code, output[-6000:]
    return output


class all_ended:  # noqa: N801
    """Inside, a command runs; behind, whatever it started has ended within seconds, or is ended."""

    def __init__(self, process: Any) -> None:
        self._process = psutil.Process(process.pid)
        self._mark = f"{_MARK}={process.mark}".encode()
        self._seen: set[psutil.Process] = set()

    def __enter__(self) -> all_ended:
        return self

    def note(self) -> list[psutil.Process]:
        """The processes that it started and that run just now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._seen |= set(self._process.children(recursive=True))
        self._seen |= {process for process in psutil.process_iter() if self._is_marked(process.pid)}
        self._seen.discard(self._process)
        return [process for process in self._seen if process.is_running()]

    def _is_marked(self, pid: int) -> bool:
        """Also where whoever started it is gone."""
        with contextlib.suppress(OSError):
            return self._mark in Path(f"/proc/{pid}/environ").read_bytes()
        return False

    def __exit__(self, *_: object) -> None:
        self.note()
        _gone, alive = psutil.wait_procs(list(self._seen), timeout=40)
        for process in alive:
            process.kill()
        assert not alive, f"still running: {alive}"


def wait_for(happened: Callable[[], bool]) -> None:
    """Wait for something that a command does."""
    deadline = time.monotonic() + LONGEST_S
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.1)
