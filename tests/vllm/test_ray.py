"""vLLM in an actor of Ray: asynchronous GRPO, whose weights reach it, and whose ledger is whole."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from conch.config import load
from conch.trainers.async_grpo import AsyncGRPORunConfig, AsyncGRPOTrainer
from conch.training.overlap.ledger import ledger_faults, read_ledger
from tests.runs import vowels
from tests.vllm.conftest import CACHE_BYTES, make_lm

PROMPTS = ["a", "bc", "def", "g", "ha", "b", "cd", "e"]


@pytest.mark.parametrize("partial", [False, True])
def test_asynchronous_run_samples_from_the_weights_that_it_was_sent(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, partial: bool
) -> None:
    config = load(
        AsyncGRPORunConfig,
        {
            "model": {"architecture": {"model_type": "gpt2"}},
            "generation": {"max_new_tokens": 24, "chunk_size": 8},
            "grpo": {"prompts_per_step": 2, "group_size": 4, "minibatches": 2},
            "optimizer": {"learning_rate": 1e-3},
            "rollout": {"ray": {"engine": "vllm"}, "kv_cache_memory_bytes": CACHE_BYTES},
            "asynchronous": {"max_staleness": 2, "partial_rollouts": partial},
            "train": {"total_steps": 5, "eval_every": 5, "run_dir": tmp_path / "run"},
        },
    )
    lm = make_lm(tokenizer, 0)
    trainer = AsyncGRPOTrainer(config, reward=vowels, prompts=PROMPTS, model=lm, tokenizer=tokenizer)
    with closing(trainer):
        trainer.fit()
        sampled = trainer.rollout(trainer.next_prompts(2))
        outputs = trainer.compute_logprobs(sampled, policy_too=True)
        assert outputs.logprobs is not None
        gaps = (outputs.logprobs - outputs.sequences.sampling_logprobs)[outputs.sequences.response_mask]
        assert gaps.abs().max() < 1e-3, "the weights of the last step did not arrive"
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[1]["rollout/logprob_diff"] < 1e-4, "the first step's samples are of the policy itself"
    assert rows[1]["staleness/max"] == 0
    assert all(0 <= row["staleness/mean"] <= row["staleness/max"] <= 2 for row in rows[1:])
    assert [line["position"] for line in read_ledger(tmp_path / "run")] == list(range(10))
    assert ledger_faults(tmp_path / "run", len(PROMPTS)) == []
