"""`conch best-of-n` on a tiny policy: what it writes, what a second call asks for, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conch.config import GenerationConfig, load
from conch.errors import ConfigError, RewardError
from conch.evaluation.best_of_n import best_of_n_curve
from conch.evaluation.sampling.config import BestOfNRunConfig
from conch.evaluation.sampling.run import tell_of_prefixes
from conch.rollouts.hf.engine import HFEngine
from conch.types import Prompt
from tests.best_of_n_runs import Bench
from tests.fakes.json_rewards import Reply, endpoint
from tests.runs import TOKENIZER
from tests.tiny import tiny_decoder


def letters_a(samples: list[str]) -> Reply:
    return 200, json.dumps({"rewards": [float(sample.count("a")) for sample in samples]}).encode()


@pytest.fixture
def bench(tmp_path: Path, blank_pictures: None) -> Bench:
    return Bench(tmp_path)


def texts(bench: Bench) -> list[tuple[str, int, str]]:
    return [
        (name, sample.prompt, sample.output)
        for name, record in bench.records().items()
        for sample in record.samples
    ]


def test_results_are_those_of_the_kept_samples(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    results = bench.run(**{"best_of_n.ns": "[1,4,20]"})

    samples = [sample for record in bench.records().values() for sample in record.samples]
    assert sorted(sample.prompt for sample in samples) == [0] * 20 + [1] * 20 + [2] * 20
    first, second, *_ = ([each.output for each in record.samples] for record in bench.records().values())
    assert first[:4] != second[:4], "each part of a prompt's completions is drawn for itself"
    for sample in samples:
        assert sample.scores["gold"] == len(sample.output)
        assert sample.scores["reward"] == sum(letter in "ae" for letter in sample.output)
        assert sample.input == ("ab", "c", "def")[sample.prompt]
    curves = []
    for prompt in range(3):
        own = [sample for sample in samples if sample.prompt == prompt]
        proxy, gold = (np.array([sample.scores[name] for sample in own]) for name in ("reward", "gold"))
        curves.append(best_of_n_curve(proxy.astype(float), gold.astype(float), [1, 4, 20]))
    assert [row["gold_score"] for row in results["results"]] == pytest.approx(np.mean(curves, axis=0))
    assert [row["n"] for row in results["results"]] == [1, 4, 20]
    assert results["results"][0]["kl"] == 0.0
    low, high = results["results"][1]["proxy_interval"]
    assert low <= results["results"][1]["proxy_score"] <= high
    assert (bench.folder / "out/best_of_n.png").read_bytes().startswith(b"\x89PNG")
    assert (bench.folder / "out/best_of_n.csv").is_file()


def test_the_same_call_gives_the_same_and_asks_nobody(bench: Bench) -> None:
    first = bench.run()
    before = texts(bench)
    bench.calls()

    assert bench.run() == first
    assert bench.calls() == []
    other = Bench(bench.folder / "again") if (bench.folder / "again").mkdir() is None else bench
    assert other.run()["results"] == first["results"]
    assert texts(other) == before


def test_more_samples_are_added_to_those_there_are(bench: Bench) -> None:
    bench.run()
    before = bench.records()
    bench.calls()

    results = bench.run(**{"best_of_n.num_samples": 30})

    assert {name: bench.records()[name] for name in before} == before
    assert results["num_samples"] == 30
    assert sorted(bench.calls()) == ["length"] * 30 + ["vowels"] * 30
    assert len({sample[2] for sample in texts(bench) if sample[1] == 0}) > 5


def test_fewer_samples_than_are_kept_leave_the_results_of_all(bench: Bench) -> None:
    first = bench.run(**{"best_of_n.num_samples": 30})

    assert bench.run(**{"best_of_n.num_samples": 4})["results"] == first["results"]


def test_another_gold_and_another_proxy_are_scored_beside_and_sampled_for_never(bench: Bench) -> None:
    first = bench.run()
    before = texts(bench)
    bench.calls()

    bench.run(gold=bench.reward("late"), **{"best_of_n.name": "late"})
    assert bench.calls() == ["late"] * 60
    bench.run(**{"reward.function": bench.reward("late"), "best_of_n.name": "proxy-late"})

    assert bench.calls() == [], "its scores are there already"
    assert texts(bench) == before
    assert bench.run() == first
    scores = next(iter(bench.records().values())).samples[0].scores
    assert len(scores) == 3 and {"reward", "gold"} <= scores.keys()


def test_another_objective_over_the_same_members_asks_nobody(bench: Bench) -> None:
    objectives = ("mean", "wco", "uwo", "sum")
    with endpoint() as one, endpoint(letters_a) as two:
        settings: dict[str, Any] = {
            "reward.function": None,
            "reward.members": f"{{a: '{one.url}', b: '{two.url}'}}",
            "reward.uwo_weight": 0.3,
            "reward.client.cache_size": 0,
        }
        runs = {
            objective: bench.run(**settings, **{"reward.combine": objective, "best_of_n.name": objective})
            for objective in objectives
        }
        rows_asked = sum(len(body["query"]) for body in (*one.asked, *two.asked))
    samples = [sample for record in bench.records().values() for sample in record.samples]
    assert rows_asked <= 2 * (len(samples) + len(objectives)), "and a probe of each run"
    pairs = [
        (float(len(text)), float(text.count("a")))
        for text in (f"{sample.input}{sample.output}" for sample in samples)
    ]
    expected = {
        "mean": np.mean(pairs),
        "wco": np.mean([min(pair) for pair in pairs]),
        "uwo": np.mean([np.mean(pair) - 0.3 * np.var(pair) for pair in pairs]),
        "sum": np.mean([sum(pair) for pair in pairs]),
    }
    for objective, mean in expected.items():
        assert runs[objective]["results"][0]["proxy_score"] == pytest.approx(mean)
    assert runs["uwo"]["results"][0]["members_variance"] == pytest.approx(np.mean([np.var(p) for p in pairs]))
    assert runs["uwo"]["sources"]["reward"].startswith("uwo (0.3) of ")


def test_server_that_dies_leaves_what_is_done_and_the_rest_is_asked_for_later(bench: Bench) -> None:
    settings: dict[str, Any] = {
        "reward.client.deadline_s": 1,
        "reward.client.request_timeout_s": 0.5,
        "reward.client.batch_rows": 4,
        "reward.client.cache_size": 0,
    }
    scored = 0

    def dying(samples: list[str]) -> Reply:
        nonlocal scored
        scored += len(samples)
        return letters_a(samples) if scored <= 30 else (500, b"")

    with endpoint(dying) as server:
        settings |= {"reward.function": None, "reward.url": server.url}
        with pytest.raises(RewardError):
            bench.run(**settings)
        kept = texts(bench)
        there = [sample for record in bench.records().values() for sample in record.samples]
        lacking = [sample for sample in there if sample.scores["reward"] is None]
        assert 0 < len(lacking) < len(there) < 60
        assert all(sample.scores["gold"] is not None for sample in there), "gold is written all the same"
        server.answer = letters_a
        server.asked.clear()

        bench.run(**settings)

        asked = sum(len(body["query"]) for body in server.asked)
    assert texts(bench)[: len(kept)] == kept
    assert asked <= 60 - len(there) + len(lacking) + 1, "and the probe"


def test_samples_without_a_score_are_left_out_with_drop(bench: Bench) -> None:
    settings = {"gold": None, "gold.function": bench.reward("not_for_a"), "best_of_n.ns": "[1,2]"}

    results = bench.run(**settings, **{"gold.failure.policy": "drop", "gold.failure.max_fraction": 0.9})

    there = [sample for record in bench.records().values() for sample in record.samples]
    assert results["left_out_samples"] == sum(sample.output.startswith("a") for sample in there) > 0


def refusals(bench: Bench) -> list[tuple[dict[str, Any], str]]:
    return [
        ({"gold": bench.reward("vowels")}, "the gold model is the proxy"),
        ({"best_of_n.ns": "[1,64]"}, "`ns` has 64, and the best of n can be told for n from 1 to"),
        ({"data.eval": None}, "no prompts: set `data.eval`"),
        ({"reward.dense": "true"}, "is for rewards that are learned from"),
        ({"gold": None, "gold.client.batch_rows": 8}, "`gold` names no source"),
    ]


@pytest.mark.parametrize("number", range(5))
def test_settings_that_cannot_be_are_refused_before_anything_is_sampled(bench: Bench, number: int) -> None:
    settings, sentence = refusals(bench)[number]

    with pytest.raises(ConfigError, match=sentence):
        bench.run(**settings)
    assert not (bench.folder / "out").exists()


JUDGE = {"url": "http://h:8001/v1", "model": "m"}


@pytest.mark.parametrize(
    ("reward", "gold", "refused"),
    [
        ({"url": "127.0.0.1:8001,other:8001/rm"}, {"url": "localhost:8001/rm"}, True),
        ({"function": "rewards.py:f"}, {"function": "./rewards.py:f"}, True),
        (
            {"members": {"a": "h:8001/a", "b": "h:8001/b"}},
            {"members": {"c": "h:8001/c", "d": "h:8001/b"}},
            True,
        ),
        ({"verifier": "gsm8k"}, {"verifier": "gsm8k", "gsm8k": {"extractor": "strict"}}, False),
        ({"url": "127.0.0.1:8001/rm"}, {"url": "127.0.0.1:8001/other"}, False),
        ({"judge": JUDGE}, {"judge": {**JUDGE, "url": "http://other:8001/v1"}}, True),
        ({"url": "127.0.0.1:8001/rm"}, {"judge": JUDGE}, False),
    ],
)
def test_gold_that_is_the_proxy_by_another_name_is_refused(
    reward: dict[str, Any], gold: dict[str, Any], refused: bool
) -> None:
    settings = {"model": {"path": "m"}, "reward": reward, "gold": gold}
    if not refused:
        load(BestOfNRunConfig, settings)
        return
    with pytest.raises(ConfigError, match="the gold model is the proxy"):
        load(BestOfNRunConfig, settings)


def other_weights(bench: Bench) -> dict[str, Any]:
    bench.save_policy("policy", 1)
    return {}


def other_prompts(bench: Bench) -> dict[str, Any]:
    (bench.folder / "prompts.jsonl").write_text('{"prompt": "ab"}\n{"prompt": "g"}\n')
    return {}


def other_temperature(bench: Bench) -> dict[str, Any]:
    return {"generation.temperature": 0.7}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (other_weights, "another policy"),
        (other_prompts, "other prompts"),
        (other_temperature, "other settings"),
    ],
)
def test_folder_of_other_samples_is_refused(
    bench: Bench, change: Callable[[Bench], dict[str, Any]], what: str
) -> None:
    bench.run()
    before = texts(bench)
    bench.calls()

    with pytest.raises(ConfigError, match=f"holds samples of {what}"):
        bench.run(**change(bench))
    assert texts(bench) == before and bench.calls() == []


def test_a_gold_whose_scores_are_all_the_proxy_s_is_refused_in_the_end(bench: Bench) -> None:
    source = (bench.folder / "rewards.py").read_text()
    (bench.folder / "twin_of_gold.py").write_text(source)

    with pytest.raises(ConfigError, match="all their scores are equal"):
        bench.run(gold=f"{bench.folder / 'twin_of_gold.py'}:vowels")


@pytest.mark.parametrize(("family", "told"), [("gpt2", False), ("qwen2", True)])
def test_model_that_cannot_share_a_prompt_says_so(
    family: str, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    window = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1} if told else {}
    lm = tiny_decoder(family, **window)
    engine = HFEngine(lambda: lm, TOKENIZER, GenerationConfig(max_new_tokens=8), version=lambda: 0)

    with caplog.at_level("INFO"):
        tell_of_prefixes(engine, [Prompt("ab", (0, 1))])

    assert ("each completion reads its prompt anew" in caplog.text) is told
