"""A run in a thread of this process, whose client the test is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import models

from conch.config import load
from conch.service.leases.records import Answer, Asker, Handout, Post
from conch.service.refusals import RefusedError
from conch.service.runs.exchange import Ask
from conch.service.runs.run import TrainingRun
from conch.service.runs.settings import RemoteRunConfig, run_config
from conch.service.runs.trainer import readable_text, sample_seed
from conch.trainers.grpo import GRPOTrainer
from conch.types import RewardResult, RewardStatus
from tests.launches import LONGEST_S
from tests.runs import parameters
from tests.services import tiny_model, tiny_settings, vowel_rewards, weights_in
from tests.tiny import char_tokenizer

_RUNS: list[TrainingRun] = []


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _stopped_runs() -> Iterator[None]:
    yield
    while _RUNS:
        _RUNS.pop().stop("the test is over", LONGEST_S)


def started(folder: Path, model: Path, **settings: Any) -> TrainingRun:
    run = TrainingRun(folder, tiny_settings(model, **settings), idle_s=LONGEST_S)
    _RUNS.append(run)
    run.start()
    run.loaded.result(LONGEST_S)
    return run


def ask(run: TrainingRun, prompt: Any, request: str = "") -> Handout:
    return run.exchange.ask(Ask(prompt, Asker("", request, "d", 4))).result(LONGEST_S)


def reward(run: TrainingRun, handout: Handout, rewards: Sequence[float | None]) -> Answer:
    hashes = tuple(sample.hash for sample in handout.group.samples)
    return run.exchange.reward(Post("", None, hashes, tuple(rewards)))


def texts(handout: Handout) -> list[str]:
    return [sample.completion.text for sample in handout.group.samples]


def train(run: TrainingRun, prompts: Sequence[str], *, together: bool = True) -> list[list[str]]:
    """One update on these prompts; returns their completions."""
    futures = [run.exchange.ask(Ask(prompt, Asker("", "", "d", 4))) for prompt in prompts] if together else []
    handouts = [each.result(LONGEST_S) for each in futures] or [ask(run, prompt) for prompt in prompts]
    answers = [reward(run, each, vowel_rewards(texts(each))) for each in handouts]
    assert run.exchange.when_version(answers[-1].version).result(LONGEST_S) == answers[-1].version
    return [*map(texts, handouts)]


def test_completions_depend_on_the_seed_and_the_group_and_not_on_what_is_sampled_beside(
    model: Path, tmp_path: Path
) -> None:
    together, alone = started(tmp_path / "a", model), started(tmp_path / "b", model)
    for prompts in (["ab", "cd"], ["ef", "ab"]):
        assert train(together, prompts) == train(alone, prompts, together=False)
    # Log-probs of what is sampled in batches of other sizes differ by rounding, and so do weights then.
    ours, theirs = (weights_in(run.model(None, LONGEST_S).read_bytes()) for run in (together, alone))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)
    other = started(tmp_path / "c", model, seed=1)
    assert texts(ask(alone, "ab")) != texts(ask(other, "ab"))
    assert len({sample_seed(0, number, place) for number in range(50) for place in range(8)}) == 400


def test_update_is_that_of_grpo_on_the_same_samples(model: Path, tmp_path: Path) -> None:
    run = started(tmp_path / "run", model)
    handouts = [ask(run, prompt) for prompt in ("ab", "cd")]
    rewards = [[1.0, 0.0, None, 2.0], [0.5, 0.25, 1.0, 0.0]]
    answers = [reward(run, *pair) for pair in zip(handouts, rewards, strict=True)]
    assert [answer.outcome for answer in answers] == ["whole", "whole"]
    run.exchange.when_version(1).result(LONGEST_S)
    run.stop("enough", LONGEST_S)

    values = run_config(run.settings, tmp_path / "alone").model_dump()
    values["train"]["resume"] = None
    results = [
        RewardResult(RewardStatus.OK, {"reward": each})
        if each is not None
        else RewardResult(RewardStatus.INVALID)
        for row in rewards
        for each in row
    ]
    with closing(
        GRPOTrainer(load(RemoteRunConfig, values), reward=lambda outputs, **_: outputs, prompts=["a"])
    ) as trainer:
        rollouts = [rollout for handout in handouts for rollout in handout.group.rollouts]
        batch, _ = trainer.make_batch(rollouts, results, trainer.compute_logprobs(rollouts))
        trainer.update(batch)
        expected = parameters(trainer.lm)
        [checkpoint] = (run.folder / "train" / "checkpoints").glob("step_*")
        trained = type(trainer.lm).from_pretrained(checkpoint, dtype=torch.float64)
    # The run's thread may compute with another number of threads than this one: rounding of float64 differs.
    assert torch.allclose(parameters(trained), expected, rtol=0.0, atol=1e-9)


def test_old_samples_are_weighed_and_counted(model: Path, tmp_path: Path) -> None:
    run = started(tmp_path / "run", model, training_batch_size=1, max_staleness=1)
    slow, slower = ask(run, "ab"), ask(run, "cd")
    train(run, ["ef"])
    assert reward(run, slow, [1.0, 2.0, 3.0, 4.0]) == Answer("whole", 2)
    run.exchange.when_version(2).result(LONGEST_S)
    assert run.exchange.metrics["staleness/max"] == 1.0
    assert run.exchange.metrics["rollout/importance_ratio_max"] > 1.0
    late = reward(run, slower, [1.0, 2.0, 3.0, 4.0])
    assert late.outcome == "dropped" and "older than `max_staleness` = 1" in late.detail


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("abcdefgh" * 2, "the prompt has 16 tokens, and the model's window leaves 11"),
        ([{"role": "user", "content": "ab"}], "the prompt cannot be sampled"),
    ],
)
def test_prompt_that_cannot_be_sampled_is_refused_and_the_run_goes_on(
    model: Path, tmp_path: Path, prompt: Any, reason: str
) -> None:
    run = started(tmp_path / "run", model)
    with pytest.raises(RefusedError, match=reason):
        ask(run, prompt)
    assert len(texts(ask(run, "ab"))) == 4


def test_run_goes_on_where_it_was_stopped(model: Path, tmp_path: Path) -> None:
    first = started(tmp_path / "run", model)
    train(first, ["ab", "cd"])
    out = ask(first, "ef", "r")
    first.stop("enough", LONGEST_S)
    assert (first.exchange.state, first.is_alive) == ("stopped", False)
    second = started(tmp_path / "run", model)
    assert second.exchange.version == 1
    assert texts(ask(second, "ef", "r")) == texts(out)
    assert reward(second, out, [1.0, 2.0, 3.0, 4.0]) == Answer("whole", 2)


def test_run_goes_on_with_more_updates_and_other_leases_and_learns_as_it_did(
    model: Path, tmp_path: Path
) -> None:
    first = started(tmp_path / "run", model, training_batch_size=1, max_steps=1)
    late = ask(first, "ab")
    train(first, ["cd"])
    first.join(LONGEST_S)
    assert first.exchange.state == "finished"
    longer = started(tmp_path / "run", model, training_batch_size=1, max_steps=2, lease_s=1234.0)
    assert longer.exchange.version == 1
    assert reward(longer, late, [1.0, 2.0, 3.0, 4.0]) == Answer("whole", 2)
    longer.join(LONGEST_S)
    assert (longer.exchange.state, longer.exchange.version) == ("finished", 2)


def test_run_may_have_another_precision_than_the_one_before_it(model: Path, tmp_path: Path) -> None:
    for number, precision in enumerate(["no", "bf16", "no"]):
        overrides = {"grpo": {"kl": {"coef": 0.0}}, "train": {"mixed_precision": precision}}
        run = started(tmp_path / f"run{number}", model, overrides=overrides)
        train(run, ["ab", "cd"])
        run.stop("enough", LONGEST_S)
        assert run.exchange.state == "stopped", run.exchange.reason


@pytest.mark.parametrize(("letters", "text"), [("abc", "a"), ("xyz", "x"), ("012", "0")])
def test_trainer_is_built_with_a_text_that_its_tokenizer_can_read(letters: str, text: str) -> None:
    tokenizer = char_tokenizer(letters)
    backend = tokenizer.backend_tokenizer
    backend.model = models.WordLevel(tokenizer.get_vocab(), unk_token="no such token")
    assert readable_text(tokenizer) == text


def test_model_of_a_version_is_the_same_bytes_again(model: Path, tmp_path: Path) -> None:
    run = started(tmp_path / "run", model)
    before = run.model(None, LONGEST_S)
    content = before.read_bytes()
    train(run, ["ab", "cd"])
    after = run.model(None, LONGEST_S)
    assert (before.name, after.name) == ("version_0.zip", "version_1.zip")
    assert run.model(0, LONGEST_S).read_bytes() == content != after.read_bytes()
    with pytest.raises(RefusedError, match="version 7 of run run is not kept; the model is of version 1"):
        run.model(7, LONGEST_S)
    run.stop("enough", LONGEST_S)
    assert run.model(None, LONGEST_S).read_bytes() == after.read_bytes()


def test_adapter_is_trained_and_given_out_alone(model: Path, tmp_path: Path) -> None:
    from zipfile import ZipFile

    adapter = {"r": 2, "target_modules": ["c_attn"]}
    overrides = {"model": {"dtype": "float64", "peft_config": adapter}, "grpo": {"kl": {"coef": 0.0}}}
    run = started(tmp_path / "run", model, overrides=overrides)
    train(run, ["ab", "cd"])
    with ZipFile(run.model(None, LONGEST_S)) as files:
        assert "adapter_model.safetensors" in files.namelist()
        assert "model.safetensors" not in files.namelist()
