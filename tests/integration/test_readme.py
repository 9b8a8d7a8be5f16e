"""The README's first Python block runs as it stands, with a tiny folder in place of the hub's `gpt2`."""

from __future__ import annotations

import re
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

README = Path(__file__).resolve().parents[2] / "README.md"


def make_gpt2(folder: Path) -> None:
    """A random GPT-2 whose tokenizer has, like the real one, an eos but no pad token."""
    letters = [*string.ascii_letters, *string.punctuation, " "]
    vocabulary = {token: index for index, token in enumerate([*letters, "<|endoftext|>"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(folder)
    torch.manual_seed(0)
    eos = vocabulary["<|endoftext|>"]
    shape = {"n_layer": 3, "n_embd": 32, "n_head": 2, "n_positions": 64, "vocab_size": len(vocabulary)}
    GPT2LMHeadModel(GPT2Config(**shape, eos_token_id=eos, bos_token_id=eos)).save_pretrained(folder)


def test_first_python_block_of_the_readme_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    block = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert block is not None
    make_gpt2(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "readme"}
    exec(compile(block[1], str(README), "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    run_dir = Path(printed[-1])
    trainer: Any = names["trainer"]
    trainer.close()
    assert (run_dir / "checkpoints" / "step_2" / "config.json").is_file()
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 3  # the start's evaluation among them
