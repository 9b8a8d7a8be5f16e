"""The sentiment example: its reviews, its presets, and P(positive) of what a classifier serves."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from conch.config import DataConfig, RewardConfig
from conch.errors import ConfigError, DataError, RewardInvalidError
from conch.rewards.function import FunctionReward
from conch.runs.tracking import METRICS_FILE
from conch.types import Completion, Prompt, RewardStatus, Rollout
from examples.sentiments.offline import OfflineConfig, risen, run
from examples.sentiments.positive import (
    PositiveProbability,
    changes,
    log_odds,
    positive_reward,
    probabilities,
    sigmoid,
)
from examples.sentiments.reviews import Review, ReviewsConfig, pairs, preset, prompts, review, reviews


def written(path: Path, numbers: range) -> str:
    """Reviews of as many words as five, positive ones by even numbers."""
    rows = [{"text": f"number {n} of many films", "label": 1 - n % 2} for n in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rollout(text: str) -> Rollout:
    return Rollout(Prompt("", ()), Completion(text, (5, 6, 7), (0.0, 0.0, 0.0), "eos"), policy_version=0)


def classifier(scores: object) -> FunctionReward:
    """What gives all samples these scores."""
    return FunctionReward(lambda samples, prompts, outputs: scores)


# ---------------------------------------------------------------------------------------------------- reviews


def test_a_review_has_a_text_and_a_label() -> None:
    assert review({"text": " good \n", "label": 1, "id": 7}) == Review("good", 1)
    assert review({"text": "bad", "label": 0}).label == 0


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("good", 'has no string "text"'),
        ({"text": " ", "label": 1}, 'has no string "text"'),
        ({"text": 3, "label": 1}, 'has no string "text"'),
        ({"text": "good"}, 'has the "label" None: 1 is positive, 0 negative'),
        ({"text": "good", "label": -1}, 'has the "label" -1'),
        ({"text": "good", "label": True}, 'has the "label" True'),
        ({"text": "good", "label": "positive"}, "has the \"label\" 'positive'"),
    ],
)
def test_what_is_no_review_is_refused(row: object, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        review(row)


def test_halves_and_what_is_held_out_share_nothing_in_any_program(tmp_path: Path) -> None:
    data = DataConfig(train=written(tmp_path / "a.jsonl", range(1000)))
    (first, held_out), (second, same) = (
        reviews(data, ReviewsConfig(half=half)) for half in ("first", "second")
    )
    both, _ = reviews(data, ReviewsConfig())

    assert held_out == same
    assert 60 < len(held_out) < 140
    assert 350 < len(first) < 550
    assert not {*first} & {*second} and not {*both} & {*held_out}
    assert {*first} | {*second} == {*both}
    _, others = reviews(DataConfig(train=written(tmp_path / "b.jsonl", range(500, 1500))), ReviewsConfig())
    known = {f"number {n} of many films" for n in range(500, 1000)}
    assert {row.text for row in others} & known == {row.text for row in held_out} & known


def test_evaluation_reviews_that_are_given_are_taken(tmp_path: Path) -> None:
    train, given = (written(tmp_path / name, range(end)) for name, end in (("a.jsonl", 20), ("b.jsonl", 6)))
    rows, held_out = reviews(DataConfig(train=train, eval=given, max_eval_rows=4), ReviewsConfig())
    assert (len(rows), len(held_out)) == (20, 4)


def test_reviews_of_one_sentiment_are_refused(tmp_path: Path) -> None:
    data = DataConfig(train=written(tmp_path / "a.jsonl", range(0, 400, 2)))
    with pytest.raises(DataError, match=r"the \d+ reviews to train on are not of both sentiments: give more"):
        reviews(data, ReviewsConfig())


def test_prompts_are_given_or_openings_each_once() -> None:
    rows = [Review(text, 1) for text in ("a film that works", "a film that fails", "a film")]
    assert prompts(rows, ReviewsConfig(opening_words=3)) == ["a film that"]
    assert prompts(rows, ReviewsConfig(opening_words=2)) == ["a film"]
    assert prompts(rows, ReviewsConfig(prompts=("this is", "it is"))) == ["this is", "it is"]
    with pytest.raises(DataError, match=r"no review has more than `reviews.opening_words` = 4 words"):
        prompts(rows, ReviewsConfig())


def test_pairs_prefer_positive_reviews_whole_with_their_end_or_cut_anywhere() -> None:
    good = {f"good {n} one two three four" for n in range(30)}
    bad = {f"bad {n} one two three four" for n in range(40)}
    rows = [Review(text, int(text in good)) for text in (*good, *bad)]
    made = pairs(rows, "<end>", rounds=3, seed=0)

    assert len(made) == 90, "each of the rarer ones three times"
    assert made == pairs(rows, "<end>", rounds=3, seed=0)
    for key, side in (("chosen", good), ("rejected", bad)):
        texts = [row[key] for row in made]
        ended = [text for text in texts if text.endswith("<end>")]
        whole = [text for text in texts if text in side]
        cut = [text for text in texts if not text.endswith("<end>") and text not in side]
        assert min(len(ended), len(whole), len(cut)) > 15
        assert {text.removesuffix("<end>") for text in ended} <= side
        assert all(any(text.startswith(each) for text in side) for each in cut)
        assert {len(text.split()) for text in cut} == {3, 4, 5}


def test_presets_are_chosen_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONFIG_NAME", raising=False)
    assert preset("ppo") == "sentiments/ppo_hub"
    monkeypatch.setenv("CONFIG_NAME", "tiny")
    assert preset("dense_ppo") == "sentiments/dense_ppo_tiny"
    monkeypatch.setenv("CONFIG_NAME", "6B")
    with pytest.raises(ConfigError, match="CONFIG_NAME=6B is no preset: choose among hub, tiny"):
        preset("ppo")


# ---------------------------------------------------------------------------------------------------- rewards


def test_log_odds_are_one_score_or_the_difference_of_two_logits() -> None:
    assert log_odds({"reward": 1.5}) == 1.5
    assert log_odds({"NEGATIVE": 2.0, "POSITIVE": 0.5}) == -1.5
    assert log_odds({"LABEL_1": 3.0, "LABEL_0": 1.0}) == 2.0


@pytest.mark.parametrize(
    "names", [("joy", "anger"), ("negative", "neutral", "positive"), ("positive", "pos")]
)
def test_other_scores_are_refused_by_name(names: tuple[str, ...]) -> None:
    with pytest.raises(RewardInvalidError, match=f"its scores are {', '.join(names)}: wanted are one"):
        log_odds(dict.fromkeys(names, 0.0))


def test_sigmoid_takes_values_of_any_size() -> None:
    assert sigmoid(0.0) == 0.5
    assert sigmoid(math.log(3)) == pytest.approx(0.75)
    assert (sigmoid(-1e6), sigmoid(1e6)) == (0.0, 1.0)


def test_a_sample_is_rewarded_with_a_probability() -> None:
    with PositiveProbability(classifier({"NEGATIVE": [0.0], "POSITIVE": [math.log(3)]})) as source:
        (result,) = source.submit([rollout("good")]).result()
    assert result.scores == {"reward": pytest.approx(0.75)}


def test_dense_rewards_are_changes_that_sum_up_to_the_last_probability() -> None:
    with PositiveProbability(classifier([[0.0, math.log(3), -math.log(3)]])) as source:
        (result,) = source.submit([rollout("good")]).result()
    assert result.token_scores == pytest.approx((0.5, 0.25, -0.5))
    assert changes([]) == ()


def test_what_failed_stays_failed() -> None:
    with PositiveProbability(classifier([math.nan])) as source:
        (result,) = source.submit([rollout("good")]).result()
        assert (result.status, result.scores) == (RewardStatus.INVALID, {})
        with pytest.raises(RewardInvalidError, match=r"gave no score: .*nan"):
            probabilities(source, ["good"])


def test_a_model_that_is_no_classifier_is_refused_before_training() -> None:
    with PositiveProbability(classifier([1.0])) as source:
        source.check()
    wanted = r"cannot tell P\(positive\): its scores are joy, anger: wanted are one"
    with (
        PositiveProbability(classifier({"joy": [1.0], "anger": [0.0]})) as source,
        pytest.raises(RewardInvalidError, match=wanted),
    ):
        source.check()


def test_recorded_rewards_are_probabilities_already(tmp_path: Path) -> None:
    assert positive_reward("host:1/a", RewardConfig(replay=tmp_path)) == "host:1/a"


# -------------------------------------------------------------------------------------------------- the gates


@pytest.mark.parametrize(
    ("values", "ok"), [((0.5, 0.7, 0.85), True), ((0.5, 0.9, 0.84), False), ((0.65, 0.9), False)]
)
def test_a_probability_must_begin_even_and_end_high(
    values: tuple[float, ...], ok: bool, tmp_path: Path
) -> None:
    lines = [json.dumps({"step": step, "eval/reward": value}) for step, value in enumerate(values)]
    (tmp_path / METRICS_FILE).write_text("\n".join(lines))
    figure = risen(tmp_path, "eval/reward", "served", 0.85)
    assert figure.ok is ok
    assert (figure.before, figure.after) == (values[0], values[-1])


def test_the_offline_path_wants_reviews_before_it_begins() -> None:
    with pytest.raises(ConfigError, match=r"no reviews: give data=<file>"):
        run(OfflineConfig())
