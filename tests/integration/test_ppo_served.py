"""PPO against a real server in real processes: one rank and two, server killed, server away for a while."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from transformers import GPT2LMHeadModel

from conch.converters.to_triton import to_triton
from conch.serving.server.server import TritonServer
from tests.integration.conftest import TEXT_MODEL, RewardModel
from tests.integration.letters_run import LETTERS
from tests.tiny import char_tokenizer, tiny_gpt2_config

ROOT = Path(__file__).resolve().parents[2]
PPO = ["-m", "conch.trainers.ppo", "--config-name", "randomwalks/ppo"]
TINY = [
    "ppo.rollouts_per_step=16",
    "generation.chunk_size=8",
    "generation.max_new_tokens=6",
    "train.eval_every=0",
]
LETTERS_RUN = ["-m", "tests.integration.letters_run"]
LONGEST_S = 300


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random policy over the reward model's letters."""
    folder = tmp_path_factory.mktemp("policy")
    tokenizer = char_tokenizer("abcdefghijklmnopqrstu")
    torch.manual_seed(0)
    GPT2LMHeadModel(tiny_gpt2_config(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "prompts.txt").write_text("\n".join("abcdefgh") + "\n")
    return folder


@pytest.fixture(scope="module")
def exact_store(reward_model: RewardModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose model scores a sample the same to the last bit in any batch."""
    store = tmp_path_factory.mktemp("exact-store")
    to_triton(reward_model.checkpoint, name=TEXT_MODEL, model_store=store, batch_invariant=True)
    return store


@pytest.fixture
def server(reward_model: RewardModel, tmp_path: Path) -> Iterator[TritonServer]:
    """A server of this test's own, which it may kill."""
    with TritonServer(reward_model.model_store, [TEXT_MODEL], log_file=tmp_path / "triton.log") as running:
        yield running


def command(policy: Path, run_dir: Path, endpoint: str, *overrides: str, ranks: int = 1) -> list[str]:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", "0"]
        launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"]
    data = [f"model.path={policy}", f"data.train={policy}/prompts.txt", f"reward.url={endpoint}"]
    return [*launcher, *PPO, *TINY, *data, f"train.run_dir={run_dir}", *overrides]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        arguments, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def rows(run_dir: Path) -> list[dict[str, float]]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_steps(process: subprocess.Popen[str], run_dir: Path, count: int) -> None:
    deadline = time.monotonic() + LONGEST_S
    while len(rows(run_dir)) < count:
        assert process.poll() is None, f"the run ended early:\n{process.communicate()[0]}"
        assert time.monotonic() < deadline, f"no {count} steps within {LONGEST_S} s"
        time.sleep(0.1)


def wait_for_file(process: subprocess.Popen[str], path: Path) -> None:
    deadline = time.monotonic() + LONGEST_S
    while not path.exists():
        assert process.poll() is None, f"the run ended early:\n{process.communicate()[0]}"
        assert time.monotonic() < deadline, f"no {path} within {LONGEST_S} s"
        time.sleep(0.1)


def preempt_one_rank(process: subprocess.Popen[str]) -> None:
    """SIGTERM to the only rank, or to one of those that torchrun started."""
    ranks = psutil.Process(process.pid).children()
    (ranks[-1] if ranks else psutil.Process(process.pid)).send_signal(signal.SIGTERM)


def same_numbers(row: dict[str, float]) -> list[float]:
    return [row[name] for name in ("step", "reward/mean", "policy/kl", "train/loss", "train/grad_norm")]


@pytest.mark.parametrize("ranks", [1, 2])
def test_server_killed_makes_every_rank_leave_with_the_reason(
    policy: Path, server: TritonServer, tmp_path: Path, ranks: int
) -> None:
    quick = ["reward.client.deadline_s=8", "reward.client.request_timeout_s=4", "train.total_steps=100000"]
    process = start(command(policy, tmp_path / "run", server.endpoint(TEXT_MODEL), *quick, ranks=ranks))
    wait_for_steps(process, tmp_path / "run", 2)
    os.kill(server.pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=LONGEST_S)
    assert process.returncode != 0
    assert output.count("error: ") >= ranks, output
    assert "got no reward" in output
    assert server.endpoint(TEXT_MODEL).split("/")[0] in output
    assert "Traceback" not in output.split("error: ")[0]


@pytest.mark.slow
def test_server_away_with_wait_goes_on_with_the_same_numbers(
    policy: Path, exact_store: Path, tmp_path: Path
) -> None:
    patient = [
        "reward.failure.policy=wait",
        "reward.client.deadline_s=6",
        "reward.client.request_timeout_s=2",
        "reward.failure.checkpoint_after_s=1",
        "train.total_steps=8",
    ]
    with TritonServer(exact_store, [TEXT_MODEL]) as server:
        port = int(server.url.rsplit(":", 1)[1])
        undisturbed = start(command(policy, tmp_path / "calm", server.endpoint(TEXT_MODEL), *patient))
        output, _ = undisturbed.communicate(timeout=LONGEST_S)
        assert undisturbed.returncode == 0, output
        disturbed = start(command(policy, tmp_path / "storm", server.endpoint(TEXT_MODEL), *patient))
        wait_for_steps(disturbed, tmp_path / "storm", 3)
        os.kill(server.pid, signal.SIGKILL)
        # The deadline is over and the run waits, before there is a server again.
        wait_for_file(disturbed, tmp_path / "storm" / "checkpoints")
    with TritonServer(exact_store, [TEXT_MODEL], grpc_port=port):
        output, _ = disturbed.communicate(timeout=LONGEST_S)
    assert disturbed.returncode == 0, output
    assert "asking again" in output
    calm, storm = rows(tmp_path / "calm"), rows(tmp_path / "storm")
    assert [same_numbers(row) for row in storm] == [same_numbers(row) for row in calm]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_leaves_while_the_server_is_away_goes_on_with_the_same_numbers(
    policy: Path, exact_store: Path, tmp_path: Path, ranks: int
) -> None:
    patient = [
        "reward.failure.policy=wait",
        "reward.client.deadline_s=4",
        "reward.client.request_timeout_s=2",
    ]
    patient += ["reward.failure.checkpoint_after_s=1", "train.total_steps=8", "ppo.kl.target=0.1"]
    storm = tmp_path / "storm"
    with TritonServer(exact_store, [TEXT_MODEL]) as server:
        port = int(server.url.rsplit(":", 1)[1])
        arguments = command(policy, tmp_path / "calm", server.endpoint(TEXT_MODEL), *patient, ranks=ranks)
        output, _ = (undisturbed := start(arguments)).communicate(timeout=LONGEST_S)
        assert undisturbed.returncode == 0, output
        waiting = start(command(policy, storm, server.endpoint(TEXT_MODEL), *patient, ranks=ranks))
        wait_for_steps(waiting, storm, 3)
        os.kill(server.pid, signal.SIGKILL)
        wait_for_file(waiting, storm / "checkpoints")
        preempt_one_rank(waiting)
        output, _ = waiting.communicate(timeout=LONGEST_S)
    assert waiting.returncode != 0
    assert "while the reward server is away" in output and "SIGTERM: left while waiting" in output
    with TritonServer(exact_store, [TEXT_MODEL], grpc_port=port) as server:
        again = [*patient, "train.resume=auto"]
        resumed = start(command(policy, storm, server.endpoint(TEXT_MODEL), *again, ranks=ranks))
        output, _ = resumed.communicate(timeout=LONGEST_S)
    assert resumed.returncode == 0, output
    assert "going on with" in output
    assert [same_numbers(row) for row in rows(storm)] == [
        same_numbers(row) for row in rows(tmp_path / "calm")
    ]
    weights = "checkpoints/step_8/model.safetensors"
    assert (storm / weights).read_bytes() == (tmp_path / "calm" / weights).read_bytes()


@pytest.mark.slow
def test_two_ranks_learn_like_one(tmp_path: Path) -> None:
    alone = start([sys.executable, *LETTERS_RUN, str(tmp_path / "one")])
    output, _ = alone.communicate(timeout=LONGEST_S)
    assert alone.returncode == 0, output
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"]
    both = start([*launcher, *LETTERS_RUN, str(tmp_path / "two"), "train.num_processes=2"])
    output, _ = both.communicate(timeout=LONGEST_S)
    assert both.returncode == 0, output
    assert "rank 0 of 2" in output and "rank 1 of 2" in output
    one, two = (
        [row["reward/mean"] for row in rows(tmp_path / name) if "reward/mean" in row]
        for name in ("one", "two")
    )
    assert len(one) == len(two) == 30
    # The same start (a policy at chance) and the same end; in between the curves lie as close as two seeds.
    assert abs(one[0] - two[0]) < 0.08 and one[0] < 2.5 / len(LETTERS)
    assert min(sum(one[-5:]), sum(two[-5:])) > 5 * 0.9
    assert abs(sum(one) - sum(two)) / 30 < 0.1


def test_wrong_number_of_processes_is_refused(tmp_path: Path) -> None:
    process = start([sys.executable, *LETTERS_RUN, str(tmp_path / "run"), "train.num_processes=2"])
    output, _ = process.communicate(timeout=LONGEST_S)
    assert process.returncode != 0
    assert "2 processes were asked for, 1 run" in output


@pytest.mark.parametrize(
    ("endpoint", "says"),
    [
        ("127.0.0.1:9/walks", "127.0.0.1:9"),
        ("nowhere.invalid:8001/walks", "nowhere.invalid"),
        ("127.0.0.1:8001", "host:port/model"),
    ],
)
def test_no_server_ends_before_the_model_is_loaded(
    policy: Path, tmp_path: Path, endpoint: str, says: str
) -> None:
    process = start(
        command(policy, tmp_path / "run", endpoint, "reward.client.deadline_s=2", "model.path=/nowhere")
    )
    output, _ = process.communicate(timeout=LONGEST_S)
    assert process.returncode == 1, output
    assert "error: " in output and says in output and "Traceback" not in output
    assert not (tmp_path / "run").exists()
