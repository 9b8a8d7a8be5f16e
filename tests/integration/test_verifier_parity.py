"""GSM8K's extractors judge as lm-eval 0.4.13 and verl 0.9.1 do, which run in an environment of their own."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.completions import make_samples, read_answers
from conch.config.verifiers import GSM8KConfig
from conch.rewards.verifiers.gsm8k import GSM8K
from tests.peers import leave_out

ROOT = Path(__file__).resolve().parents[2]
GSM8K_ROWS = ROOT.parent / "shared" / "data" / "gsm8k" / "test.jsonl.gz"
TABLE = ROOT / "tests" / "unit" / "rewards" / "verifiers" / "gsm8k_completions.jsonl"
SCORER = Path(__file__).with_name("gsm8k_parity_run.py")
EXTRACTORS = {
    "strict": GSM8KConfig(extractor="strict", version="whole"),
    "flexible": GSM8KConfig(extractor="flexible", version="whole"),
    "verl": GSM8KConfig(extractor="verl", last_characters=300, version="whole"),
}


@pytest.fixture(scope="module")
def others_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment with lm-eval and, without what it needs, verl."""
    folder = tmp_path_factory.mktemp("others")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True, timeout=300)
    python = folder / "venv" / "bin" / "python"
    probe = [python, "-m", "pip", "download", "--no-deps", "--dest", folder, "lm_eval==0.4.13"]
    reached = subprocess.run(probe, capture_output=True, text=True, timeout=300, check=False)
    if reached.returncode:
        leave_out(f"PyPI cannot be reached: {reached.stderr.strip()[-200:]}")
    for what in (["lm_eval==0.4.13"], ["--no-deps", "verl==0.9.1"]):
        subprocess.run([python, "-m", "pip", "install", "--quiet", *what], check=True, timeout=1200)
    return python


def rows_of_the_table() -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in TABLE.read_text(encoding="utf-8").splitlines()]
    return [(row["completion"], f"As the person reckons.\n#### {row['gold']}") for row in rows]


def rows_of_gsm8k() -> list[tuple[str, str]]:
    if not GSM8K_ROWS.exists():
        leave_out(f"{GSM8K_ROWS} is absent: parity is checked on real rows")
    return [(sample.completion, sample.answer) for sample in make_samples(read_answers(GSM8K_ROWS), 1000)]


def rows_of_noise() -> list[tuple[str, str]]:
    """What no model writes, but a regular expression may read in two ways."""
    draw = random.Random(0)
    parts = ["#### ", "####", "18", "1", "8", "0", ".", ",", "$", "-", " ", "\n", "\u0661", "x", "\u00a0"]
    texts = ["".join(draw.choices(parts, k=draw.randrange(1, 9))) for _ in range(2000)]
    return [(text + draw.choice(["", "18", "#### 18"]), "Noise.\n#### 18") for text in texts]


@pytest.mark.slow  # it installs lm-eval
@pytest.mark.parametrize("rows_of", [rows_of_the_table, rows_of_gsm8k, rows_of_noise])
def test_verdicts_are_those_of_lm_eval_and_verl(
    rows_of: Callable[[], list[tuple[str, str]]], others_python: Path, tmp_path: Path
) -> None:
    rows = rows_of()
    samples = tmp_path / "samples.jsonl"
    lines = [{"question": "?", "answer": answer, "completion": completion} for completion, answer in rows]
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [others_python, SCORER, samples]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    for name, config in EXTRACTORS.items():
        verifier = GSM8K(config)
        ours = [
            verifier.verify(completion, verifier.read_key({"answer": answer})).scores["answer"]
            for completion, answer in rows
        ]
        apart = [row for row, our, their in zip(rows, ours, theirs[name], strict=True) if our != their]
        assert apart == [], name
        assert 0 < sum(ours) < len(ours), name
