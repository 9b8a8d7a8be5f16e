"""Settings of clients as a run's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conch.config import RolloutConfig
from conch.errors import ConfigError
from conch.service.protocol import TrainingSettings
from conch.service.runs.settings import run_config


def config_of(**settings: Any) -> Any:
    return run_config(TrainingSettings(**{"model_id": "m", **settings}), Path("run"))


def test_settings_say_model_sizes_and_rates() -> None:
    config = config_of(
        max_completion_length=7,
        num_completions_per_prompt=5,
        training_batch_size=2,
        gradient_accumulation_steps=3,
        learning_rate=0.5,
        max_steps=11,
    )
    assert (config.model.path, config.generation.max_new_tokens, config.grpo.group_size) == ("m", 7, 5)
    assert (config.grpo.prompts_per_step, config.train.gradient_accumulation_steps) == (6, 3)
    assert (config.optimizer.learning_rate, config.train.total_steps) == (0.5, 11)
    assert config.grpo.correction.is_on and config.reward.failure.policy == "drop"
    assert (config.train.resume, config.train.run_dir) == ("auto", Path("run"))


def test_further_settings_are_laid_over_these() -> None:
    config = config_of(
        overrides={
            "grpo": {"clip_low": 0.1},
            "model": {"peft_config": {"r": 4}},
            "scheduler": {"name": "cosine"},
        }
    )
    assert (config.grpo.clip_low, config.grpo.group_size) == (0.1, 3)
    assert (config.model.path, config.model.peft_config) == ("m", {"r": 4})


def test_what_samples_is_the_services_to_say() -> None:
    said = RolloutConfig(urls="host:8100", weights="files")
    config = run_config(TrainingSettings(model_id="m"), Path("run"), said)
    assert (config.rollout.urls, config.rollout.weights) == ("host:8100", "files")
    with pytest.raises(ConfigError, match=r"`overrides\.rollout` cannot be set by a client"):
        config_of(overrides={"rollout": {"urls": "evil:1"}})


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"reward": {"function": "x.py:f"}}, "`overrides.reward` cannot be set by a client"),
        ({"data": {"train": "/etc/passwd"}}, "`overrides.data` cannot be set by a client"),
        ({"model": {"trust_remote_code": True}}, "`overrides.model.trust_remote_code` cannot be set"),
        ({"model": {"path": "other"}}, "`overrides.model.path` cannot be set"),
        ({"train": {"run_dir": "/"}}, "`overrides.train.run_dir` cannot be set"),
        ({"tokenizer": {"path": "other"}}, "`overrides.tokenizer.path` cannot be set"),
        ({"grpo": {"group_size": 4}}, "is said by `num_completions_per_prompt`"),
        ({"optimizer": {"learning_rate": 1.0}}, "is said by `learning_rate`"),
        ({"grpo": {"max_resamples": 1}}, "samples again, where clients bring the prompts"),
        ({"grpo": 3}, "`overrides.grpo` is a section"),
        ({"grpo": {"clip_lo": 0.1}}, "did you mean `grpo.clip_low`"),
    ],
)
def test_setting_that_a_client_may_not_set_is_refused(overrides: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        config_of(overrides=overrides)


def test_bound_that_no_update_could_be_made_within_is_refused() -> None:
    with pytest.raises(ConfigError, match="`max_groups` = 3 is less than the 4 groups"):
        config_of(max_groups=3, training_batch_size=4)
