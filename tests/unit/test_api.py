"""`conch.train` picks the algorithm from its arguments, trains, and says what does not fit together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import conch
from conch.config import load
from conch.errors import ConfigError
from conch.trainers.grpo import GRPOTrainer
from conch.trainers.ilql import ILQLTrainer
from conch.trainers.ppo import PPORunConfig, PPOTrainer
from conch.trainers.reward_model import RewardModelRunConfig
from conch.trainers.rft import RFTRunConfig, RFTTrainer
from conch.trainers.sft import SFTTrainer
from tests.runs import PROMPTS, TOKENIZER, policy, vowels

SAMPLES = [("ab", "cd"), ("b", "aa"), ("c", "hg"), ("de", "f")]
MODEL = {"architecture": {"model_type": "gpt2"}}


def settings(run_dir: Path, **sections: Any) -> dict[str, Any]:
    return {"train": {"total_steps": 1, "run_dir": run_dir}, "generation": {"max_new_tokens": 4}, **sections}


@pytest.mark.parametrize(
    ("given", "sections", "kind"),
    [
        ({"prompts": PROMPTS, "reward": vowels}, {"ppo": {"rollouts_per_step": 8}}, PPOTrainer),
        ({"samples": ["abcd"] * 4}, {"sft": {"batch_size": 4}}, SFTTrainer),
        ({"samples": SAMPLES, "rewards": [1.0, 0.0, 2.0, 1.0]}, {"ilql": {"batch_size": 4}}, ILQLTrainer),
    ],
    ids=["ppo", "sft", "ilql"],
)
def test_arguments_pick_the_algorithm(
    tmp_path: Path, given: dict[str, Any], sections: dict[str, Any], kind: type
) -> None:
    config = settings(tmp_path / "run", **sections)
    trainer = conch.train(policy(), tokenizer=TOKENIZER, config=config, **given)
    assert type(trainer) is kind
    assert (trainer.run_dir / "checkpoints/step_1/config.json").is_file()
    assert len(trainer.generate(["ab", "c"])) == 2
    trainer.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/tokenizer.json").is_file()
    trainer.close()


def test_gold_watches_what_is_trained_in_one_call(tmp_path: Path) -> None:
    def gold(outputs: list[str], **_: Any) -> list[float]:
        return [float(len(output)) for output in outputs]

    given: list[dict[str, Any]] = [
        {"prompts": PROMPTS, "reward": vowels, "config": settings(tmp_path / "ppo")},
        {"samples": ["abcd"] * 4, "eval_prompts": PROMPTS, "config": settings(tmp_path / "sft")},
    ]
    for each in given:
        trainer = conch.train(policy(), tokenizer=TOKENIZER, gold=gold, **each)
        assert trainer.evaluate()["eval/gold/failed_fraction"] == 0.0
        trainer.close()


RFT = {"n_generations_per_prompt": 4, "batch_size": 4}


@pytest.mark.parametrize(
    ("given", "sections", "kind"),
    [
        ({}, {"grpo": {"prompts_per_step": 2, "group_size": 4}}, GRPOTrainer),
        ({"algorithm": "rft"}, {"rft": RFT}, RFTTrainer),
        ({}, {"rft": RFT}, RFTTrainer),
        ({"algorithm": "rft"}, {}, RFTTrainer),
    ],
)
def test_an_algorithm_is_picked_by_name_or_by_the_section_of_its_settings(
    tmp_path: Path, given: dict[str, Any], sections: dict[str, Any], kind: type
) -> None:
    config = settings(tmp_path / "run", **sections)
    trainer = conch.train(
        policy(), tokenizer=TOKENIZER, config=config, prompts=PROMPTS, reward=vowels, **given
    )
    trainer.close()
    assert type(trainer) is kind


def test_a_config_of_a_type_picks_its_own(tmp_path: Path) -> None:
    values = settings(tmp_path / "run", model=MODEL, rft={"n_generations_per_prompt": 4, "batch_size": 4})
    config = load(RFTRunConfig, values)
    trainer = conch.train(policy(), tokenizer=TOKENIZER, config=config, prompts=PROMPTS, reward=vowels)
    trainer.close()
    assert type(trainer) is RFTTrainer


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"either `prompts`.*here is nothing"),
        ({"prompts": ["a"], "samples": ["b"]}, r"here is `prompts` and `samples`"),
        ({"rewards": [1.0]}, r"here is `rewards`"),
        (
            {"samples": ["a"], "config": load(PPORunConfig, {"model": MODEL})},
            r"PPORunConfig learns from `prompts`",
        ),
        (
            {"samples": ["a"], "config": load(RewardModelRunConfig, {"model": MODEL})},
            r"RewardModelRunConfig, which `conch.train` does not",
        ),
        ({"samples": ["a"], "tokenizer": None}, r"pass `tokenizer=`"),
        (
            {"prompts": ["a"], "algorithm": "dpo"},
            r"`algorithm` = 'dpo': there are ppo, grpo, async-grpo, rft, ilql, sft; .*RewardModelTrainer",
        ),
        ({"samples": ["a"], "algorithm": "reward_model"}, r"trained by `RewardModelTrainer\(config"),
        ({"samples": ["a"], "algorithm": "reward-model"}, r"trained by `RewardModelTrainer\(config"),
        ({"samples": ["a"], "algorithm": "Async-GRPO"}, r"AsyncGRPORunConfig learns from `prompts`"),
        ({"prompts": ["a"], "algorithm": "sft"}, r"SFTRunConfig learns from `samples`"),
        ({"prompts": ["a"], "config": {"grpo": {}, "rft": {}}}, r"several algorithms: grpo, rft"),
        (
            {"prompts": ["a"], "algorithm": "ppo", "config": {"grpo": {}}},
            r"`algorithm` is 'ppo', but .* another: GRPORunConfig",
        ),
        (
            {"prompts": ["a"], "config": {"grpo": {"group": 4}}},
            r"`grpo.group`; did you mean `grpo.gr",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        conch.train(policy(), **{"tokenizer": TOKENIZER, **given})


def test_columns_of_rows_are_named_in_the_config(tmp_path: Path) -> None:
    seen: list[Any] = []

    def reward(samples: list[str], prompts: list[str], outputs: list[str], truth: list[str]) -> list[float]:
        seen.extend(zip(prompts, truth, strict=True))
        return [1.0] * len(samples)

    rows = [{"question": prompt, "truth": prompt.upper(), "label": None} for prompt in PROMPTS]
    columns = {"columns": {"prompt": "question"}}
    config = settings(tmp_path / "ppo", ppo={"rollouts_per_step": 8}, data=columns)
    conch.train(policy(), tokenizer=TOKENIZER, config=config, prompts=rows, reward=reward).close()
    assert seen and all(prompt in PROMPTS and truth == prompt.upper() for prompt, truth in seen)

    samples = [{"question": "ab", "answer": "cd"}] * 4
    columns = {"columns": {"prompt": "question", "completion": "answer"}}
    config = settings(tmp_path / "sft", sft={"batch_size": 4}, data=columns)
    trainer = conch.train(policy(), tokenizer=TOKENIZER, config=config, samples=samples)
    assert isinstance(trainer, SFTTrainer)
    assert {(sample.num_prompt, len(sample.token_ids)) for sample in trainer.samples} == {(2, 5)}
