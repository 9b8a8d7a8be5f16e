"""TRL's own trainers learn from rewards that Conch serves, in an environment with TRL."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from conch.converters.to_triton import to_triton
from conch.rewards.score import score
from conch.serving.server.server import TritonServer
from tests.chats import chat_reward_model, chat_tokenizer
from tests.checkpoints import config_of, random_model
from tests.peers import install
from tests.tiny import char_tokenizer, reward_checkpoint, tiny_gpt2_config
from tests.trl_calls import Logged, of_grpo

ROOT = Path(__file__).resolve().parents[2]
NEWEST = "trl==1.16.0"
BEFORE_ASYNC_OBJECTS = "trl==1.13.0"
QUICK = {"client": {"deadline_s": 120, "request_timeout_s": 120}}
LETTERS = "abcdefghijklmnopqrstu"
LONGEST_S = 1800

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Peers:
    """Tiny models, a folder with them, and TRL of two releases.

    packages: requirement -> a folder that has it and nothing else; what it needs is installed here.
    """

    root: Path
    packages: dict[str, Path]

    def run(self, spec: dict[str, Any], *parts: str, trl: str = NEWEST, processes: int = 1) -> dict[str, Any]:
        """Run parts of trl_peers.py, and return what came of them."""
        spec_file, out = self.root / "spec.json", self.root / "out.json"
        folders = {name: str(self.root / name) for name in ("policy", "chat_policy")}
        scratch = self.root / f"scratch-{trl}-{processes}"
        spec_file.write_text(json.dumps({**folders, **spec, "scratch": str(scratch)}))
        launch = ["-m", "accelerate.commands.launch", "--cpu", "--main_process_port", "0"]
        launcher = [*launch, "--num_processes", str(processes)] if processes > 1 else []
        program = ROOT / "tests/integration/trl_peers.py"
        path = os.pathsep.join((str(self.packages[trl]), str(ROOT)))
        done = subprocess.run(
            [sys.executable, *launcher, program, spec_file, out, *parts],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LONGEST_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        assert "Task was destroyed" not in done.stderr
        return json.loads(out.read_text())


@dataclass(frozen=True)
class Served:
    """Peers with their models behind a server. trl_model: what TRL's RewardTrainer made, and its scores."""

    peers: Peers
    server: TritonServer
    trl_model: dict[str, Any]

    @property
    def spec(self) -> dict[str, str]:
        return {"text": self.server.endpoint("walks"), "chat": self.server.endpoint("chatml")}


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Peers:
    root = tmp_path_factory.mktemp("trl")
    packages = {name: root / name for name in (NEWEST, BEFORE_ASYNC_OBJECTS)}
    for name, folder in packages.items():
        install([name], "--no-deps", "--target", folder)
    tokenizer = char_tokenizer(LETTERS)
    torch.manual_seed(0)
    GPT2LMHeadModel(tiny_gpt2_config(tokenizer, n_positions=32)).save_pretrained(root / "policy")
    tokenizer.save_pretrained(root / "policy")
    chats = chat_tokenizer("chatml")
    config = config_of(
        "llama",
        vocab_size=len(chats),
        pad_token_id=chats.pad_token_id,
        bos_token_id=None,
        eos_token_id=chats.eos_token_id,
        max_position_embeddings=160,
    )
    random_model(AutoModelForCausalLM, config, seed=1).save_pretrained(root / "chat_policy")
    chats.save_pretrained(root / "chat_policy")
    return Peers(root, packages)


@pytest.fixture(scope="module")
def served(peers: Peers) -> Iterator[Served]:
    root, store = peers.root, peers.root / "store"
    to_triton(
        reward_checkpoint(root / "walks", reward_model={"max_length": 12}), name="walks", model_store=store
    )
    chat_reward_model(root / "chatml", "chatml")
    to_triton(root / "chatml", name="chatml", model_store=store, template="chat", max_length=150)
    base = reward_checkpoint(root / "base", seed=3, n_positions=32)
    rows = [("ab", "cd", "ef"), ("ba", "aa", "uu"), ("ac", "ab", "tu"), ("ad", "ac", "st")]
    pairs = [{"chosen": prompt + good, "rejected": prompt + bad} for prompt, good, bad in rows] * 4
    texts = ["abcd", "abuu", "a", "tuabcdefgh"]
    spec = {"reward_base": str(base), "pairs": pairs, "texts": texts}
    trained = peers.run(spec, "reward_trainer")["reward_trainer"]
    to_triton(trained["folder"], name="closed", model_store=store)
    to_triton(trained["folder"], name="open", model_store=store, template="{text}")
    with TritonServer(store, ["walks", "chatml", "closed", "open"]) as server:
        yield Served(peers, server, trained)


def rewards_of(url: str, samples: list[list[Any]]) -> list[float]:
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in samples]
    return [result.scores["reward"] for result in score(rows, url, QUICK)]


@pytest.mark.parametrize("form", ["closed", "open"])
def test_a_model_of_trls_reward_trainer_is_served_with_its_own_scores(served: Served, form: str) -> None:
    scores = served.trl_model["scores"][form]
    results = score(list(scores), served.server.endpoint(form), QUICK)
    expected = list(scores.values())
    assert [result.scores["reward"] for result in results] == pytest.approx(expected, abs=1e-4)
    assert len(set(expected)) == len(expected)


def test_grpo_rloo_chats_and_streams_learn_from_served_rewards(served: Served) -> None:
    found = served.peers.run(served.spec, "grpo", "rloo", "chat", "stream")
    for part, name in (("grpo", "walks"), ("rloo", "walks"), ("chat", "chatml")):
        url = served.server.endpoint(name)
        expected = rewards_of(url, found[part]["samples"][:4])
        first = found[part]["log"][0]
        assert first[f"rewards/{name}/mean"] == pytest.approx(sum(expected) / 4, abs=1e-4)
        assert first[f"rewards/{name}/failed"] == 0
        assert len(set(expected)) > 1
        # The usual tests call a function with just these.
        texts = ([""], [""])
        assert set(found[part]["call"]) == set(of_grpo(Logged(), *texts, answer=[""]))
    assert any("eval_rewards/walks/mean" in line for line in found["grpo"]["log"])
    for part in ("grpo", "stream"):
        rows = found[part]["completions"]
        samples = [[row["prompt"], row["completion"]] for row in rows]
        expected = rewards_of(served.server.endpoint("walks"), samples)
        assert [row["walks"] for row in rows] == pytest.approx(expected, abs=1e-4)


def test_a_sample_without_a_reward_moves_nothing(served: Served) -> None:
    found = served.peers.run(served.spec, "failing", "failing_rloo", "objectives")
    # Of 0, 1, none and 3: the mean of three, and an advantage of 0 for the one without.
    for part in ("failing", "failing_rloo"):
        assert found[part]["log"][0]["reward"] == pytest.approx(4 / 3)
        assert found[part]["log"][0]["rewards/odd_ones/failed"] == 0.25
    rows = found["failing"]["completions"][:4]
    assert [row["odd_ones"] for row in rows] == [0.0, 1.0, None, 3.0]
    std = (((0 - 4 / 3) ** 2 + (1 - 4 / 3) ** 2 + (3 - 4 / 3) ** 2) / 2) ** 0.5
    expected = [(value - 4 / 3) / std for value in (0, 1, 4 / 3, 3)]
    assert [row["advantage"] for row in rows] == pytest.approx(expected, abs=1e-3)
    first = found["objectives"]["log"][0]
    long = first["rewards/two_goals/long/mean"]
    assert first["reward"] == pytest.approx(long - 0.5)


def test_two_processes_score_each_its_own_part(served: Served) -> None:
    found = served.peers.run(served.spec, "grpo", "failing", processes=2)
    rows = found["grpo"]["completions"]
    assert len({row["step"] for row in rows}) > 1
    samples = [[row["prompt"], row["completion"]] for row in rows]
    expected = rewards_of(served.server.endpoint("walks"), samples)
    assert [row["walks"] for row in rows] == pytest.approx(expected, abs=1e-4)
    assert found["failing"]["log"][0]["rewards/odd_ones/failed"] == 0.25


def test_a_release_that_knows_no_async_objects_takes_it_for_a_function(served: Served) -> None:
    found = served.peers.run(served.spec, "grpo", trl=BEFORE_ASYNC_OBJECTS)
    expected = rewards_of(served.server.endpoint("walks"), found["grpo"]["samples"][:4])
    assert found["grpo"]["log"][0]["rewards/walks/mean"] == pytest.approx(sum(expected) / 4, abs=1e-4)
