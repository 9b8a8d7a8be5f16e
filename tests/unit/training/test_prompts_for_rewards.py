"""Every trainer asks its reward, before the run, whether it can read the prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from conch.errors import ConfigError
from conch.rewards.base import RewardSource
from conch.types import Prompt, RewardResult, RewardStatus, Rollout
from tests.runs import TOKENIZER, grpo_trainer, ilql_trainer, ppo_trainer, rft_trainer, sft_trainer


class DialoguesOnly(RewardSource):
    """Reads nothing but dialogues, as a served model with a chat template of its own."""

    def __init__(self) -> None:
        self.seen: list[Prompt] = []
        self.special: set[str] = set()

    def check(self) -> None: ...

    def submit(self, rollouts: Sequence[Rollout]) -> Future[list[RewardResult]]:
        future: Future[list[RewardResult]] = Future()
        future.set_result([RewardResult(RewardStatus.OK, scores={"reward": 1.0})] * len(rollouts))
        return future

    def check_prompts(self, prompts: Sequence[Prompt], special_tokens: Any = ()) -> None:
        self.seen, self.special = list(prompts), set(special_tokens)
        if any(prompt.dialogue is None for prompt in prompts):
            raise ConfigError("reads dialogues")


TRAINERS: dict[str, Callable[..., Any]] = {
    "ppo": ppo_trainer,
    "grpo": grpo_trainer,
    "rft": rft_trainer,
    "sft": partial(sft_trainer, samples=["ab", "cd"]),
    "ilql": partial(ilql_trainer, samples=["ab", "cd"], rewards=[0.0, 1.0]),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_prompts_that_the_reward_cannot_read_are_refused(name: str, tmp_path: Path) -> None:
    source = DialoguesOnly()
    given: dict[str, Any] = {"reward_fn": source, "eval_prompts": ["ab", "c"]}
    with pytest.raises(ConfigError, match="reads dialogues"):
        TRAINERS[name](tmp_path / "run", **given)
    assert [prompt.text for prompt in source.seen][-2:] == ["ab", "c"]
    assert {str(TOKENIZER.eos_token), str(TOKENIZER.pad_token)} <= source.special
    assert not (tmp_path / "run").exists()


def test_dialogues_that_the_reward_reads_are_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        TOKENIZER, "chat_template", "{% for message in messages %}{{ message.content }}{% endfor %}"
    )
    source = DialoguesOnly()
    prompts = [{"prompt": [{"role": "user", "content": text}]} for text in ("ab", "c")]
    with closing(ppo_trainer(tmp_path / "run", reward_fn=source, prompts=prompts)):
        assert [prompt.text for prompt in source.seen] == ["ab", "c"] * 2  # trained on and evaluated on


def test_a_reward_function_must_take_the_keys_of_all_prompts(tmp_path: Path) -> None:
    def reward(samples: list[str], prompts: list[str], outputs: list[str], answer: list[int]) -> list[float]:
        return [0.0] * len(outputs)

    prompts = ["a", {"prompt": "b", "answer": 1}, {"prompt": "c", "source": 2}]
    with pytest.raises(ConfigError, match=r"define it as `reward\(samples, prompts, outputs, answer, source"):
        grpo_trainer(tmp_path / "run", reward_fn=reward, prompts=prompts)
