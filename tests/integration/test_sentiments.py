"""The programs of the sentiment example: a few steps on made-up reviews, and the whole path on real ones."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DistilBertConfig

from conch.config import RewardConfig
from conch.errors import ConversionError, RewardInvalidError
from conch.runs.plots import read_metric
from conch.serving.server.server import TritonServer
from examples.hosting import served_reward
from examples.sentiments import (
    dense_ppo_sentiments,
    ilql_sentiments,
    ppo_sentiments,
    rft_sentiments,
    sft_sentiments,
    train_reward_sentiments,
)
from examples.sentiments.positive import (
    HostedDistilBERT,
    PositiveProbability,
    positive_reward,
    probabilities,
)
from tests.checkpoints import PAD, random_model, tokenizer_for

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared/data/sentiment/rt-polarity.jsonl.gz"
LONGEST_S = 3600

TINY = ["train.total_steps=2", "train.eval_every=2", "train.eval_repeats=1"]
PPO = ["ppo.rollouts_per_step=16", "ppo.epochs=1", "ppo.minibatches=1", "generation.max_new_tokens=6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder of all programs here, with a writer and a classifier where the presets look for
    them."""
    folder = tmp_path_factory.mktemp("sentiments")
    rng = random.Random(0)
    words = {1: ("good", "warm", "funny", "moving"), 0: ("bad", "cold", "dull", "empty")}
    rows = [
        {"text": f"this film is {' and '.join(rng.sample(words[label], 3))} {number}", "label": label}
        for number in range(150)
        for label in (1, 0)
    ]
    (folder / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("CONFIG_NAME", "tiny")
        data = ["data.train=reviews.jsonl", *TINY]
        shape = [
            "model.architecture.n_layer=1",
            "model.architecture.n_embd=32",
            "model.architecture.vocab_size=400",
        ]
        sft_sentiments.main([*data, *shape, "learn=all", "measure_reward=false", "train.total_steps=60"])
        train_reward_sentiments.main([*data, "train.total_steps=60", "optimizer.learning_rate=5.0e-3"])
        yield folder


def evaluated(run: Path) -> list[float]:
    """Mean P(positive) before and after."""
    return read_metric(run, "eval/reward")[1]


def test_the_writer_and_the_classifier_learn(folder: Path) -> None:
    runs = folder / "outputs/sentiments"
    loss = read_metric(runs / "sft", "eval/loss")[1]
    assert loss[-1] < loss[0] - 0.5
    assert read_metric(runs / "reward_model", "eval/accuracy")[1][-1] > 0.9


def test_ppo_runs_from_its_folder_and_hosts_its_classifier(folder: Path) -> None:
    run = folder / "ppo"
    paths = [
        f"data.train={folder}/reviews.jsonl",
        f"train.run_dir={run}",
        f"model.path={folder}/outputs/sentiments/sft/checkpoints/best",
        f"hosted.checkpoint={folder}/outputs/sentiments/reward_model/checkpoints/best",
        f"hosted.model_store={folder}/model_store",
    ]
    result = subprocess.run(
        [sys.executable, "ppo_sentiments.py", *paths, *TINY, *PPO],
        cwd=ROOT / "examples/sentiments",
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
        check=False,
    )
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    assert all(0 < value < 1 for value in evaluated(run)) and len(evaluated(run)) == 2


def test_dense_rewards_sum_up_to_probabilities(folder: Path) -> None:
    dense_ppo_sentiments.main(["data.train=reviews.jsonl", "tracking.rollouts=true", *TINY, *PPO])
    run = folder / "outputs/sentiments/dense_ppo"
    rows = [json.loads(line) for line in (run / "rollouts/step_1.jsonl").read_text().splitlines()]
    assert len(rows) == 16
    for row in rows:
        changes = row["token_scores"]
        assert 0 < sum(changes) < 1
        assert changes[0] > 0 and sum(change != 0 for change in changes) == len(changes)
    assert all(0 < value < 1 for value in evaluated(run))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[TritonServer]:
    """What the first two programs have converted."""
    with TritonServer(folder / "model_store", ["reviews-tiny"]) as server:
        yield server


@pytest.mark.parametrize(
    ("program", "overrides"),
    [
        (rft_sentiments, ["rft.n_generations_per_prompt=2", "generation.max_new_tokens=6"]),
        (ilql_sentiments, ["ilql.batch_size=16", "generation.max_new_tokens=6"]),
        (
            sft_sentiments,
            [
                "model.path=outputs/sentiments/sft/checkpoints/best",
                "model.architecture=null",
                "train.run_dir=further",
            ],
        ),
    ],
    ids=["rft", "ilql", "sft"],
)
def test_programs_take_the_server_that_the_environment_names(
    program: object,
    overrides: list[str],
    folder: Path,
    server: TritonServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_HOST", server.endpoint("reviews-tiny"))
    name = program.__name__.rpartition(".")[2].removesuffix("_sentiments")  # pyright: ignore[reportAttributeAccessIssue]
    program.main(["data.train=reviews.jsonl", *TINY, *overrides])  # pyright: ignore[reportAttributeAccessIssue]
    run = folder / ("further" if name == "sft" else f"outputs/sentiments/{name}")
    assert all(0 < value < 1 for value in evaluated(run)) and len(evaluated(run)) == 2


def test_a_classifier_without_scores_of_tokens_is_refused(folder: Path, server: TritonServer) -> None:
    with pytest.raises(RewardInvalidError, match="granularity"):
        ppo_sentiments.main(
            [
                "data.train=reviews.jsonl",
                "reward.dense=true",
                f"reward.url={server.endpoint('reviews-tiny')}",
                f"train.run_dir={folder}/refused",
            ]
        )


@pytest.fixture(scope="module")
def distilbert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of the kind and with the labels of the hub's."""
    folder = tmp_path_factory.mktemp("distilbert")
    config = DistilBertConfig(
        vocab_size=24,
        dim=32,
        n_layers=2,
        n_heads=2,
        hidden_dim=48,
        max_position_embeddings=32,
        pad_token_id=PAD,
        id2label={0: "NEGATIVE", 1: "POSITIVE"},
        label2id={"NEGATIVE": 0, "POSITIVE": 1},
    )
    random_model(AutoModelForSequenceClassification, config).save_pretrained(folder)
    tokenizer_for("bert").save_pretrained(folder)
    return folder


def test_distilbert_gives_the_softmax_of_its_logits(distilbert: Path, tmp_path: Path) -> None:
    hosted = HostedDistilBERT(checkpoint=str(distilbert), dtype="float32", model_store=tmp_path)
    texts = ["cde", "edcfghi", "jklmnopqrs"]
    with served_reward(RewardConfig(), hosted) as endpoint:
        source = positive_reward(endpoint, RewardConfig())
        assert isinstance(source, PositiveProbability)
        with source:
            source.check()
            found = probabilities(source, texts)
    model = AutoModelForSequenceClassification.from_pretrained(distilbert).eval()
    tokenizer = AutoTokenizer.from_pretrained(distilbert)
    with torch.no_grad():
        logits = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
    assert found == pytest.approx([float(each.softmax(dim=0)[1]) for each in logits], abs=1e-5)
    assert max(found) - min(found) > 1e-3


def test_distilbert_has_no_scores_of_tokens(distilbert: Path, tmp_path: Path) -> None:
    hosted = HostedDistilBERT(
        checkpoint=str(distilbert), dtype="float32", model_store=tmp_path, form="token", granularity="token"
    )
    with pytest.raises(ConversionError, match="token"), served_reward(RewardConfig(), hosted):
        pass


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_file(), reason=f"the reviews are not there: {DATA}")
def test_the_offline_path_does_what_its_table_promises(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    result = subprocess.run(
        [sys.executable, "-m", "examples.sentiments.offline", f"data={DATA}", f"output={tmp_path}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
        check=False,
    )
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    figures = json.loads((tmp_path / "summary.json").read_text())["figures"]
    assert [figure["ok"] for figure in figures] == [True] * 6
    served, gold = figures[3:5]
    assert abs(served["before"] - 0.5) <= 0.1 and served["after"] >= 0.85
    assert abs(gold["before"] - 0.5) <= 0.1 and gold["after"] >= 0.75
    assert (tmp_path / "ppo/plots/eval_reward_eval_gold_over_eval_kl.png").is_file()
