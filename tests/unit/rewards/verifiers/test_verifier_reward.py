"""A verifier as a reward source: scores, facts, failures, rows that cannot be read."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conch.config import DataConfig, GSM8KConfig, IFEvalConfig, RewardConfig, load
from conch.data.files import training_rows
from conch.errors import ConfigError, DataError
from conch.evaluation.evaluator import Evaluator, watched_row
from conch.rewards import RewardSource, Verdict, Verifier, from_user
from conch.rewards.scorer import RewardScorer, total_reward, weight_of
from conch.rewards.verifiers.gsm8k import GSM8K
from conch.rewards.verifiers.ifeval.verifier import IFEval
from conch.rewards.verifiers.source import VerifierReward
from conch.types import RewardStatus, Rollout
from tests.fakes.rollouts import rollouts
from tests.fakes.verifiers import ODD, Letter, Slow
from tests.runs import grpo_trainer, ilql_trainer, ppo_trainer, rft_trainer, sft_trainer, vowels

Trainer = Callable[..., Any]


class WithFact(Verifier[str]):
    """Gives a fact of a name that evaluations have already."""

    name = "with fact"
    columns = ()

    def read_key(self, row: Mapping[str, Any]) -> str:
        return ""

    def verify(self, completion: str, key: str) -> Verdict:
        return Verdict({"answer": 1.0}, {"reward": 2.0})


class OnePart(Letter):
    """Only whether it is right."""

    def verify(self, completion: str, key: str) -> Verdict:
        verdict = super().verify(completion, key)
        return Verdict({"answer": verdict.scores["answer"]}, verdict.facts)


def sampled(*outputs: str, letter: Any = "a") -> list[Rollout]:
    row = {} if letter is None else {"letter": letter}
    return [replace(each, prompt=replace(each.prompt, metadata=row)) for each in rollouts(*outputs)]


def statuses(source: RewardSource, *outputs: str) -> list[tuple[RewardStatus, str]]:
    return [(result.status, result.detail) for result in source.submit(sampled(*outputs)).result(300)]


def test_scores_are_objectives_and_facts_stand_beside_them() -> None:
    with VerifierReward(Letter()) as reward:
        right, wrong = reward.submit(sampled("ab", "b")).result()
    assert right.scores == {"answer": 1.0, "format": 0.5}
    assert wrong.scores == {"answer": 0.0, "format": 0.0}
    assert right.facts["correct"] == 1.0 and right.facts["length_right"] == 2.0
    assert math.isnan(right.facts["length_wrong"]) and wrong.facts["length_wrong"] == 1.0
    assert total_reward(right, {"format": 0.1}) == pytest.approx(1.05)


def test_a_check_that_breaks_or_gives_no_number_is_invalid() -> None:
    with VerifierReward(Letter()) as reward:
        results = reward.submit([*sampled("broken", "nan", "ab"), *sampled("ab", letter=None)]).result()
    assert [result.status for result in results] == [
        RewardStatus.INVALID,
        RewardStatus.INVALID,
        RewardStatus.OK,
        RewardStatus.INVALID,
    ]
    assert results[0].detail == "verifier letter broke: ZeroDivisionError: by design"
    assert results[1].detail == "verifier letter gave nan for `answer`"
    assert results[3].detail == "verifier letter: the prompt's row has no `letter`"
    assert not any(result.scores for result in results if not result.ok)


@pytest.mark.parametrize("make", [Letter, Slow])
def test_what_is_no_verdict_is_invalid_for_its_own_completion_and_keeps_nobody_waiting(
    make: type[Letter], caplog: pytest.LogCaptureFixture
) -> None:
    with VerifierReward(make()) as reward:
        results = reward.submit([*sampled(*ODD, "ab"), *sampled("ab", letter=0)]).result(300)
    details = [result.detail for result in results]
    assert details == [
        "verifier letter gave None instead of a Verdict",
        "verifier letter gave 1.0 instead of a Verdict",
        "verifier letter gave None for `answer`",
        "verifier letter gave 'yes' for `answer`",
        "verifier letter gave no score",
        "",
        "",
        "",
        "verifier letter: the prompt's row cannot be read: ZeroDivisionError: by design",
    ]
    assert [result.ok for result in results] == [not detail for detail in details]
    no_fact, as_numpy = results[5], results[6]
    assert all(map(math.isnan, no_fact.facts.values()))
    assert as_numpy.facts["correct"] == 1.0 and as_numpy.facts["length_right"] == 5.0
    json.dumps([dict(as_numpy.scores), dict(as_numpy.facts)])
    assert not caplog.records


def test_closing_leaves_nobody_waiting(caplog: pytest.LogCaptureFixture) -> None:
    reward = VerifierReward(Slow())
    future = reward.submit(sampled("late", "ab", "b"))
    reward.close()
    assert not any(result.ok for result in future.result(300))
    assert not caplog.records


def test_late_and_dead_checks_are_timeouts_and_invalid_the_second_time() -> None:
    with VerifierReward(Slow()) as reward:
        reward.check()
        first = statuses(reward, "late", "ab", "dead", "b")
        again = statuses(reward, "late", "a")
    assert [status for status, _ in first] == [
        RewardStatus.TIMEOUT,
        RewardStatus.OK,
        RewardStatus.TIMEOUT,
        RewardStatus.OK,
    ]
    assert [status for status, _ in again] == [RewardStatus.INVALID, RewardStatus.OK]
    late = r"verifier letter: the (check|start) took longer than 1 s, as before \(sample [0-9a-f]{8}\)"
    assert re.fullmatch(late, again[0][1])


def test_late_checks_of_equal_samples_asked_for_together_are_no_retry_of_each_other() -> None:
    with VerifierReward(Slow()) as reward:
        reward.check()
        futures = [reward.submit(sampled(*outputs)) for outputs in (("late", "late"), ("late",))]
        first = [result.status for future in futures for result in future.result(300)]
        again = statuses(reward, "late", "late")
    assert first == [RewardStatus.TIMEOUT] * 3
    assert [status for status, _ in again] == [RewardStatus.INVALID] * 2


def test_waiting_for_rewards_ends_with_a_check_that_never_comes() -> None:
    config = load(RewardConfig, {"failure": {"policy": "wait", "wait_budget_s": 600}})
    with VerifierReward(Slow()) as reward:
        scorer = RewardScorer(reward, config)
        scorer.submit(sampled("late", "ab"))
        started = time.monotonic()
        with pytest.raises(Exception, match=r"1 of 2 samples got no reward.*as before"):
            scorer.gather()
    assert time.monotonic() - started < 300


def test_a_member_weighs_as_a_whole_or_part_by_part() -> None:
    weights = {"letter": 2.0, "letter/format": 0.0}
    assert [weight_of(name, weights) for name in ("letter/answer", "letter/format", "model")] == [2, 0, 1]
    config = load(RewardConfig, {"weights": weights})
    with from_user({"letter": Letter(), "model": vowels}, config) as reward:
        (result,) = reward.submit(sampled("ab")).result()
    assert result.scores == {"letter/answer": 1.0, "letter/format": 0.5, "model": 1.0}
    assert result.facts["letter/correct"] == 1.0
    assert total_reward(result, weights) == 3.0
    with pytest.raises(ConfigError, match=r"names `lettre`.*`letter/answer`"):
        total_reward(result, {"lettre": 1.0})


def test_a_member_with_one_part_is_called_like_the_member() -> None:
    with from_user({"letter": OnePart(), "model": vowels}, RewardConfig()) as reward:
        (result,) = reward.submit(sampled("ab")).result()
    assert result.scores == {"letter": 1.0, "model": 1.0}


def test_names_of_verifiers_are_taken_where_addresses_are() -> None:
    with pytest.raises(ConfigError, match="no verifier `gsm`; there are gsm8k, ifeval"):
        from_user("verifier:gsm", RewardConfig())
    with pytest.raises(ConfigError, match=r"verifier` = gsm8k stands beside.*verifier:gsm8k"):
        load(RewardConfig, {"verifier": "gsm8k", "url": "host:8001/model"})
    with pytest.raises(ConfigError, match=r"reward.dense takes the scores of a model served by Triton"):
        from_user(Letter(), RewardConfig(dense=True))
    with from_user({"m": "127.0.0.1:1/x", "v": "verifier:gsm8k"}, RewardConfig()) as reward:
        assert reward.name == "the sum of m, v" and reward.measures_facts
    with from_user(None, RewardConfig(verifier="gsm8k")) as reward:
        assert reward.name == "verifier gsm8k"


def test_a_class_is_no_reward() -> None:
    with pytest.raises(ConfigError, match=r"the reward is the class Letter: give one of it, Letter\(\)"):
        from_user(Letter, RewardConfig())  # pyright: ignore[reportArgumentType]


def test_a_row_that_one_member_cannot_read_names_the_member() -> None:
    with from_user({"model": vowels, "first": Letter()}, RewardConfig()) as reward:
        reward.check_row({"letter": "a"})
        with pytest.raises(DataError, match=r"^has no `letter` \(for reward member `first`\)$"):
            reward.check_row({})


@pytest.mark.parametrize(
    ("section", "settings", "told"),
    [
        (GSM8KConfig, {"last_characters": 300}, "acts with `extractor` = verl only, not with math"),
        (IFEvalConfig, {"version": "torchrl", "loose": True}, "`loose` acts with `version` = share only"),
    ],
)
def test_a_setting_without_effect_is_refused(section: Any, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load(section, settings)


ROWS = [{"prompt": "a", "letter": "b"}, {"prompt": "c", "letter": "d"}]


@pytest.mark.parametrize("make", [ppo_trainer, grpo_trainer, rft_trainer])
def test_rows_that_cannot_be_read_end_the_run_before_it_starts(tmp_path: Path, make: Trainer) -> None:
    rows = [*ROWS, {"prompt": "e"}, {"prompt": "f", "letter": 0}]
    told = "completions: prompt 2 has no `letter`; prompt 3 cannot be read: ZeroDivisionError: by design"
    with pytest.raises(DataError, match=told):
        make(tmp_path / "run", reward_fn=Letter(), prompts=rows)
    with pytest.raises(DataError, match="evaluation prompt 1 has no `letter`"):
        make(tmp_path / "run", reward_fn=Letter(), prompts=ROWS, eval_prompts=[ROWS[0], "b"])


def test_an_unknown_instruction_of_a_file_is_told_with_its_line(tmp_path: Path) -> None:
    names = ("punctuation:no_comma", "punctuation:no_comma", "punctuation:no_commas", "punctuation:no_comma")
    rows = [{"prompt": "ab", "instruction_id_list": [name], "kwargs": [{}]} for name in names]
    file = tmp_path / "tasks.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = training_rows(DataConfig(train=str(file)), "prompts", form=lambda row: row)
    told = r"tasks.jsonl line 3 has the unknown instruction `punctuation:no_commas`; [^;]*no_comma\b"
    with pytest.raises(DataError, match=told):
        grpo_trainer(tmp_path / "run", reward_fn=IFEval(), prompts=prompts)


@pytest.mark.parametrize("make", [ppo_trainer, grpo_trainer, rft_trainer])
def test_facts_are_measured_in_steps_and_evaluations(tmp_path: Path, make: Trainer) -> None:
    trainer = make(tmp_path / "run", reward_fn=Letter(), prompts=ROWS)
    metrics, scores = trainer.step(), trainer.evaluate(repeats=8)
    assert metrics["reward/mean/answer"] == pytest.approx(metrics["verifier/correct"])
    lengths = [metrics["verifier/length_right"], metrics["verifier/length_wrong"]]
    assert all(math.isnan(length) or 0 <= length <= 5 for length in lengths)
    assert not all(math.isnan(length) for length in lengths)
    assert 0 < scores["eval/correct"] < 1
    assert scores["eval/reward"] >= scores["eval/correct"]
    trainer.close()


@pytest.mark.parametrize("make", [sft_trainer, ilql_trainer])
def test_offline_trainers_measure_with_a_verifier(tmp_path: Path, make: Trainer) -> None:
    samples = ["ab", "ba", "cd", "dc", "ef", "fe", "gh", "hg"]
    rewards = ([1.0] * 8,) if make is ilql_trainer else ()
    trainer = make(tmp_path / "run", samples, *rewards, reward_fn=Letter(), eval_prompts=ROWS)
    assert {"eval/reward", "eval/correct"} <= trainer.evaluate(repeats=4).keys()
    trainer.close()


GSM8K_ROWS = [{"prompt": "a", "answer": "#### 3"}, {"prompt": "c", "answer": "1 + 3\n#### 4"}]


@pytest.mark.parametrize("make", [ppo_trainer, grpo_trainer, rft_trainer])
def test_a_verifier_watches_what_is_learned_from_another_reward(tmp_path: Path, make: Trainer) -> None:
    """The learned rewards, and so the weights, are those of a run that nobody watches."""
    outcomes = []
    for verifier in ("gsm8k", None):
        reward = lambda outputs, answer, **_: vowels(outputs)  # noqa: E731
        settings = {"reward_fn": reward, "prompts": GSM8K_ROWS, "evaluation": {"verifier": verifier}}
        trainer = make(tmp_path / str(verifier), **settings)
        scores = trainer.evaluate(repeats=4)
        metrics = {k: v for k, v in trainer.step().items() if not k.startswith(("time/", "reward/"))}
        watched = {name: value for name, value in scores.items() if name.startswith("eval/gsm8k/")}
        outcomes.append(({k: v for k, v in scores.items() if k not in watched}, metrics))
        if verifier:
            assert watched["eval/gsm8k/correct"] == 0.0 and watched["eval/gsm8k/failed_fraction"] == 0.0
        else:
            assert not watched
        trainer.close()
    assert repr(outcomes[0]) == repr(outcomes[1])


def test_parts_and_facts_of_what_watches_have_names_of_their_own(tmp_path: Path) -> None:
    """A right answer in tags: 1.0, of which the form is worth 0.1; the fact `format` is 1 then."""
    settings: dict[str, Any] = {
        "verifier": "gsm8k",
        "gsm8k": {"extractor": "strict", "version": "torchrl"},
    }
    trainer = grpo_trainer(tmp_path / "run", prompts=GSM8K_ROWS, evaluation=settings)
    scores = trainer.evaluate()
    trainer.close()
    source = VerifierReward(GSM8K(load(GSM8KConfig, settings["gsm8k"])))
    prompt = replace(sampled("")[0].prompt, metadata={"answer": "#### 3"})
    (right,) = source.submit([replace(rollouts("<answer>3</answer>")[0], prompt=prompt)]).result()
    source.close()
    assert watched_row(right)["reward/format"] == 0.1 and watched_row(right)["format"] == 1.0
    assert {f"eval/gsm8k/{name}" for name in watched_row(right)} <= scores.keys()


@pytest.mark.parametrize("kind", ["member", "metric_fn", "fact"])
def test_two_figures_of_one_name_are_refused(tmp_path: Path, kind: str) -> None:
    watch: dict[str, Any] = {"verifier": "gsm8k", "gsm8k": {"extractor": "strict"}}
    flexible = GSM8K(load(GSM8KConfig, {"extractor": "flexible"}))
    settings: dict[str, Any] = {
        "member": {"reward_fn": {"gsm8k": flexible, "vowels": vowels}, "evaluation": watch},
        "metric_fn": {"reward_fn": flexible, "metric_fn": lambda outputs, **_: {"correct": 0.0}},
        "fact": {"reward_fn": WithFact()},
    }[kind]
    names = {"member": "gsm8k/correct", "metric_fn": "correct", "fact": "reward"}
    prompts = [{**row, "letter": "a"} for row in GSM8K_ROWS]
    trainer = grpo_trainer(tmp_path / "run", prompts=prompts, **settings)
    with pytest.raises(ConfigError, match=f"`eval/{names[kind]}` would be two figures"):
        trainer.evaluate()
    trainer.close()


def test_what_a_watching_verifier_cannot_check_is_counted_and_told_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = grpo_trainer(tmp_path / "run", prompts=[{**row, "letter": 0} for row in GSM8K_ROWS])
    evaluator = Evaluator(
        trainer.collectives,
        trainer.eval_prompts,
        trainer.variants,
        trainer._make_sampler,
        trainer.config.train,
        scorer=trainer.scorer,
        metric_fn=None,
        watching={"letter": VerifierReward(Letter())},
    )
    scores = evaluator.run()
    evaluator.close()
    trainer.close()
    assert scores["eval/letter/failed_fraction"] == 1.0 and math.isfinite(scores["eval/reward"])
    told = "letter scored 0 of 2 completions of this process only; first: verifier letter: the prompt's row"
    assert told in caplog.text


def test_a_watching_verifier_reads_its_rows_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="verifier gsm8k cannot check completions: prompt 1"):
        grpo_trainer(
            tmp_path / "run",
            prompts=["a", "b"],
            eval_prompts=[*GSM8K_ROWS[:1], "b"],
            evaluation={"verifier": "gsm8k"},
        )


def test_facts_are_recorded_and_replayed(tmp_path: Path) -> None:
    run = grpo_trainer(
        tmp_path / "first",
        reward_fn=Letter(),
        prompts=ROWS,
        reward={"record": True},
        train={"total_steps": 1},
        tracking={"rollouts": True},
    )
    run.fit()
    run.close()
    for name in ("rewards.jsonl", "rollouts/step_1.jsonl"):
        text = (tmp_path / "first" / name).read_text()
        facts = [json.loads(line)["facts"] for line in text.splitlines()]
        assert {"correct", "length_right", "length_wrong"} == facts[0].keys()
        assert "NaN" not in text and any(None in each.values() for each in facts)
    again = grpo_trainer(
        tmp_path / "again", reward_fn=None, prompts=ROWS, reward={"replay": tmp_path / "first"}
    )
    metrics = again.step()
    first = json.loads((tmp_path / "first/metrics.jsonl").read_text().splitlines()[-1])
    assert metrics["verifier/correct"] == pytest.approx(first["verifier/correct"])
    again.close()
