"""The tutorials run as they stand, with tiny random models in the folders that they name."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from tests.chats import chat_reward_model, qwen_policy
from tests.forks import quick_python
from tests.integration.test_readme import make_gpt2
from tests.launches import free_port

DOCS = Path(__file__).resolve().parents[2] / "docs"
LONGEST_S = 900
SHELL = """conch() {{
    if [ "$1" = serve ]; then "{python}" -m conch "$@"; else "{quick}" -m conch "$@"; fi
}}"""
"""`conch` as in a terminal. Servers outlive their commands, so they are started by a Python of their own."""

ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def run_page(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the blocks of a page one after the other in `folder`.

    The port is another one, since somebody else may have that of the page.
    """
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "state"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    page = (DOCS / f"{name}.md").read_text(encoding="utf-8").replace("8001", str(free_port()))
    python = quick_python()
    blocks = re.findall(r"^```(python|bash)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 3
    try:
        for language, block in blocks:
            shell = f"set -eu\n{SHELL.format(quick=python, python=sys.executable)}\n{block}"
            (folder / "block.py").write_text(block)
            command = [python, "block.py"] if language == "python" else ["bash", "-c", shell]
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=LONGEST_S, check=False
            )
            assert done.returncode == 0, f"{block}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    finally:
        subprocess.run(
            [sys.executable, "-m", "conch", "serve", "down"], cwd=folder, capture_output=True, check=False
        )


def byte_level_gpt2(folder: Path) -> None:
    """A random GPT-2 with a token for each byte, and, like the real one, an eos but no pad token."""
    backend = Tokenizer(BPE({letter: index for index, letter in enumerate(sorted(ALPHABET))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(folder)
    torch.manual_seed(0)
    eos = len(ALPHABET)
    shape = {"n_layer": 3, "n_embd": 32, "n_head": 2, "n_positions": 64, "vocab_size": eos + 1}
    GPT2LMHeadModel(GPT2Config(**shape, eos_token_id=eos, bos_token_id=eos)).save_pretrained(folder)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_first_reward_model_and_ppo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    byte_level_gpt2(tmp_path / "gpt2")
    run_page("first_reward_model", tmp_path, monkeypatch)
    right = max(row.get("eval/accuracy", 0.0) for row in rows(tmp_path / "rm/metrics.jsonl"))
    assert right >= 0.9
    learned = [row["reward/mean"] for row in rows(tmp_path / "ppo/metrics.jsonl") if "reward/mean" in row]
    assert len(learned) == 8
    assert list((tmp_path / "ppo/plots").glob("*.png"))


@pytest.mark.slow
def test_runs_on_a_laptop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    byte_level_gpt2(tmp_path / "distilgpt2")
    run_page("laptop", tmp_path, monkeypatch)
    steps = [row["step"] for row in rows(tmp_path / "runs/a/metrics.jsonl")]
    assert steps == [*range(13)], "the second command went on"
    assert (tmp_path / "rates.html").stat().st_size > 100_000


@pytest.mark.slow
def test_qwen_policy_with_llama_reward_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat_reward_model(tmp_path / "Skywork/Skywork-Reward-V2-Llama-3.2-1B", "llama", window=8192)
    qwen_policy(tmp_path / "Qwen/Qwen2.5-0.5B-Instruct", window=512)
    run_page("qwen_llama", tmp_path, monkeypatch)
    rollouts = rows(tmp_path / "grpo/rollouts/step_1.jsonl")
    assert len(rollouts) == 8


@pytest.mark.parametrize("name", ["from_trl", "from_trlx"])
def test_python_of_a_page_for_others_trains(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_gpt2(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    block = next(
        block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "import conch\n" in block
    )
    names: dict[str, Any] = {"__name__": name}
    exec(compile(block, name, "exec"), names)
    trainer = names["trainer"]
    trainer.close()
    steps = [row for row in rows(trainer.run_dir / "metrics.jsonl") if "reward/mean" in row]
    assert len(steps) == 2
