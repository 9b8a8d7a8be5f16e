"""Runs that a gold reward watches: what it decides, what it costs, and that it stops nothing."""

from __future__ import annotations

import json
import math
import shutil
import statistics
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from conch.config import RewardConfig, load
from conch.errors import ConfigError, RewardInvalidError, RewardUnavailableError
from conch.evaluation.curves import run_curve
from conch.evaluation.evaluator import _input
from conch.evaluation.records import EvaluatedSample, read_record, record_path, records_of
from conch.evaluation.watch import ALARMS_FILE
from conch.rewards.combined import EnsembleReward
from conch.rewards.factory import shared_reward
from conch.rewards.function import FunctionReward
from conch.runs.checkpoint import steps_of
from conch.types import Dialogue, Prompt
from tests.fakes.json_rewards import Reply, endpoint, lengths
from tests.runs import PROMPTS, grpo_trainer, ilql_trainer, ppo_trainer, rft_trainer, sft_trainer, vowels
from tests.unit.training.test_run import SAMPLES, metrics_of

Trainer = Callable[..., Any]
EACH = {"total_steps": 4, "eval_every": 1}
# Everything within a second, for a server that is not there.
HASTY = {"connect_timeout_s": 0.2, "request_timeout_s": 0.3, "deadline_s": 0.6, "cache_size": 0}


def gold_length(outputs: Sequence[str], **_: Any) -> list[float]:
    """A gold function: the length of an output in letters."""
    return [float(len(output)) for output in outputs]


class Scripted:
    """A gold function that gives one value for all of an evaluation, and raises where that is None."""

    def __init__(self, *values: float | None) -> None:
        self._values = iter(values)

    def __call__(self, outputs: Sequence[str], **_: Any) -> list[float]:
        value = next(self._values)
        if value is None:
            raise OSError("gold is out")
        return [value] * len(outputs)


def samples_of(trainer: Any) -> Sequence[EvaluatedSample]:
    """Of its latest evaluation."""
    return trainer.evaluation.record.samples


def done(trainer: Any) -> Any:
    try:
        trainer.fit()
    finally:
        trainer.close()
    return trainer


# -------------------------------------------------------------------------------------------------- measuring


@pytest.mark.parametrize("make", [ppo_trainer, grpo_trainer, rft_trainer])
def test_gold_is_measured_and_never_learned_from(tmp_path: Path, make: Trainer) -> None:
    outcomes = []
    for gold in (gold_length, None):
        trainer = make(tmp_path / str(gold is None), gold=gold)
        scores = trainer.evaluate(repeats=3)
        metrics = {k: v for k, v in trainer.step().items() if not k.startswith(("time/", "reward/"))}
        outcomes.append(({k: v for k, v in scores.items() if "/gold/" not in k}, metrics))
        if gold is None:
            assert not any("gold" in name for name in scores)
        else:
            texts = [sample.output for sample in samples_of(trainer)]
            assert scores["eval/gold/reward"] == pytest.approx(statistics.fmean(gold_length(texts)))
            assert scores["eval/gold/failed_fraction"] == 0.0 and scores["eval/gold/requests"] == 1.0
            assert scores["eval/gold/seconds"] >= 0.0
        trainer.close()
    assert repr(outcomes[0]) == repr(outcomes[1])


@pytest.mark.parametrize("make", [sft_trainer, ilql_trainer])
@pytest.mark.parametrize("reward", [vowels, None])
def test_offline_trainers_are_watched_as_well(tmp_path: Path, make: Trainer, reward: Any) -> None:
    rewards = ([1.0] * len(SAMPLES),) if make is ilql_trainer else ()
    trainer = make(
        tmp_path / "run", SAMPLES, *rewards, reward_fn=reward, gold=gold_length, eval_prompts=["a", "b"]
    )
    assert trainer.evaluate()["eval/gold/failed_fraction"] == 0.0
    assert trainer.default_best_metric == "eval/gold/reward"
    trainer.close()


def test_gold_without_prompts_to_sample_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gold measure completions of `eval_prompts`: give some"):
        sft_trainer(tmp_path / "run", SAMPLES, gold=gold_length)


def test_statistics_are_those_of_what_is_kept(tmp_path: Path) -> None:
    """Reckoned anew from the file: population variance of two members, standard errors over prompts."""
    reward = {"a": vowels, "b": lambda outputs, **_: [2.0 * x + 1.0 for x in vowels(outputs)]}
    trainer = ppo_trainer(
        tmp_path / "run",
        reward_fn=reward,
        reward={"combine": "uwo", "uwo_weight": 0.5},
        gold=gold_length,
        train={**EACH, "total_steps": 1, "eval_repeats": 3},
    )
    done(trainer)
    record = read_record(record_path(tmp_path / "run", 1))
    assert [sample.prompt for sample in record.samples] == [place // 3 for place in range(24)]
    assert [sample.input for sample in record.samples] == [text for text in PROMPTS for _ in range(3)]
    a = vowels([sample.output for sample in record.samples])
    pairs = [(x, 2 * x + 1) for x in a]
    assert [tuple(sample.members.values()) for sample in record.samples] == pairs
    variances = [statistics.pvariance(pair) for pair in pairs]
    proxy = [statistics.fmean(pair) - 0.5 * v for pair, v in zip(pairs, variances, strict=True)]
    assert record.column("reward") == pytest.approx(proxy, rel=1e-12)
    assert record.column("gold") == gold_length([sample.output for sample in record.samples])
    assert record.sources == {"reward": trainer.source.name, "gold": "gold_length"}

    def error(column: Sequence[float]) -> float:
        means = [statistics.fmean(column[place : place + 3]) for place in range(0, 24, 3)]
        return statistics.stdev(means) / math.sqrt(8)

    row = metrics_of(tmp_path / "run")[-1]
    assert row["eval/members_variance"] == pytest.approx(statistics.fmean(variances), rel=1e-12)
    assert row["eval/reward_standard_error"] == pytest.approx(error(proxy), rel=1e-12)
    assert row["eval/gold/standard_error"] == pytest.approx(error(record.column("gold")), rel=1e-12)
    counts = [sample.num_tokens for sample in record.samples]
    assert row["eval/length_mean"] == pytest.approx(statistics.fmean(counts))
    assert row["eval/sqrt_kl"] == pytest.approx(math.sqrt(max(0.0, row["eval/kl"])))
    assert record.metrics["eval/kl"] == row["eval/kl"]


def test_a_member_that_fails_for_one_text_is_told_apart(tmp_path: Path) -> None:
    def picky(outputs: Sequence[str], **_: Any) -> list[float]:
        return [math.nan if "c" in output else 5.0 for output in outputs]

    trainer = ppo_trainer(
        tmp_path / "run",
        reward_fn={"a": vowels, "b": picky},
        reward={"combine": "mean", "on_member_failure": "renormalise"},
        gold=gold_length,
    )
    scores = trainer.evaluate(repeats=4)
    trainer.close()
    samples = samples_of(trainer)
    failed = ["c" in sample.output for sample in samples]
    assert 0 < sum(failed) < len(failed)
    assert [sample.members["b"] is None for sample in samples] == failed
    variances = [
        0.0 if lacks else statistics.pvariance([sample.members["a"] or 0.0, 5.0])
        for sample, lacks in zip(samples, failed, strict=True)
    ]
    assert scores["eval/members_variance"] == pytest.approx(statistics.fmean(variances))
    assert scores["eval/gold/failed_fraction"] == 0.0


def test_prompts_in_another_order_are_scored_as_before(tmp_path: Path) -> None:
    """Each prompt keeps its completion with its reward and its gold."""
    found = []
    for order in (PROMPTS, PROMPTS[::-1]):
        trainer = ppo_trainer(
            tmp_path / order[0],
            gold=gold_length,
            eval_prompts=order,
            eval_generation={"do_sample": False},
        )
        scores = trainer.evaluate()
        trainer.close()
        samples = samples_of(trainer)
        rows = sorted((each.input, each.output, *each.scores.values()) for each in samples)
        found.append((rows, {k: v for k, v in scores.items() if k != "eval/gold/seconds"}))
    assert found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-12)


def test_gold_is_asked_while_the_reward_is(tmp_path: Path) -> None:
    both = threading.Barrier(2)

    def reward(outputs: Sequence[str], **_: Any) -> list[float]:
        both.wait(30.0)
        return vowels(outputs)

    def gold(outputs: Sequence[str], **_: Any) -> list[float]:
        both.wait(30.0)
        return gold_length(outputs)

    trainer = ppo_trainer(tmp_path / "run", reward_fn=reward, gold=gold)
    assert trainer.evaluate()["eval/gold/failed_fraction"] == 0.0
    trainer.close()


def test_a_figure_of_every_evaluation_is_no_name_for_the_users(tmp_path: Path) -> None:
    trainer = ppo_trainer(tmp_path / "run", metric_fn=lambda outputs, **_: {"length_mean": 0.0})
    with pytest.raises(ConfigError, match="`eval/length_mean` would be two figures"):
        trainer.evaluate()
    trainer.close()


def test_messages_are_kept_and_pictures_are_not() -> None:
    messages = ({"role": "user", "content": "grün"},)
    assert _input(Prompt("rendered", (1,), dialogue=Dialogue(messages))) == [*messages]
    picture = ({"role": "user", "content": [{"type": "image", "image": b"..."}]},)
    assert _input(Prompt("rendered", (1,), dialogue=Dialogue(picture))) == "rendered"


# --------------------------------------------------------------------------------- what gold decides in a run


def test_the_best_checkpoint_is_that_of_gold(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done(ppo_trainer(run, gold=Scripted(1.0, 2.0, 5.0, None, 4.0), train=EACH))
    assert (run / "checkpoints/best").resolve().name == "step_2"
    assert (run / "best_metric.txt").read_text() == "eval/gold/reward\n"


def test_the_users_choice_of_the_best_metric_wins(tmp_path: Path) -> None:
    train = {**EACH, "total_steps": 1, "best_metric": "eval/length_mean"}
    trainer = done(ppo_trainer(tmp_path / "run", gold=Scripted(1.0, 2.0), train=train))
    assert (tmp_path / "run/best_metric.txt").read_text() == "eval/length_mean\n"
    assert trainer.run.best == pytest.approx(
        max(row["eval/length_mean"] for row in metrics_of(tmp_path / "run"))
    )


def test_a_run_stops_once_gold_has_fallen_and_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    run = tmp_path / "run"
    train = {**EACH, "total_steps": 9, "stop_when": "gold falls for 2 evaluations"}
    trainer = done(ppo_trainer(run, gold=Scripted(3.0, 2.0, 4.0, 3.0, None, 3.5, 1.0), train=train))
    assert trainer.run.step == 5 and set(steps_of(run)) == {2, 5}
    words = "stopped early (train.stop_when): eval/gold/reward was below that of step 2 for 2 evaluations"
    assert words in caplog.text
    again = done(ppo_trainer(run, gold=Scripted(), train={**train, "resume": "auto"}))
    assert again.run.step == 5, "a run that has stopped stays stopped"


def test_gold_that_is_away_is_no_step_towards_an_early_end(tmp_path: Path) -> None:
    train = {**EACH, "total_steps": 4, "early_stopping": 2}
    trainer = done(ppo_trainer(tmp_path / "run", gold=Scripted(3.0, 2.0, None, None, 4.0), train=train))
    assert (trainer.run.step, trainer.run.best) == (4, 4.0)


def test_gold_beside_a_resumed_run_has_a_best_of_its_own(tmp_path: Path) -> None:
    done(ppo_trainer(tmp_path / "run", train={**EACH, "total_steps": 1}))
    train = {**EACH, "total_steps": 3, "resume": "auto"}
    trainer = done(ppo_trainer(tmp_path / "run", gold=Scripted(-1e6, -2e6), train=train))
    assert (trainer.run.best, trainer.run.best_step) == (-1e6, 2)


def test_members_of_two_ensembles_are_compared_each_with_its_own(tmp_path: Path) -> None:
    """The two ensembles of a sum may be far apart where the members of each agree."""

    def ensemble(shift: float) -> EnsembleReward:
        def near(outputs: Sequence[str], **_: Any) -> list[float]:
            return [shift + len(output) for output in outputs]

        def far(outputs: Sequence[str], **_: Any) -> list[float]:
            return [shift + len(output) + 2.0 for output in outputs]

        return EnsembleReward({"near": FunctionReward(near), "far": FunctionReward(far)}, "mean")

    reward = {"low": ensemble(0.0), "high": ensemble(100.0)}
    train = {**EACH, "total_steps": 1}
    done(ppo_trainer(tmp_path / "run", reward_fn=reward, reward={"combine": "sum"}, train=train))

    assert [row["eval/members_variance"] for row in measured(tmp_path / "run")] == [1.0, 1.0]
    assert run_curve(tmp_path / "run").variance.tolist() == [1.0, 1.0]


def test_a_rule_by_gold_wants_gold(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`train\.stop_when` goes by gold, and nothing gives it"):
        ppo_trainer(tmp_path / "run", train={**EACH, "stop_when": "gold falls for 2 evaluations"})


def test_gold_without_evaluations_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ppo_trainer(tmp_path / "run", gold=Scripted(), train={**EACH, "eval_every": 0})
    assert "gold is never asked" in caplog.text


def test_a_rule_by_what_is_not_evaluated_ends_the_run_at_its_start(tmp_path: Path) -> None:
    trainer = ppo_trainer(
        tmp_path / "run", train={**EACH, "stop_when": "eval/optimality falls for 2 evaluations"}
    )
    with pytest.raises(ConfigError, match="eval/optimality, which is no evaluation metric; there are: eval"):
        trainer.fit()
    trainer.close()
    assert trainer.run.step == 0


def measured(run: Path) -> list[dict[str, Any]]:
    """Figures of evaluations, without those of the clock."""
    return [
        {k: v for k, v in row.items() if k.startswith(("eval/", "alarm/")) and not k.endswith("seconds")}
        for row in metrics_of(run)
    ]


def kept(run: Path) -> list[Any]:
    records = [read_record(path) for path in records_of(run)]
    return [(each.step, each.samples, each.sources) for each in records]


def test_a_resumed_run_has_the_alarms_and_evaluations_of_one_that_was_not_stopped(tmp_path: Path) -> None:
    def run(name: str, **train: Any) -> None:
        done(
            ppo_trainer(
                tmp_path / name,
                gold=lambda outputs, **_: [-x for x in vowels(outputs)],
                evaluation={"alarms": {"length_drift": 1.001, "gold_falls": 0.01}},
                optimizer={"learning_rate": 5e-3},
                train={**EACH, "stop_when": "gold falls for 9 evaluations", **train},
            )
        )

    run("whole", total_steps=6)
    run("parts", total_steps=3, save_every=2)
    assert record_path(tmp_path / "parts", 3).exists()
    # As a kill behind the evaluation of step 3 leaves it.
    shutil.rmtree(tmp_path / "parts/checkpoints/step_3")
    run("parts", total_steps=6, save_every=2, resume="auto")

    alarms = (tmp_path / "whole" / ALARMS_FILE).read_text()
    assert {json.loads(line)["name"] for line in alarms.splitlines()} >= {"length_drift"}
    assert (tmp_path / "parts" / ALARMS_FILE).read_text() == alarms
    assert kept(tmp_path / "parts") == kept(tmp_path / "whole") and len(kept(tmp_path / "parts")) == 7
    assert measured(tmp_path / "parts") == measured(tmp_path / "whole")
    tables = sorted(path.name for path in (tmp_path / "whole/samples").glob("alarm_*"))
    assert sorted(path.name for path in (tmp_path / "parts/samples").glob("alarm_*")) == tables != []
    for name in tables:
        whole, parts = ((tmp_path / run / "samples" / name).read_text() for run in ("whole", "parts"))
        assert whole == parts and "output_then" in whole


# ----------------------------------------------------------------------------------------- what is kept of it


def test_nothing_is_kept_where_that_is_not_wanted(tmp_path: Path) -> None:
    done(ppo_trainer(tmp_path / "run", train={**EACH, "total_steps": 1}, evaluation={"keep": False}))
    assert not (tmp_path / "run/evaluations").exists()


def test_an_evaluation_that_ends_half_way_leaves_no_file(tmp_path: Path) -> None:
    """The reward is away for the second of two variants at step 1."""
    calls: list[int] = []

    def reward(outputs: Sequence[str], **_: Any) -> list[float]:
        calls.append(1)
        return [] if len(calls) == 5 else vowels(outputs)  # two variants, a step, two variants

    trainer = ppo_trainer(
        tmp_path / "run", reward_fn=reward, train=EACH, eval_generation={"temperature": [0.5, 1.0]}
    )
    with pytest.raises(RewardInvalidError):
        done(trainer)
    names = sorted(path.name for path in (tmp_path / "run/evaluations").iterdir())
    assert names == ["step_000000@temperature=0.5.jsonl", "step_000000@temperature=1.jsonl"]


def test_a_disk_that_takes_nothing_costs_the_record_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = ppo_trainer(tmp_path / "run", train={**EACH, "total_steps": 1})
    (tmp_path / "run/evaluations").write_text("in the way")
    done(trainer)
    assert "the evaluation of step 1 is not kept" in caplog.text and trainer.run.step == 1


# -------------------------------------------------------------------------------------- gold that is no gold


RM = {"url": "host:8001/rm"}
SERVERS = {"url": "127.0.0.1:8001,Host:8002/rm"}
FUNCTION = f"{__file__}:gold_length"


@pytest.mark.parametrize(
    ("gold", "reward", "config", "member"),
    [
        ("host:8001/rm", None, RM, ""),
        ("HOST:8001/rm", "host:8001/rm", {}, ""),
        ("host:8002,localhost:8001/rm", None, SERVERS, ""),
        ("host:8002/rm", None, SERVERS, ""),
        ("http://h:80/a", None, {"url": "http://b:80,http://h:80/a"}, ""),
        ("host:8001/rm", None, {"members": {"x": "other:1/rm", "y": "host:8001/rm"}}, "y"),
        ("host:8001/rm", {"x": vowels, "y": "host:8001/rm"}, {}, "y"),
        ("verifier:gsm8k", None, {"verifier": "gsm8k"}, ""),
        (FUNCTION, None, {"function": FUNCTION}, ""),
        (FUNCTION, gold_length, {}, ""),
        (gold_length, gold_length, {}, ""),
        (gold_length, None, {"function": FUNCTION}, ""),
        ("host:8001/rm2", None, RM, None),
        ("host:8003/rm", None, SERVERS, None),
        ("verifier:gsm8k", None, {"verifier": "gsm8k", "gsm8k": {"extractor": "strict"}}, None),
        (gold_length, vowels, {}, None),
        (lambda **_: [], lambda **_: [], {}, None),
        (Scripted().__call__, Scripted().__call__, {}, None),
        ("not an address", None, RM, None),
    ],
)
def test_gold_that_is_the_reward_is_known(gold: Any, reward: Any, config: Any, member: str | None) -> None:
    assert shared_reward(gold, RewardConfig(), reward, load(RewardConfig, config)) == member


def test_the_reward_that_the_environment_names_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_HOST", "host:8001/rm")
    assert shared_reward("host:8001/rm", RewardConfig(), None, RewardConfig()) == ""


def test_a_trainer_that_learns_from_no_reward_has_none_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with endpoint() as server:
        monkeypatch.setenv("TRITON_HOST", server.url)
        watch: dict[str, Any] = {"gold": server.url, "gold_client": HASTY}
        trainer = sft_trainer(tmp_path / "run", SAMPLES, eval_prompts=["a"], evaluation=watch)
        assert trainer.evaluate()["eval/gold/failed_fraction"] == 0.0
        trainer.close()
        with pytest.raises(ConfigError, match="is the reward that this run learns from"):
            ppo_trainer(tmp_path / "ppo", reward_fn=None, evaluation=watch)


def test_gold_that_is_the_reward_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`evaluation\.gold` is the reward that this run learns from"):
        ppo_trainer(tmp_path / "run", gold=vowels)
    with pytest.raises(ConfigError, match="is a member, `b`, of the reward"):
        ppo_trainer(tmp_path / "run", reward_fn={"a": gold_length, "b": vowels}, gold=vowels)


@pytest.mark.parametrize(
    ("gold", "message"),
    [
        ("nowhere", "gold: reward `nowhere` names nothing that gives rewards"),
        ("none.py:f", r"gold: `evaluation\.gold`: none\.py cannot be read|`evaluation\.gold`: none\.py"),
        (f"{__file__}:gold_lenght", r"`evaluation\.gold` = .*has no function gold_lenght; did you mean"),
        (lambda texts: [], "gold: reward function `<lambda>` has the wrong signature"),
    ],
)
def test_gold_that_cannot_work_is_refused_before_the_run(tmp_path: Path, gold: Any, message: str) -> None:
    config: dict[str, Any] = {"evaluation": {"gold": gold}} if isinstance(gold, str) else {"gold": gold}
    with pytest.raises(ConfigError, match=message):
        ppo_trainer(tmp_path / "run", **config)


# ------------------------------------------------------------------------------------- gold on a real socket


def test_a_server_that_is_absent_is_refused_at_the_start_and_a_warning_on_a_resume(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = {**EACH, "total_steps": 1, "save_every": 1}
    watch: dict[str, Any]
    with endpoint() as server:
        watch = {"evaluation": {"gold": server.url, "gold_client": HASTY}}
        done(ppo_trainer(tmp_path / "run", train=train, **watch))
    with pytest.raises(RewardUnavailableError, match="gold: "):
        ppo_trainer(tmp_path / "new", train=train, **watch)
    done(ppo_trainer(tmp_path / "run", train={**train, "total_steps": 2, "resume": "auto"}, **watch))
    assert "the run goes on without it until it is back" in caplog.text
    rows = metrics_of(tmp_path / "run")
    assert [row["eval/gold/failed_fraction"] for row in rows] == [0.0, 0.0, 1.0]
    assert rows[2]["eval/gold/reward"] is None and rows[2]["alarm/gold_falls"] is None
    record = read_record(record_path(tmp_path / "run", 2))
    assert {sample.scores["gold"] for sample in record.samples} == {None}
    assert None not in {sample.scores["reward"] for sample in record.samples}


def test_an_outage_in_mid_evaluation_fails_what_was_not_scored_and_the_run_goes_on(tmp_path: Path) -> None:
    """One row a request: the server breaks off behind the third, and is back for the next evaluation."""
    left = [10**9]

    def some(samples: list[str]) -> Reply:
        left[0] -= 1
        return (0, b"") if left[0] < 0 else lengths(samples)

    with endpoint(some) as server:
        client = {**HASTY, "batch_rows": 1, "max_in_flight": 1}
        trainer = ppo_trainer(tmp_path / "run", evaluation={"gold": server.url, "gold_client": client})
        before = len(server.asked)
        whole = trainer.evaluate(step=1)
        asked = len(server.asked) - before
        left[0] = 3
        part = trainer.evaluate(step=2)
        samples = samples_of(trainer)
        left[0] = 10**9
        # The client leaves a server that broke off alone for a moment: at the latest the next ones find it.
        later = (trainer.evaluate(step=step)["eval/gold/failed_fraction"] for step in range(3, 100))
        recovered = 0.0 in later
        trainer.close()

    assert whole["eval/gold/failed_fraction"] == 0.0 and whole["eval/gold/requests"] == asked > 1
    golds = [sample.scores["gold"] for sample in samples]
    assert part["eval/gold/failed_fraction"] == sum(gold is None for gold in golds) / 8
    assert 0 < part["eval/gold/failed_fraction"] < 1
    for sample in samples:  # what was scored before the outage stands beside its own text
        assert sample.scores["gold"] in (None, float(len(str(sample.input)) + len(sample.output)))
    assert recovered


@pytest.mark.parametrize("reply", [b"rubbish", b'{"rewards": ["x"]}', b'{"rewards": []}', b"null"])
def test_a_server_that_talks_rubbish_is_a_failure(tmp_path: Path, reply: bytes) -> None:
    with endpoint() as server:
        trainer = ppo_trainer(tmp_path / "run", evaluation={"gold": server.url, "gold_client": HASTY})
        server.answer = lambda samples: (200, reply)
        scores = trainer.evaluate()
        trainer.close()
    assert scores["eval/gold/failed_fraction"] == 1.0 and math.isfinite(scores["eval/reward"])


def test_dense_gold_and_several_objectives_count_as_their_sums(tmp_path: Path) -> None:
    def dense(outputs: Sequence[str], output_ids: Sequence[Sequence[int]], **_: Any) -> list[list[float]]:
        return [[1.0] * len(ids) for ids in output_ids]

    def two(outputs: Sequence[str], **_: Any) -> dict[str, list[float]]:
        return {"a": gold_length(outputs), "b": [1.0] * len(outputs)}

    for gold in (dense, two):
        trainer = ppo_trainer(tmp_path / gold.__name__, gold=gold)
        scores = trainer.evaluate()
        samples = samples_of(trainer)
        trainer.close()
        expected = [each.num_tokens if gold is dense else 1 + len(each.output) for each in samples]
        assert [each.scores["gold"] for each in samples] == expected
        assert scores["eval/gold/failed_fraction"] == 0.0


def test_an_evaluation_with_gold_for_few_prompts_is_no_best_one(tmp_path: Path) -> None:
    """Of the second evaluation a single prompt has gold, and a high one."""
    values = iter([1.0, 100.0, 2.0])

    def gold(outputs: Sequence[str], **_: Any) -> list[float]:
        value = next(values)
        return [value, *[math.nan if value == 100.0 else value] * (len(outputs) - 1)]

    done(ppo_trainer(tmp_path / "run", gold=gold, train={**EACH, "total_steps": 2}))
    assert (tmp_path / "run/checkpoints/best").resolve().name == "step_2"
