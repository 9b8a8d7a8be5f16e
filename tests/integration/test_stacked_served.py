"""Ensembles that hold their members, in the real server: what they give is what the ensemble gives that asks
each member, in one pass and one after another."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.grpc as triton
from safetensors.torch import load_file, save_file
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification
from tritonclient.utils import InferenceServerException

from conch.config import RewardConfig
from conch.converters.ensemble import main, to_ensemble
from conch.converters.parity import ensemble as parity
from conch.converters.parity.ensemble import member_scores
from conch.converters.to_triton import to_triton
from conch.errors import ConversionError
from conch.rewards.served import TritonReward
from conch.serving.server.server import TritonServer
from conch.store.manifest import MANIFEST, EnsembleManifest, sha256_of
from conch.store.store import read_model, read_with_members
from conch.triton.channel import open_client
from conch.triton.config_pbtxt import spec_from_model_config
from conch.types import Completion, Prompt, Rollout
from tests.deployments import callers, conch, detach
from tests.tiny import char_tokenizer, reward_checkpoint

LETTERS = "abcdefghijklmnopqrstu"
MEMBERS = ["one", "two", "three"]
DEADLINE_S = 120.0
OUTPUTS = ["rewards", "member_rewards", "variance", "members_used"]
# The first goes through all members in one pass, the second, of 480 tokens, through one after another.
FEW = [LETTERS[start : start + length] for start, length in enumerate((1, 4, 9, 2, 0, 18))]
MANY = [LETTERS[index % 9 : index % 9 + 9] for index in range(48)]


def infer(client: triton.InferenceServerClient, model: str, texts: list[str]) -> dict[str, np.ndarray]:
    tensor = triton.InferInput("text", [len(texts), 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[text.encode()] for text in texts], dtype=np.object_))
    asked = [triton.InferRequestedOutput(name) for name in OUTPUTS]
    reply = client.infer(model, [tensor], outputs=asked, client_timeout=DEADLINE_S)
    return {name: reply.as_numpy(name) for name in OUTPUTS}


def scored_once(stored, members, device, known={}):  # noqa: B006 - it is the memory
    """Members score their golden samples once for all ensembles of this file: each time takes seconds."""
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
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three members of one architecture, each with a mean and a spread of its own."""
    root = tmp_path_factory.mktemp("stacked")
    for seed, name in enumerate(MEMBERS):
        told = {"max_length": 12, "mean": 0.3 * seed, "std": 1.0 + seed}
        checkpoint = reward_checkpoint(root / name, seed=seed, reward_model=told)
        to_triton(checkpoint, name=name, model_store=root / "store", normalise="parameters")
    settings: dict[str, Any] = {"objective": "uwo", "uwo_weight": 0.3, "model_store": root / "store"}
    to_ensemble(MEMBERS, name="asked", **settings)
    to_ensemble(MEMBERS, name="held", stacked=True, **settings)
    to_ensemble(MEMBERS, name="held-sample", stacked=True, variance="sample", **settings)
    return root / "store"


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[TritonServer]:
    with TritonServer(store, ["asked", "held", "held-sample"]) as running:
        yield running


@pytest.mark.parametrize("texts", [FEW, MANY], ids=["in one pass", "one after another"])
def test_all_outputs_are_those_of_the_ensemble_that_asks_its_members(
    server: TritonServer, texts: list[str]
) -> None:
    with open_client(server.url, server.access) as client:
        held, asked, sample = (infer(client, name, texts) for name in ("held", "asked", "held-sample"))
        for name in OUTPUTS:
            np.testing.assert_allclose(held[name], asked[name], atol=1e-5, err_msg=name)
        pieces = [texts[start : start + 3] for start in range(0, len(texts), 3)]
        with ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(lambda part: infer(client, "held", part), pieces))
    together = np.concatenate([reply["member_rewards"] for reply in replies])
    np.testing.assert_allclose(together, held["member_rewards"], atol=1e-5)
    assert np.ptp(held["member_rewards"], axis=1).min() > 0.01  # or one member's scores would do for all
    np.testing.assert_allclose(sample["member_rewards"], held["member_rewards"], atol=1e-5)
    own = held["member_rewards"].astype(float)
    for reply, less in ((held, 0), (sample, 1)):
        variance = own.var(axis=1, ddof=less)
        np.testing.assert_allclose(reply["variance"][:, 0], variance, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(reply["rewards"][:, 0], own.mean(axis=1) - 0.3 * variance, atol=1e-4)


def test_the_server_needs_no_member_beside_it_and_states_what_it_holds(store: Path) -> None:
    assert [model.name for model in read_with_members(store, ["held-sample"])] == ["held-sample"]
    stored = read_model(store, "held-sample")
    manifest = stored.manifest
    assert isinstance(manifest, EnsembleManifest)
    assert (manifest.in_one_pass, manifest.why_apart, manifest.variance) == (True, "", "sample")
    assert sorted(path.name for path in (stored.path / "members").iterdir()) == ["0", "1", "2"]
    with TritonServer(store, ["held-sample"]) as server, open_client(server.url, server.access) as client:
        reply = client.get_model_config("held-sample", client_timeout=DEADLINE_S)
        spec = spec_from_model_config(reply.config)
        assert spec == stored.spec
        assert (spec.members, spec.variance, spec.holds_members) == (tuple(MEMBERS), "sample", True)
        assert not client.is_model_ready("one", client_timeout=DEADLINE_S)
        assert "one after another" not in server.log_tail()


def test_the_trainers_client_gets_each_members_score(server: TritonServer) -> None:
    rollouts = [Rollout(Prompt(text, ()), Completion("", (), (), "length"), 0) for text in FEW]
    results = {}
    for name in ("held", "asked"):
        with TritonReward(server.endpoint(name), RewardConfig()) as reward:
            reward.check()
            results[name] = reward.submit(rollouts).result()
    for held, asked in zip(*results.values(), strict=True):
        assert held.scores == {"reward": pytest.approx(asked.scores["reward"], abs=1e-5)}
        assert list(held.members) == MEMBERS
        assert list(held.members.values()) == pytest.approx(list(asked.members.values()), abs=1e-5)


def test_a_bad_sample_is_the_callers_fault_and_fails_alone(server: TritonServer) -> None:
    with open_client(server.url, server.access) as client:
        tensor = triton.InferInput("text", [2, 1], "BYTES")
        tensor.set_data_from_numpy(np.array([[b"ab"], [b"\xff"]], dtype=np.object_))
        with pytest.raises(InferenceServerException, match="row 1: text is not UTF-8") as caught:
            client.infer("held-sample", [tensor], client_timeout=DEADLINE_S)
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


@pytest.mark.slow
def test_heads_that_stand_apart_are_each_members_own(store: Path, tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to(store / "one")
    for seed, name in enumerate(("a", "b")):
        told = {"max_length": 12, "mean": 0.5, "std": 1.0 + seed}
        checkpoint = reward_checkpoint(tmp_path / "checkpoints" / name, seed=seed, reward_model=told)
        to_triton(checkpoint, name=name, model_store=tmp_path, normalise="fold")
    made = to_ensemble(["a", "b"], name="e", objective="mean", model_store=tmp_path, stacked=True)
    assert [line.name for line in made.parity.results][:2] == ["a, in one pass", "b, in one pass"]
    assert made.parity.ok  # each scores what it scores alone
    with pytest.raises(ConversionError, match=r"a and one differ in architecture, layout is 'trunk' in a"):
        to_ensemble(["a", "one"], name="e", objective="mean", model_store=tmp_path, stacked=True)


def break_member(version: Path, number: int, token: int) -> None:
    """Give a token of one member an embedding that is no number, in a version that fits together."""
    weights = version / "members" / str(number) / "model.safetensors"
    tensors = load_file(weights)
    tensors["transformer.wte.weight"][token] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    before = sha256_of(version / MANIFEST)
    manifest = json.loads((version / MANIFEST).read_text())
    manifest["files"][str(weights.relative_to(version))] = sha256_of(weights)
    (version / MANIFEST).write_text(json.dumps(manifest))
    for config in version.parent.rglob("*.pbtxt"):
        config.write_text(config.read_text().replace(before, sha256_of(version / MANIFEST)))


@pytest.mark.slow
def test_one_member_that_gives_one_text_no_number(store: Path, tmp_path: Path) -> None:
    golden = {letter for sample in read_model(store, "held-sample").golden.samples for letter in sample.text}
    letter = next(letter for letter in LETTERS if letter not in golden)
    for name in MEMBERS:
        (tmp_path / name).symlink_to(store / name)
    for name, failure in (("strict", "fail"), ("lenient", "renormalise")):
        made = to_ensemble(
            MEMBERS,
            name=name,
            model_store=tmp_path,
            objective="uwo",
            variance="sample",
            on_member_failure=failure,
            stacked=True,
        )
        break_member(made.path, 1, LETTERS.index(letter))
    first, last = [each for each in LETTERS if each != letter][:2]
    texts = [first + last, letter, last]
    with (
        TritonServer(tmp_path, ["strict", "lenient"]) as server,
        open_client(server.url, server.access) as client,
    ):
        with pytest.raises(
            InferenceServerException, match=r"row 1: member two .* the score is nan"
        ) as caught:
            infer(client, "strict", texts)
        assert caught.value.status() == "StatusCode.INTERNAL"
        assert infer(client, "strict", texts[:1])["members_used"].tolist() == [[3]]
        for rows in (texts, texts * 16):  # in one pass, and one after another
            reply = infer(client, "lenient", rows)
            assert reply["members_used"][:3, 0].tolist() == [3, 2, 3]
            assert np.isnan(reply["member_rewards"][:3]).tolist() == [
                [False] * 3,
                [False, True, False],
                [False] * 3,
            ]
            one, three = reply["member_rewards"][1, [0, 2]].astype(float)
            assert reply["variance"][1, 0] == pytest.approx((one - three) ** 2 / 2, rel=1e-4)
            assert np.isfinite(reply["rewards"]).all()


def deberta_checkpoint(folder: Path, seed: int) -> Path:
    tokenizer = char_tokenizer(LETTERS)
    torch.manual_seed(seed)
    config = DebertaV2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
        relative_attention=True,
        position_buckets=16,
        pos_att_type=["p2c", "c2p"],
        max_relative_positions=-1,
        position_biased_input=False,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=1,
    )
    DebertaV2ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "reward_model.json").write_text(json.dumps({"max_length": 12}))
    return folder


@pytest.mark.slow
def test_a_family_that_does_not_stack_is_held_too_and_the_manifest_says_how_it_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for seed in (0, 1):
        to_triton(
            deberta_checkpoint(tmp_path / str(seed), seed), name=f"m{seed}", model_store=tmp_path / "store"
        )
    made = to_ensemble(["m0", "m1"], name="e", model_store=tmp_path / "store", objective="wco", stacked=True)

    manifest = read_model(tmp_path / "store", "e").manifest
    assert isinstance(manifest, EnsembleManifest)
    assert not manifest.in_one_pass and "code reads `weight` of its Embedding itself" in manifest.why_apart
    assert "members are run one after another, not in one pass" in caplog.text
    assert [result.name for result in made.parity.results][:2] == [
        "m0, one after another",
        "m1, one after another",
    ]
    with TritonServer(tmp_path / "store", ["e"]) as server, open_client(server.url, server.access) as client:
        reply = infer(client, "e", FEW)
        assert "its members run one after another, not in one pass" in server.log_tail(10_000)
    np.testing.assert_allclose(reply["rewards"][:, 0], reply["member_rewards"].min(axis=1), atol=1e-6)


def test_members_that_cannot_share_a_model_are_refused_by_name(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "one").symlink_to(store / "one")
    others = {
        "letters": {"letters": LETTERS[::-1]},
        "wide": {"n_embd": 64},
        "rewards": {"num_labels": 2},
        "longer": {"reward_model": {"max_length": 14}},
    }
    for name, settings in others.items():
        told = {"reward_model": {"max_length": 12}, **settings}
        checkpoint = reward_checkpoint(tmp_path / name, seed=3, **told)
        to_triton(checkpoint, name=name, model_store=tmp_path / "store")
    expected = {
        "letters": "one and letters have different tokenizers (tokenizer.json differs): leave out --stacked",
        "wide": "one and wide differ in architecture, n_embd is 32 in one, 64 in wide: leave out",
        "rewards:LABEL_0": "one and rewards differ in architecture, num_labels is 1 in one, 2 in rewards",
        "longer": "one and longer read samples differently, max_length is 12 in one, 14 in longer",
    }
    settings = ["--objective", "mean", "--name", "e", "--stacked", "--model_store", str(tmp_path / "store")]
    for name, sentence in expected.items():
        assert main(["--members", "one", name, *settings]) == 1
        assert sentence in capsys.readouterr().err


def test_a_new_version_is_swapped_in_under_load(store: Path, tmp_path: Path) -> None:
    for name in MEMBERS:
        (tmp_path / name).symlink_to(store / name)
    names, settings = ["one", "two"], {"name": "e", "objective": "mean", "stacked": True}
    to_ensemble(names, model_store=tmp_path, **settings)
    try:
        running = detach(tmp_path, "mine", model="e")
        with callers(running.replicas[0].url, "e", threads=2) as outcomes:
            to_ensemble(["one", "three"], model_store=tmp_path, **settings)
            done = conch("swap", "mine")
            assert done.returncode == 0 and done.stdout == "e: version 2\n", done.stderr
        for mine in outcomes:
            assert {version for _, version in mine} == {"1", "2"}
            assert [version for _, version in mine] == sorted(version for _, version in mine)
            assert len({round(score, 4) for score, _ in mine}) == 2
    finally:
        conch("down", "--all")


def test_members_of_a_graph_are_refused(store: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    checkpoint = reward_checkpoint(tmp_path / "c", reward_model={"max_length": 12})
    for name in ("a", "b"):
        to_triton(checkpoint, name=name, model_store=tmp_path / "store", form="token", backend="onnx")
    with pytest.raises(ConversionError, match="member a is of the onnx back end"):
        to_ensemble(["a", "b"], name="e", objective="mean", stacked=True, model_store=tmp_path / "store")
