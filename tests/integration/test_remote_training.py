"""A training service in a process of its own, its clients, and what they survive."""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from conch.service.client import AsyncTrainingClient, TrainingClient
from conch.service.protocol import KEY_HEADER, KEY_VARIABLE, CompletionsResponse
from conch.service.refusals import RefusedError
from tests.chats import WINDOW, chat_tokenizer
from tests.footprint import wait_until
from tests.launches import ROOT
from tests.runs import TOKENIZER, policy
from tests.services import KEY, Service, service, tiny_model, tiny_settings, vowel_rewards, weights_in
from tests.tiny import tiny_gpt2_config
from tests.transformers_servers import served

PROMPTS = ["ab", "cd", "ef", "gh"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


def reward(outputs: list[str], **_: Any) -> list[float]:
    return vowel_rewards(outputs)


def client_of(running: Service, **settings: Any) -> TrainingClient:
    return TrainingClient(running.url, KEY, retry_s=120.0, **settings)


def metrics_of(running: Service, run_id: str) -> list[dict[str, Any]]:
    lines = (running.output_dir / "runs" / run_id / "train" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_client_trains_to_the_end_and_downloads_the_model(model: Path, tmp_path: Path) -> None:
    with service(tmp_path / "runs") as running, client_of(running) as client:
        status = client.train(reward=reward, prompts=PROMPTS, settings=tiny_settings(model))
        assert (status.state, status.model_version) == ("finished", (status.run_id, 4))
        assert status.counts["groups_learned"] == 8 == status.reward_requests_served
        rows = metrics_of(running, status.run_id)
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        assert all(row["staleness/max"] == 0 for row in rows)
        assert client.get_model(tmp_path / "model.zip") == 4
        whole = (tmp_path / "model.zip").read_bytes()
        rest = running.ask("GET", "/model?version=4", headers={"range": "bytes=1000-"})
        assert (rest.status_code, rest.content) == (206, whole[1000:])
    with zipfile.ZipFile(tmp_path / "model.zip") as files:
        files.extractall(tmp_path / "model")
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    start = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    assert not torch.equal(trained.lm_head.weight, start.lm_head.weight)


def test_client_for_asyncio_trains_with_many_prompts_at_once(model: Path, tmp_path: Path) -> None:
    async def slow_reward(outputs: list[str], hint: list[str], **_: Any) -> list[float | None]:
        await asyncio.sleep(0.01)
        assert hint == ["h"] * 4
        return [None, *vowel_rewards(outputs)[1:]]

    async def train(url: str) -> Any:
        async with AsyncTrainingClient(url, KEY) as client:
            rows = [{"prompt": prompt, "hint": "h"} for prompt in PROMPTS]
            return await client.train(reward=slow_reward, prompts=rows, settings=tiny_settings(model))

    with service(tmp_path / "runs") as running:
        status = asyncio.run(train(running.url))
    assert (status.state, status.model_version[1]) == ("finished", 4)
    assert status.counts["samples_failed"] >= 8


def test_client_of_the_first_services_shape_runs_unchanged(model: Path, tmp_path: Path) -> None:
    first = {
        "model_id": str(model),
        "max_completion_length": 5,
        "num_completions_per_prompt": 3,
        "training_batch_size": 1,
        "learning_rate": 5e-2,
        "gradient_accumulation_steps": 1,
        "logging_steps": 1,
        "max_steps": 3,
    }
    with service(tmp_path / "runs") as running:
        none = {"training_settings": None, "completion_requests_served": 0, "reward_requests_served": 0}
        assert none.items() <= running.status().items()
        assert running.ask("GET", "/status", headers={KEY_HEADER: "wrong"}).status_code == 401
        assert running.post("/stop")[0] == 409
        assert running.post("/completions", {"prompt": "ab"})[0] == 409
        assert running.post("/start", first)[1]["status"] == "started"
        assert running.post("/start", first)[0] == 409
        for number in range(3):
            code, got = running.post("/completions", {"prompt": "ab"})
            assert code == 200, got
            names = ("prompt", "completions", "completion_tokens")
            posted = {name: got[name] for name in names}
            assert [len(got[name]) for name in names[1:]] == [3, 3]
            assert got["model_version"][1] == number
            # One client after the other, so that the next group is of the next model.
            wanted = {**posted, "rewards": vowel_rewards(got["completions"]), "wait_s": 30}
            answer = running.post("/rewards", wanted)
            assert answer[1]["model_version"][1] == number + 1
        status = running.wait_for("finished")
        assert first.items() <= status["training_settings"].items()
        assert (status["completion_requests_served"], status["reward_requests_served"]) == (3, 3)
        assert running.post("/completions", {"prompt": "ab"})[0] == 409
        assert (
            "model.safetensors"
            in zipfile.ZipFile(io.BytesIO(running.ask("POST", "/model", json={}).content)).namelist()
        )
        running.kill()
        running.start()
        assert running.post("/rewards", wanted) == answer
        again = running.status()
        counted = ("state", "training_settings", "model_version", "reward_requests_served")
        assert [again[name] for name in counted] == [status[name] for name in counted]
        code, refusal = running.post("/completions", {"prompt": "ab"})
        assert (code, "is finished: all 3 updates are made" in refusal["detail"]) == (409, True)


def test_requests_that_fit_nothing_are_refused_in_words(model: Path, tmp_path: Path) -> None:
    with service(tmp_path / "runs") as running, client_of(running) as client:
        client.start(tiny_settings(model))
        got = running.post("/completions", {"prompt": "ab", "client_id": "one"})[1]
        right = {
            "sample_ids": got["sample_ids"],
            "token_hashes": got["token_hashes"],
            "rewards": [1.0, 2.0, 3.0, 4.0],
            "client_id": "one",
        }
        wrong = [
            ({"rewards": [1.0]}, 422, "there are 1 rewards for 4 completions"),
            ({"client_id": "two"}, 409, "is leased to another client"),
            ({"token_hashes": ["x"] * 4}, 409, "has other tokens"),
            ({"token_hashes": None}, 422, "which tokens are rewarded?"),
            ({"sample_ids": ["other.0.0"] * 4}, 404, "is of another run"),
            ({"sample_ids": [*got["sample_ids"][:3], "nonsense"]}, 404, "is no id of a sample"),
            ({"reward": 1}, 400, "`reward`"),
        ]
        for change, status, reason in wrong:
            code, answer = running.post("/rewards", {**right, **change})
            assert (code, reason in answer["detail"]) == (status, True), answer
        body = json.dumps({**right, "rewards": [1.0, float("nan"), 1.0, 1.0]})
        reply = running.ask("POST", "/rewards", content=body, headers={"content-type": "application/json"})
        assert (reply.status_code, "reward 1 is nan" in reply.json()["detail"]) == (422, True)
        code, answer = running.post("/completions", {"prompt": "abcdefgh" * 2})
        assert (code, "the model's window leaves 11" in answer["detail"]) == (422, True)
        code, answer = running.post("/completions", {"prompt": [{"role": "user", "content": "ab"}]})
        assert (code, "cannot be sampled" in answer["detail"]) == (422, True)
        assert running.post("/rewards", right)[0] == 200
        assert running.post("/rewards", right)[0] == 200
        assert running.status()["reward_requests_served"] == 1
        assert running.ask("GET", "/openapi.json").json()["paths"].keys() >= {"/start", "/rewards", "/events"}


def test_messages_are_rendered_by_the_chat_template_and_trained_on(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer("gemma")
    shape: dict[str, Any] = {"n_positions": WINDOW, "bos_token_id": tokenizer.bos_token_id}
    GPT2LMHeadModel(tiny_gpt2_config(tokenizer, **shape)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    question = {"role": "user", "content": "What is 17 + 25?"}
    begun = [question, {"role": "assistant", "content": "It is"}]
    open_turn = "<bos><start_of_turn>user\nWhat is 17 + 25?<end_of_turn>\n<start_of_turn>model\n"
    rendered = [open_turn, f"{open_turn}It is"]
    seen: list[str] = []

    def right_ones(prompts: list[str], outputs: list[str], answer: list[str], **_: Any) -> list[float]:
        assert answer == ["42"] * len(outputs)
        seen.extend(prompts)
        return vowel_rewards(outputs)

    with service(tmp_path / "runs") as running, client_of(running) as client:
        client.start(tiny_settings(tmp_path / "model", max_steps=2))
        groups = client.get_completions_batch([[question], begun])
        assert [group.prompt for group in groups] == rendered
        for text, group in zip(rendered, groups, strict=True):
            ids: Any = tokenizer.encode(text, add_special_tokens=False)
            assert ids.count(tokenizer.bos_token_id) == 1
            assert all(tokens[: len(ids)] == ids for tokens in group.completion_tokens)
        refused = [{"role": "system", "content": "Be brief."}, question]
        with pytest.raises(RefusedError, match="this model has no system turn") as refusal:
            client.get_completions(refused)
        assert refusal.value.status == 422
        rows = [{"prompt": each, "answer": "42"} for each in ([question], begun)]
        status = client.train(reward=right_ones, prompts=rows)
        assert (status.state, status.model_version[1]) == ("finished", 2)
    assert {*seen} == {*rendered}


def test_setting_that_is_wrong_ends_the_start_in_words(model: Path, tmp_path: Path) -> None:
    with service(tmp_path / "runs", models=json.dumps([str(model), "missing"])) as running:
        for change, status, reason in [
            ({"model_id": "other"}, 409, "is none of those that this service trains"),
            ({"model_id": "missing"}, 422, "missing"),
            ({"overrides": {"reward": {"function": "evil.py:f"}}}, 422, "cannot be set by a client"),
            ({"overrides": {"model": {"trust_remote_code": True}}}, 422, "cannot be set by a client"),
            ({"overrides": {"grpo": {"clip_lo": 0.1}}}, 422, "did you mean `grpo.clip_low`?"),
        ]:
            settings = tiny_settings(model).model_copy(update=change)
            code, answer = running.post("/start", settings.model_dump())
            assert (code, reason in answer["detail"]) == (status, True), answer
        assert running.status()["state"] == "failed"
        assert running.post("/start", tiny_settings(model).model_dump())[0] == 200


def train_by_hand(running: Service, settings: Any, disturb: Any = lambda place: None) -> bytes:
    """Four updates of two groups each, one request after the other; the model at the end.

    disturb: called with a number wherever something may go wrong.
    """
    with client_of(running, client_id="hand") as client:
        client.start(settings)
        disturb(0)
        for step in range(4):
            groups: list[CompletionsResponse] = client.get_completions_batch(PROMPTS[:2])
            disturb(10 * step + 1)
            for number, group in enumerate(groups):
                rewards = vowel_rewards(group.completions)
                answer = client.submit_rewards(group, rewards)
                disturb(10 * step + 2 + number)
                assert client.submit_rewards(group, rewards) == answer  # sent twice, learned from once
            assert answer.outcome == "whole" and answer.model_version[1] == step + 1
            wait_until(lambda done=step: client.get_status().model_version[1] > done, lambda: "no update")
        client.get_model(running.output_dir / "model.zip")
    return (running.output_dir / "model.zip").read_bytes()


def test_service_that_is_killed_ends_with_the_weights_of_one_that_is_not(model: Path, tmp_path: Path) -> None:
    settings = tiny_settings(model, save_every=2, max_steps=4)
    with service(tmp_path / "quiet") as running:
        expected = weights_in(train_by_hand(running, settings))
    with service(tmp_path / "killed") as running:

        def kill(place: int) -> None:
            # Before the first checkpoint with leases out; with one group whole; behind a lost update.
            if place in (1, 12, 31):
                running.kill()
                running.start()

        got = weights_in(train_by_hand(running, settings, kill))
        counts = running.status()["counts"]
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert (counts["groups_learned"], counts["posts_accepted"], counts["samples_lapsed"]) == (8, 8, 0)


@pytest.mark.slow
def test_servers_sample_what_the_trainer_itself_would(model: Path, tmp_path: Path) -> None:
    def completions(running: Service) -> list[list[str]]:
        texts: list[list[str]] = []
        with client_of(running) as client:
            client.start(tiny_settings(model))
            for version in range(2):
                groups = client.get_completions_batch(PROMPTS[:2])
                assert [group.model_version[1] for group in groups] == [version] * 2
                for group in groups:
                    answer = client.submit_rewards(group, vowel_rewards(group.completions), wait_s=60.0)
                    texts.append(group.completions)
                assert answer.model_version[1] == version + 1
        return texts

    with service(tmp_path / "alone") as running:
        expected = completions(running)
    with (
        served(policy(), TOKENIZER) as server,
        service(tmp_path / "served", **{"rollout.urls": server.address}) as running,
    ):
        assert completions(running) == expected


def test_run_goes_on_after_a_client_was_killed(model: Path, tmp_path: Path) -> None:
    with service(tmp_path / "runs") as running, client_of(running) as client:
        client.start(tiny_settings(model, lease_s=2.0))
        doomed = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.remote_client", running.url, "asks"],
            cwd=ROOT,
            env={**os.environ, KEY_VARIABLE: KEY},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert doomed.stdout is not None and doomed.stdout.readline() == "ready\n"
        doomed.kill()
        doomed.communicate(timeout=30)
        status = client.train(reward=reward, prompts=PROMPTS)
        assert (status.state, status.model_version[1]) == ("finished", 4)

        def has_lapsed() -> bool:
            return running.status()["counts"]["groups_without_rewards"] == 1

        if not has_lapsed():  # the run was quicker than the lease
            assert status.counts["groups_under_way"] == 1


def test_service_that_is_told_to_end_saves_and_the_next_goes_on(model: Path, tmp_path: Path) -> None:
    with service(tmp_path / "runs") as running, client_of(running) as client:
        client.start(tiny_settings(model))
        group = client.get_completions("ab")
        answers: list[httpx2.Response] = []
        full = {"prompt": "ab", "request_id": "r", "group": "g", "num_completions": 4}
        waiting = threading.Thread(
            target=lambda: answers.append(running.ask("GET", "/events")), name="listener"
        )
        waiting.start()
        assert running.post("/completions", full)[0] == 200
        assert running.terminate() == 0
        waiting.join(60)
        assert answers and "event: state" in answers[0].text
        run_id = group.model_version[0]
        assert (running.output_dir / "runs" / run_id / "train" / "checkpoints" / "step_0").is_dir()
        running.start()
        assert client.submit_rewards(group, [1.0, 2.0, 3.0, 4.0]).outcome == "whole"
        assert running.post("/completions", full)[0] == 200
        assert client.train(reward=reward, prompts=PROMPTS).state == "finished"


def test_run_that_fails_tells_everybody_why(model: Path, tmp_path: Path) -> None:
    with service(tmp_path / "runs") as running, client_of(running) as client:
        run_id = client.start(tiny_settings(model, save_every=1, training_batch_size=1)).run_id
        group = client.get_completions("ab")
        # The disk has no room for a checkpoint's folder, as far as the trainer can tell.
        (running.output_dir / "runs" / run_id / "train" / "checkpoints").write_text("")
        assert client.submit_rewards(group, [1.0, 2.0, 3.0, 4.0], wait_s=30.0).model_version[1] == 1
        status = running.wait_for("failed")
        assert "checkpoint" in status["error"]
        code, answer = running.post("/completions", {"prompt": "ab"})
        assert (code, "is failed" in answer["detail"], "checkpoint" in answer["detail"]) == (409, True, True)
        (running.output_dir / "runs" / run_id / "train" / "checkpoints").unlink()
        assert client.resume(run_id).status == "started"
        assert client.train(reward=reward, prompts=PROMPTS).model_version == (run_id, 4)
