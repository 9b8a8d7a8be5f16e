"""A PPO step with a served reward, against the same step with that reward in process on a second core."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from benchmarks.checkpoint import WINDOW
from benchmarks.limit import Limit
from conch.config import load
from conch.trainers.ppo import PPORunConfig, PPOTrainer

_PROMPT_TOKENS = 64
_PHASES = ("time/rollout_s", "time/logprobs_s", "time/score_s", "time/experience_s", "time/update_s")


class Steps:
    """PPO over the beginnings of dialogues with a random GPT-2, the reward model's size.

    folder: for checkpoint and runs. steps: of a run; the first warms up and does not count.
    """

    def __init__(self, folder: Path, checkpoint: Path, texts: Sequence[str], *, steps: int) -> None:
        self._folder = folder
        self._steps = steps
        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
        shape = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        self._shape = {name: shape[name] for name in ("vocab_size", "n_layer", "n_embd", "n_head")}
        ids = self._tokenizer(list(texts)).input_ids
        self.prompts = [self._tokenizer.decode(row[:_PROMPT_TOKENS]) for row in ids]
        self._runs = 0

    def run(self, reward: str | Callable[..., Any]) -> list[dict[str, float]]:
        """The metrics of every step that counts."""
        self._runs += 1
        folder = self._folder / f"ppo_{self._runs}"
        trainer = PPOTrainer(
            load(PPORunConfig, self._settings(folder)),
            reward=reward,
            prompts=self.prompts,
            model=self._policy(),
            tokenizer=self._tokenizer,
        )
        try:
            trainer.fit()
        finally:
            trainer.close()
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines][1:]

    def _settings(self, folder: Path) -> dict[str, Any]:
        return {
            "model": {"architecture": {"model_type": "gpt2"}},
            "generation": {"max_new_tokens": 64, "chunk_size": 8},
            "reward": {"client": {"cache_size": 0, "deadline_s": 300.0}},
            "ppo": {"rollouts_per_step": 64, "epochs": 1, "minibatches": 4, "forward_batch_size": 16},
            "train": {"run_dir": str(folder), "total_steps": self._steps, "eval_every": 0},
        }

    def _policy(self) -> GPT2LMHeadModel:
        torch.manual_seed(0)
        special: dict[str, Any] = {"bos_token_id": None, "eos_token_id": self._tokenizer.eos_token_id}
        no_dropout: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(GPT2Config(n_positions=WINDOW, **self._shape, **special, **no_dropout))


def in_process(limit: Limit) -> Callable[..., list[float]]:
    """The reward model as a Python function; it computes on its own core, in the reward's thread."""

    def reward(samples: Sequence[str], **_: Any) -> list[float]:
        return limit.score_texts(samples)

    return reward


def seconds_of(step: dict[str, float]) -> float:
    """A whole step."""
    return sum(step[name] for name in _PHASES)


def median_of(steps: Sequence[dict[str, float]], name: str) -> float:
    """Of one metric over the steps."""
    return statistics.median(step[name] for step in steps)
