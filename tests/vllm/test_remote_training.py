"""A run that clients drive, sampled by vLLM in the trainer's process."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from conch.config import RolloutConfig
from conch.service.leases.records import Asker, Post
from conch.service.protocol import TrainingSettings
from conch.service.runs.exchange import Ask
from conch.service.runs.run import TrainingRun
from tests.launches import LONGEST_S
from tests.services import vowel_rewards
from tests.vllm.conftest import CACHE_BYTES, make_lm


def test_each_update_learns_from_samples_of_the_present_weights(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    make_lm(tokenizer, 0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = TrainingSettings(
        model_id=str(tmp_path / "model"),
        max_completion_length=8,
        num_completions_per_prompt=4,
        training_batch_size=2,
        learning_rate=1e-3,
        max_steps=3,
        overrides={"grpo": {"kl": {"coef": 0.0}}},
    )
    rollout = RolloutConfig(engine="vllm", kv_cache_memory_bytes=CACHE_BYTES)
    run = TrainingRun(tmp_path / "run", settings, idle_s=LONGEST_S, rollout=rollout)
    run.start()
    try:
        run.loaded.result(LONGEST_S)
        for version in range(3):
            futures = [run.exchange.ask(Ask(prompt, Asker("", "", "d", 4))) for prompt in ("ab", "cdef")]
            for future in futures:
                handout = future.result(LONGEST_S)
                assert handout.group.version == version
                samples = handout.group.samples
                rewards = vowel_rewards([sample.completion.text for sample in samples])
                run.exchange.reward(Post("", None, tuple(sample.hash for sample in samples), (*rewards,)))
            run.exchange.when_version(version + 1).result(LONGEST_S)
            assert run.exchange.metrics["rollout/logprob_diff"] < 1e-4, (
                "these were sampled from other weights"
            )
            assert run.exchange.metrics["staleness/max"] == 0
    finally:
        run.stop("the test is over", LONGEST_S)
    assert run.exchange.state == "finished"
