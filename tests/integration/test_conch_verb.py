"""`conch train` under launchers: processes train as one run, and a mistake leaves with its sentence."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.launches import LONGEST_S, accelerate, finish, start, torchrun
from tests.tiny import char_tokenizer, tiny_gpt2_config


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A run of two steps on texts of a few letters."""
    from transformers import GPT2LMHeadModel

    tokenizer = char_tokenizer("abcd")
    GPT2LMHeadModel(tiny_gpt2_config(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = "".join(json.dumps({"text": text}) + "\n" for text in ("abcd", "bcda", "cdab", "dabc"))
    (tmp_path / "rows.jsonl").write_text(rows)
    data = [f"data.train={tmp_path}/rows.jsonl", "sft.batch_size=4"]
    train = [f"train.run_dir={tmp_path}/run", "train.total_steps=2"]
    model = [f"model.path={tmp_path}/model", "tokenizer.pad_token='<pad>'"]
    return ["-m", "conch", "train", "sft", *model, *data, *train]


@pytest.mark.parametrize(
    ("launcher", "processes"), [(accelerate("cpu", 1), 1), (torchrun(2), 2)], ids=["accelerate", "torchrun"]
)
def test_conch_train_runs_under_a_launcher(
    launcher: list[str], processes: int, words: list[str], tmp_path: Path
) -> None:
    finish(start([*launcher, *words, f"train.num_processes={processes}"]))

    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row][-1] == 2
    assert (tmp_path / "run" / "checkpoints" / "step_2").is_dir()


def test_conch_train_refuses_another_number_of_processes_in_a_sentence(words: list[str]) -> None:
    process = start([sys.executable, *words, "train.num_processes=2"])
    output, _ = process.communicate(timeout=LONGEST_S)

    assert process.returncode == 1
    assert "error: 2 processes were asked for, 1 run" in output and "Traceback" not in output
