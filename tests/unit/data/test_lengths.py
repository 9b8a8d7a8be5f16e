"""Rows left out for their length, alone and in every trainer."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from conch.config import DataConfig, load
from conch.data.formats import fitting
from conch.errors import ConfigError, DataError
from tests.runs import ilql_trainer, ppo_trainer, reward_trainer, sft_trainer

LIMITS = {"min_tokens": 2, "max_tokens": 4}


def test_rows_of_other_lengths_are_left_out_and_counted(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("conch"), "propagate", True)
    with caplog.at_level(logging.WARNING, "conch"):
        assert fitting([1, 2, 4, 5, 9, 3], load(DataConfig, LIMITS), "samples") == [1, 2, 5]
    assert [record.getMessage() for record in caplog.records] == [
        "3 of 6 samples left out: 1 of fewer than 2 tokens, 2 of more than 4"
    ]


def test_nothing_is_said_where_all_fit(caplog: pytest.LogCaptureFixture) -> None:
    assert fitting([0, 7], DataConfig(), "samples") == [0, 1]
    assert not caplog.records


def test_no_row_of_that_length_is_refused() -> None:
    with pytest.raises(DataError, match=r"none of the 2 samples .* the shortest has 1 tokens, the longest 5"):
        fitting([1, 5], load(DataConfig, LIMITS), "samples")
    with pytest.raises(ConfigError, match="`max_tokens` = 4 is below `min_tokens` = 5"):
        load(DataConfig, {"min_tokens": 5, "max_tokens": 4})


def test_sft_leaves_samples_out(tmp_path: Path) -> None:
    # An eos token joins each.
    trainer = sft_trainer(tmp_path, ["", "abc", "abcd", "a"][1:], data=LIMITS)
    assert [len(sample.token_ids) for sample in trainer.samples] == [4, 2]


def test_ppo_leaves_prompts_out_but_none_of_the_evaluation(tmp_path: Path) -> None:
    trainer = ppo_trainer(tmp_path, prompts=["a", "bc", "defgh"], eval_prompts=["a"], data=LIMITS)
    assert [prompt.text for prompt in trainer.prompts] == ["bc"]
    assert [prompt.text for prompt in trainer.eval_prompts] == ["a"]


@pytest.mark.parametrize("longer", [0, 1])
def test_what_is_left_out_is_told_once_where_prompts_are_evaluated_on_as_well(
    longer: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("conch"), "propagate", True)
    prompts = ["", "a", "bc", "defgh" * 20]  # the last one would fit no window
    trainer = ppo_trainer(
        tmp_path,
        prompts=prompts,
        data=LIMITS,
        generation={"max_new_tokens": 4},
        eval_generation={"max_new_tokens": 4 + longer},
    )
    assert [prompt.text for prompt in trainer.eval_prompts] == ["bc"] == [p.text for p in trainer.prompts]
    left_out = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert [text.partition(" left out")[0] for text in left_out] == ["1 of 4 prompts", "2 of 3 prompts"]


def test_ilql_leaves_samples_out_with_their_rewards(tmp_path: Path) -> None:
    rewards = [9.0, 1.0, 7.0, 2.0]
    trainer = ilql_trainer(
        tmp_path,
        [["a", "bcdef"], ["a", "b"], ["abcdef", "a"], ["b", "cd"]],
        rewards,
        data=LIMITS,
        ilql={"normalise_rewards": False},
    )
    assert [len(sample.token_ids) for sample in trainer.samples] == [3, 4]
    assert trainer.rewards == [1.0, 2.0]


def test_a_reward_model_leaves_out_pairs_of_which_one_text_is_too_long(tmp_path: Path) -> None:
    rows = [{"chosen": "ab", "rejected": "c"}, {"chosen": "a", "rejected": "bcdef"}]
    trainer = reward_trainer(tmp_path, rows, data={"max_tokens": 4})
    assert len(trainer.samples) == 1
