"""Ensembles in the real server: the reward is the formula of the members' own scores, and a member that is
gone degrades it as was asked for."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from conch.config import RewardClientConfig, RewardConfig
from conch.converters.ensemble import main, to_ensemble
from conch.converters.parity import ensemble as parity
from conch.converters.parity.ensemble import member_scores
from conch.converters.to_triton import to_triton
from conch.errors import ConversionError, ModelStoreError
from conch.rewards.factory import from_user
from conch.rewards.served import TritonReward
from conch.serving.server.server import TritonServer
from conch.store.manifest import EnsembleManifest
from conch.store.store import list_models, read_model
from conch.triton.channel import open_client
from conch.triton.config_pbtxt import spec_from_model_config
from conch.types import Completion, Prompt, RewardStatus, Rollout
from tests.tiny import reward_checkpoint

LETTERS = "abcdefghijklmnopqrstu"
MEMBERS = ["one", "two", "three"]
WEIGHT = 0.3
DEADLINE_S = 120.0
FORMULAS = {
    "mean": statistics.fmean,
    "wco": min,
    "uwo": lambda scores: statistics.fmean(scores) - WEIGHT * statistics.pvariance(scores),
}
# Each holds text no member reads alike: other lengths, and one that is cut.
TEXTS = [LETTERS[start : start + length] for start, length in enumerate((1, 4, 9, 2, 0, 18))]


@dataclass(frozen=True)
class Served:
    """A store with three members, the third with two rewards and another tokenizer, and a running server."""

    store: Path
    server: TritonServer
    client: triton.InferenceServerClient

    def infer(self, model: str, texts: list[str], outputs: list[str]) -> dict[str, np.ndarray]:
        tensor = triton.InferInput("text", [len(texts), 1], "BYTES")
        tensor.set_data_from_numpy(np.array([[text.encode()] for text in texts], dtype=np.object_))
        asked = [triton.InferRequestedOutput(name) for name in outputs]
        reply = self.client.infer(model, [tensor], outputs=asked, client_timeout=DEADLINE_S)
        return {name: reply.as_numpy(name) for name in outputs}

    def own_scores(self, texts: list[str]) -> np.ndarray:
        """What the members say when asked themselves, [n, 3]."""
        rewards = [self.infer(name, texts, ["rewards"])["rewards"] for name in MEMBERS]
        return np.stack([rewards[0][:, 0], rewards[1][:, 0], rewards[2][:, 1]], axis=1)


def ensemble(store: Path, name: str, **settings) -> None:
    to_ensemble(["one", "two", "three:kind"], name=name, model_store=store, uwo_weight=WEIGHT, **settings)


def scored_once(stored, members, device, known={}):  # noqa: B006 - it is the memory
    """Members score their golden samples once for all ensembles of this file, not once for each: in processes
    of their own, which take seconds to start."""
    key = tuple(member.content_sha256 for member in members)
    if key not in known:
        known[key] = member_scores(stored, members, device)
    return known[key]


@pytest.fixture(scope="module", autouse=True)
def _members_score_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "member_scores", scored_once)
        yield


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("ensemble")
    store = root / "store"
    for seed, (name, letters) in enumerate(zip(MEMBERS, [LETTERS, LETTERS, LETTERS[::-1]], strict=True)):
        rewards = {"num_labels": 2} if name == "three" else {}
        settings = {"max_length": 12, **({"reward_names": ["true", "kind"]} if rewards else {})}
        checkpoint = reward_checkpoint(
            root / name, letters=letters, seed=seed, reward_model=settings, **rewards
        )
        to_triton(checkpoint, name=name, model_store=store, max_batch_size=48)
    for objective in FORMULAS:
        ensemble(store, objective, objective=objective)
    to_ensemble(["one", "two"], name="pair", model_store=store, objective="uwo", uwo_weight=WEIGHT)
    ensemble(store, "lenient", objective="uwo", on_member_failure="renormalise")
    with (
        TritonServer(store, [*FORMULAS, "lenient", "pair"]) as server,
        open_client(server.url, server.access) as client,
    ):
        yield Served(store, server, client)


@pytest.fixture
def without_member(served: Served) -> Iterator[None]:
    """The member `two` is not loaded during the test."""
    served.client.unload_model("two", client_timeout=DEADLINE_S)
    while served.client.is_model_ready("two", client_timeout=DEADLINE_S):
        pass
    yield
    served.client.load_model("two", client_timeout=DEADLINE_S)


def test_an_ensemble_in_the_client_gives_what_the_served_one_gives(served: Served) -> None:
    members = {name: served.server.endpoint(name) for name in ("one", "two")}
    rollouts = [Rollout(Prompt(text, ()), Completion("", (), (), "length"), 0) for text in TEXTS]
    with from_user(None, RewardConfig(members=members, combine="uwo", uwo_weight=WEIGHT)) as source:
        source.check()
        found = source.submit(rollouts).result(DEADLINE_S)

    together = served.infer("pair", TEXTS, ["rewards", "member_rewards"])
    own = [list(result.members.values()) for result in found]
    np.testing.assert_allclose(own, together["member_rewards"], atol=1e-5)
    rewards = [[result.scores["reward"]] for result in found]
    np.testing.assert_allclose(rewards, together["rewards"], atol=1e-5)


@pytest.mark.parametrize("objective", FORMULAS)
def test_reward_is_the_formula_of_the_members_own_scores(served: Served, objective: str) -> None:
    own = served.own_scores(TEXTS)
    reply = served.infer(objective, TEXTS, ["rewards", "member_rewards", "variance", "members_used"])

    expected = [FORMULAS[objective](row) for row in own.astype(float).tolist()]
    np.testing.assert_allclose(reply["rewards"], np.array(expected)[:, None], atol=1e-5)
    np.testing.assert_allclose(reply["member_rewards"], own, atol=1e-5)
    variances = [[statistics.pvariance(row)] for row in own.astype(float).tolist()]
    np.testing.assert_allclose(reply["variance"], variances, atol=1e-5)
    assert reply["members_used"].tolist() == [[3]] * len(TEXTS)
    assert np.ptp(own, axis=1).min() > 0.01  # or the objectives would all be one


def test_requests_that_arrive_together_get_their_own_rewards(served: Served) -> None:
    texts = [LETTERS[index % 9 : index % 9 + index % 12] for index in range(60)]
    expected = served.infer("uwo", texts[:48], ["rewards"])["rewards"][:, 0].tolist()
    expected += served.infer("uwo", texts[48:], ["rewards"])["rewards"][:, 0].tolist()
    with ThreadPoolExecutor(20) as pool:
        pairs = [texts[index : index + 3] for index in range(0, 60, 3)]
        replies = list(pool.map(lambda three: served.infer("uwo", three, ["rewards"])["rewards"], pairs))

    np.testing.assert_allclose(np.concatenate(replies)[:, 0], expected, atol=1e-5)


def test_the_server_states_the_members_and_the_trainers_client_needs_no_change(served: Served) -> None:
    reply = served.client.get_model_config("uwo", client_timeout=DEADLINE_S)
    spec = spec_from_model_config(reply.config)
    assert (spec.members, spec.reward_names, spec.max_batch_size) == (tuple(MEMBERS), ("reward",), 48)
    assert spec == read_model(served.store, "uwo").spec

    with TritonReward(served.server.endpoint("uwo"), RewardConfig()) as reward:
        reward.check()
        results = reward.submit([rollout(text) for text in TEXTS]).result()
    own = served.own_scores(TEXTS).astype(float)
    for result, row in zip(results, own.tolist(), strict=True):
        assert result.scores == {"reward": pytest.approx(FORMULAS["uwo"](row), abs=1e-5)}
        assert (result.ok, result.detail) == (True, "")


def test_fail_refuses_the_sample_and_names_the_member_that_is_gone(served: Served, without_member) -> None:
    with pytest.raises(InferenceServerException, match=r"row 0: member two .*not ready") as caught:
        served.infer("uwo", TEXTS, ["rewards"])
    assert caught.value.status() == "StatusCode.UNAVAILABLE"


def test_renormalise_goes_on_with_the_others_and_says_so(served: Served, without_member, caplog) -> None:
    reply = served.infer("lenient", TEXTS, ["rewards", "member_rewards", "variance", "members_used"])

    there = reply["member_rewards"][:, [0, 2]].astype(float)
    assert np.isnan(reply["member_rewards"][:, 1]).all() and reply["members_used"].tolist() == [[2]] * 6
    expected = [[FORMULAS["uwo"](row)] for row in there.tolist()]
    np.testing.assert_allclose(reply["rewards"], expected, atol=1e-5)
    said = "member two gave no score to 6 of 6 samples (renormalise)"
    deadline = time.monotonic() + 30
    while said not in served.server.log_tail() and time.monotonic() < deadline:
        time.sleep(0.1)  # a back end's log comes in after its reply
    assert said in served.server.log_tail()

    with TritonReward(served.server.endpoint("lenient"), RewardConfig()) as reward:
        results = reward.submit([rollout(text) for text in TEXTS]).result()
    assert {(result.ok, result.detail) for result in results} == {(True, "scored by 2 of 3 members")}
    assert [message for message in caplog.messages if "only 2 of 3 members score" in message]


def test_a_bad_sample_is_the_callers_fault_and_fails_alone(served: Served) -> None:
    tensor = triton.InferInput("text", [3, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[b"ab"], [b"c"], [b"\xff"]], dtype=np.object_))
    for name in ("uwo", "lenient"):
        with pytest.raises(InferenceServerException, match=r"row 2: member one .* not UTF-8") as caught:
            served.client.infer(name, [tensor], client_timeout=DEADLINE_S)
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


@pytest.mark.slow
def test_token_form_serves_rows_of_other_lengths_together(served: Served, tmp_path: Path) -> None:
    for seed in (0, 1):
        checkpoint = reward_checkpoint(tmp_path / str(seed), seed=seed, reward_model={"max_length": 12})
        to_triton(checkpoint, name=f"m{seed}", model_store=tmp_path / "store", form="token")
    other = reward_checkpoint(tmp_path / "other", letters=LETTERS[::-1], reward_model={"max_length": 12})
    to_triton(other, name="other", model_store=tmp_path / "store", form="token")
    with pytest.raises(ConversionError, match="m0 and other take token ids of different tokenizers"):
        to_ensemble(["m0", "other"], name="e", objective="wco", model_store=tmp_path / "store")
    with pytest.raises(ConversionError, match="one is text"):
        to_ensemble(["one", "m0"], name="e", objective="wco", model_store=joined(tmp_path, served.store))
    to_ensemble(["m0", "m1"], name="e", objective="wco", model_store=tmp_path / "store")

    rollouts = [rollout(LETTERS[:length], ids=True) for length in (1, 12, 5, 7)]
    with TritonServer(tmp_path / "store", ["e"]) as server:
        with TritonReward(
            server.endpoint("e"), RewardConfig(client=RewardClientConfig(batch_rows=1))
        ) as reward:
            alone = reward.submit(rollouts).result()
        scores = []
        for name in ("m0", "m1"):
            with TritonReward(server.endpoint(name), RewardConfig()) as reward:
                scores.append([result.scores["reward"] for result in reward.submit(rollouts).result()])
    lowest = [min(pair) for pair in zip(*scores, strict=True)]
    assert [result.status for result in alone] == [RewardStatus.OK] * 4
    assert [result.scores["reward"] for result in alone] == pytest.approx(lowest, abs=1e-5)


def joined(root: Path, other: Path) -> Path:
    """A store with the models of `root / "store"` and those of `other`."""
    both = root / "both"
    both.mkdir()
    for store in (root / "store", other):
        for name in list_models(store):
            (both / name).symlink_to(store / name)
    return both


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        (["one"], "at least 2 members"),
        (["one", "three"], "rewards true, kind: say which, as three:true"),
        (["one", "three:sad"], "no reward 'sad'; it has true, kind"),
        (["one", "two", "one"], "member one:reward is given twice"),
        (["one", "uwo"], "uwo is an ensemble itself"),
        (["one", "four"], "'four' is not in model store"),
    ],
)
def test_command_refuses_members_that_do_not_fit(
    served: Served, capsys: pytest.CaptureFixture[str], members: list[str], expected: str
) -> None:
    before = list_models(served.store)
    arguments = ["--objective", "mean", "--name", "new", "--model-store", str(served.store)]
    assert main(["--members", *members, *arguments]) == 1
    assert expected in capsys.readouterr().err
    assert list_models(served.store) == before


def test_command_refuses_the_name_of_a_reward_model_and_a_negative_weight(
    served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--members", "one", "two", "--objective", "uwo", "--model_store", str(served.store)]
    assert main([*arguments, "--name", "three"]) == 1
    assert "'three' is a reward model" in capsys.readouterr().err
    assert main([*arguments, "--name", "new", "--uwo-weight", "-1"]) == 1
    assert "uwo_weight is -1.0" in capsys.readouterr().err


@pytest.mark.slow
def test_a_member_that_was_converted_again_must_be_made_part_again(served: Served, tmp_path: Path) -> None:
    store = tmp_path / "store"
    for name, seed in (("a", 0), ("b", 1)):
        to_triton(reward_checkpoint(tmp_path / name, seed=seed), name=name, model_store=store)
    first = to_ensemble(["a", "b"], name="e", objective="mean", model_store=store)
    manifest = read_model(store, "e").manifest
    assert isinstance(manifest, EnsembleManifest) and manifest.members[0].version == 1
    to_triton(reward_checkpoint(tmp_path / "a2", seed=5), name="a", model_store=store, force=True)

    with pytest.raises(ModelStoreError, match="made with version 1 of its member a, and there is version 2"):
        TritonServer(store, ["e"]).start()
    second = to_ensemble(["a", "b"], name="e", objective="mean", model_store=store)
    assert (first.path.name, second.path.name) == ("1", "2")


def rollout(text: str, *, ids: bool = False) -> Rollout:
    tokens = tuple(LETTERS.index(letter) for letter in text) if ids else ()
    return Rollout(Prompt(text, tokens), Completion("", (), (), "length"), policy_version=0)
