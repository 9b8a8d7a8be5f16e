"""The code of an ensemble that holds its members, without a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conch.converters.triton_models import stacked_model as served
from conch.converters.triton_models.encoding import RejectedError
from conch.converters.triton_models.ensemble_model import MemberFailure
from conch.converters.triton_models.reward_model import Scorer
from tests.tiny import reward_checkpoint

LETTERS = "abcdefghijklmnopqrstu"
NAMES = ["a", "b", "c"]
# In one batch of at most 128 tokens; the second lot is one of 16 rows of 12, which is too long for one pass.
FEW = [LETTERS[start : start + length].encode() for start, length in enumerate((3, 1, 9, 12, 4))]
MANY = [LETTERS[row % 9 : row % 9 + 12].encode() for row in range(16)]


def version_of(folder: Path, **settings: Any) -> Path:
    """A version folder of three members of two rewards each, the second of which counts for `b`."""
    for number, name in enumerate(NAMES):
        member = reward_checkpoint(folder / "members" / str(number), seed=number, num_labels=2)
        manifest = {
            "name": name,
            "form": "text",
            "template": "{text}",
            "max_length": 12,
            "pooling": "hf",
            "reward_names": ["x", "y"],
            "normalise": True,
            "mean": [0.5 * number] * 2,
            "std": [1.0 + number] * 2,
            "pad_token_id": 21,
            "eos_token_id": 22,
            "vocab_size": 24,
            "dtype": "float32",
            "trust_remote_code": False,
        }
        (member / "manifest.json").write_text(json.dumps(manifest))
    told = {
        "members": [{"name": name, "column": int(name == "b"), "columns": 2} for name in NAMES],
        "form": "text",
        "objective": "uwo",
        "uwo_weight": 0.5,
        "variance": "sample",
        "on_member_failure": "renormalise",
        "in_one_pass": True,
        "why_apart": "",
        **settings,
    }
    (folder / "manifest.json").write_text(json.dumps(told))
    return folder


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return version_of(tmp_path_factory.mktemp("version"))


@pytest.fixture
def scorer(version: Path) -> served.StackedScorer:
    return served.StackedScorer(version, "cpu")


def own_scores(version: Path, texts: list[bytes]) -> np.ndarray:
    """What each member gives by itself, [texts, members]."""
    columns = []
    for number, name in enumerate(NAMES):
        member = Scorer(version / "members" / str(number), "cpu")
        columns.append(member.score(member.rows_from_texts(texts)).rewards[:, int(name == "b")])
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("texts", [FEW, MANY, [*FEW, *MANY]], ids=["in one pass", "apart", "both"])
def test_every_member_gives_what_it_gives_by_itself(version: Path, scorer: Any, texts: list[bytes]) -> None:
    expected, rows = own_scores(version, texts), scorer.rows_from_texts(texts)
    np.testing.assert_allclose(np.array(scorer.score(rows)), expected, atol=1e-5)
    np.testing.assert_allclose(scorer.score_in_one_pass(rows), expected, atol=1e-5)
    np.testing.assert_allclose(np.array(scorer.score_apart(rows)), expected, atol=1e-5)
    assert np.ptp(expected, axis=1).min() > 0.01


def test_short_batches_go_through_one_pass_and_others_do_not(
    scorer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    once = scorer._in_one_pass
    monkeypatch.setattr(scorer, "_in_one_pass", lambda batch: (sizes.append(len(batch)), once(batch))[1])
    scorer.score(scorer.rows_from_texts(FEW))
    assert sizes == [len(FEW)]
    scorer.score(scorer.rows_from_texts(MANY))
    assert sizes == [len(FEW)]


@pytest.mark.parametrize("texts", [FEW, MANY])
def test_a_member_that_gives_one_text_no_number_fails_for_that_text_alone(
    scorer: Any, texts: list[bytes]
) -> None:
    letters = [letter for letter in LETTERS if sum(letter in text.decode() for text in texts) == 1] or ["a"]
    letter = letters[0]
    scorer._scorers[1].model.network.transformer.wte.weight.data[LETTERS.index(letter)] = torch.nan
    for row, text in zip(scorer.score(scorer.rows_from_texts(texts)), texts, strict=True):
        failed = [isinstance(score, MemberFailure) for score in row]
        assert failed == [False, letter in text.decode(), False]
        if failed[1]:
            assert row[1] == MemberFailure("b", "scoring failed: the score is nan")


def test_a_pass_that_breaks_is_repeated_member_by_member_and_only_the_one_at_fault_fails(
    version: Path, scorer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(scorer._stack._stacked.network, "forward", break_down)
    rows = scorer.rows_from_texts(FEW)
    np.testing.assert_allclose(np.array(scorer.score(rows)), own_scores(version, FEW), atol=1e-5)
    monkeypatch.setattr(scorer._scorers[2].model.network, "forward", break_down)
    for row in scorer.score(rows):
        assert [isinstance(score, float) for score in row] == [True, True, False]
        assert row[2] == MemberFailure("c", "scoring failed: RuntimeError: out of memory")


def test_a_bad_sample_is_rejected_before_any_member_reads_it(scorer: Any) -> None:
    with pytest.raises(RejectedError, match="row 1: text is not UTF-8"):
        scorer.rows_from_texts([b"ab", b"\xff"])


def test_members_that_are_to_run_apart_do_and_say_why(tmp_path: Path) -> None:
    version = version_of(tmp_path, in_one_pass=False, why_apart="of no such kind")
    scorer = served.StackedScorer(version, "cpu")
    rows = scorer.rows_from_texts(FEW)
    np.testing.assert_allclose(np.array(scorer.score(rows)), own_scores(version, FEW), atol=1e-5)
    with pytest.raises(ValueError, match="of no such kind"):
        scorer.score_in_one_pass(rows)


def test_one_tokenizer_is_loaded_and_no_weight_is_held_twice(scorer: Any) -> None:
    assert len({id(each.encoder) for each in scorer._scorers}) == 1
    parameters = [each for member in scorer._scorers for each in member.model.network.parameters()]
    layers = [each for each in scorer._stack._stacked.network.modules() if hasattr(each, "_matrices")]
    assert len(layers) == 2 * 4 + 1
    places = {parameter.data_ptr() for parameter in parameters}
    assert all({matrix.data_ptr() for matrix in layer.weight} <= places for layer in layers)


def test_by_hand_it_says_every_members_score_and_what_they_combine_to(version: Path, scorer: Any) -> None:
    asked = {"texts": [text.decode() for text in FEW], "in_one_pass": True}
    answer = served._answer(scorer, asked)
    own = own_scores(version, FEW).astype(float)
    np.testing.assert_allclose(answer["member_scores"], own, atol=1e-5)
    expected = own.mean(axis=1) - 0.5 * own.var(axis=1, ddof=1)
    np.testing.assert_allclose(np.array(answer["scores"])[:, 0], expected, atol=1e-5)
    combined = served._answer(scorer, {"member_rewards": [[1.0, None, 3.0]]})
    assert combined["scores"] == [[1.0]]  # 2 - 0.5 * 2
    assert served._answer(scorer, {"texts": ["a", ""]}) == {"error": "RejectedError: row 1 has no tokens"}
