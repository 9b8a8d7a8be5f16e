"""What clients do with answers that are no success; the service is a fake on a real port."""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from conch.errors import ServiceError
from conch.service.client import AsyncTrainingClient, TrainingClient, TrainingSettings
from conch.service.protocol import MODEL_VERSION_HEADER, RewardsRequest, token_hash
from conch.service.refusals import RefusedError
from tests.fakes.training_service import LOST, Answer, fake_service
from tests.launches import ROOT

SETTINGS = TrainingSettings(model_id="m", training_batch_size=2)
NONE: Answer = (200, {"state": "none"})
RUNNING: Answer = (
    200,
    {"state": "running", "run_id": "run", "training_settings": SETTINGS.model_dump(mode="json")},
)
FINISHED: Answer = (200, {**RUNNING[1], "state": "finished"})
OVER: Answer = (409, {"detail": "run run is finished"})
WHOLE = {"model_version": ["run", 1], "outcome": "whole"}


def busy(status: int = 429) -> dict[str, Any]:
    return {"status": status, "detail": "busy"}


def given(prompt: str) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "completions": [f"{prompt}!"],
        "completion_tokens": [[1]],
        "model_version": ["run", 0],
        "sample_ids": [f"run.{prompt}.0"],
        "token_hashes": [token_hash([1])],
    }


def giving(*refused: dict[str, Any] | None) -> Any:
    """An answer to a batch: completions, or for a prompt what stands here in its place."""

    def answer(batch: dict[str, Any]) -> Answer:
        prompts = [request["prompt"] for request in batch["requests"]]
        wanted = [*refused, *[None] * (len(prompts) - len(refused))]
        return 200, {"replies": [bad or given(prompt) for prompt, bad in zip(prompts, wanted, strict=True)]}

    return answer


def taking(*refused: dict[str, Any] | None) -> Any:
    def answer(batch: dict[str, Any]) -> Answer:
        wanted = [*refused, *[None] * (len(batch["requests"]) - len(refused))]
        return 200, {"replies": [bad or WHOLE for bad in wanted]}

    return answer


def reward(outputs: list[str], **_: Any) -> list[float]:
    return [1.0 for _ in outputs]


def prompts_of(batch: dict[str, Any]) -> list[str]:
    return [request["prompt"] for request in batch["requests"]]


def test_prompts_that_are_told_to_come_again_come_with_the_next_ones() -> None:
    with (
        fake_service(
            status=[RUNNING, FINISHED],
            completions_batch=[giving(None, busy()), giving(), OVER],
            rewards_batch=[taking()],
        ) as fake,
        TrainingClient(fake.url, "key") as client,
    ):
        assert client.train(reward=reward, prompts=["a", "b", "c"], settings=SETTINGS).state == "finished"
        batches = fake.sent_to("/completions/batch")
        assert [prompts_of(batch) for batch in batches] == [["a", "b"], ["b", "c"], ["a", "b"]]
        assert batches[0]["requests"][1]["request_id"] == batches[1]["requests"][0]["request_id"]
        rewarded = [
            [post["sample_ids"] for post in sent["requests"]] for sent in fake.sent_to("/rewards/batch")
        ]
        assert rewarded == [[["run.a.0"]], [["run.b.0"], ["run.c.0"]]]


def test_prompt_whose_completions_have_lapsed_is_passed_over() -> None:
    gone = {"status": 410, "detail": "have lapsed"}
    with (
        fake_service(
            status=[RUNNING, FINISHED], completions_batch=[giving(gone, gone), OVER], rewards_batch=[taking()]
        ) as fake,
        TrainingClient(fake.url, "key") as client,
    ):
        assert client.train(reward=reward, prompts=["a", "b", "c"]).state == "finished"
        assert [*map(prompts_of, fake.sent_to("/completions/batch"))] == [["a", "b"], ["c", "a"]]


def test_rewards_that_are_told_to_come_again_come_alone() -> None:
    posts = [RewardsRequest(rewards=[float(number)], token_hashes=["x"]) for number in range(3)]
    late = {"status": 410, "detail": "too late"}
    with (
        fake_service(rewards_batch=[taking(None, busy(503), late), taking()]) as fake,
        TrainingClient(fake.url, "key") as client,
    ):
        replies = client.submit_rewards_batch(posts)
        assert [getattr(reply, "status", None) for reply in replies] == [None, None, 410]
        sent = [[post["rewards"] for post in batch["requests"]] for batch in fake.sent_to("/rewards/batch")]
        assert sent == [[[0.0], [1.0], [2.0]], [[1.0]]]


def test_rewards_that_are_refused_end_the_training_in_words() -> None:
    wrong = {"status": 422, "detail": "there are 2 rewards for 1 completions"}
    with (
        fake_service(status=[RUNNING], completions_batch=[giving()], rewards_batch=[taking(wrong)]) as fake,
        TrainingClient(fake.url, "key") as client,
        pytest.raises(RefusedError, match="refuses a group's rewards: there are 2 rewards"),
    ):
        client.train(reward=reward, prompts=["a"])


@pytest.mark.parametrize("answer", [(409, {"detail": "another run is under way"}), LOST])
@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
def test_client_joins_the_run_that_its_start_was_too_late_for(kind: str, answer: Answer) -> None:
    async def train(url: str) -> str:
        async with AsyncTrainingClient(url, "key") as client:
            return (await client.train(reward=reward, prompts=["a"], settings=SETTINGS)).state

    with fake_service(
        status=[NONE, RUNNING, FINISHED],
        start=[answer],
        completions=[OVER],
        completions_batch=[OVER],
    ) as fake:
        if kind == "asyncio":
            assert asyncio.run(train(fake.url)) == "finished"
            return
        with TrainingClient(fake.url, "key") as client:
            assert client.train(reward=reward, prompts=["a"], settings=SETTINGS).state == "finished"


def test_start_that_did_not_come_through_is_made_again() -> None:
    started = (200, {"status": "started", "run_id": "run", "model_version": ["run", 0]})
    with (
        fake_service(status=[NONE, NONE, FINISHED], start=[LOST, started], completions_batch=[OVER]) as fake,
        TrainingClient(fake.url, "key") as client,
    ):
        assert client.train(reward=reward, prompts=["a"], settings=SETTINGS).state == "finished"
        assert len(fake.sent_to("/start")) == 2


def test_start_that_is_refused_without_a_run_is_told() -> None:
    with (
        fake_service(status=[NONE], start=[(422, {"detail": "no such model"})]) as fake,
        TrainingClient(fake.url, "key") as client,
        pytest.raises(ServiceError, match="no such model"),
    ):
        client.train(reward=reward, prompts=["a"], settings=SETTINGS)


def model_file(content: bytes) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as files:
        files.writestr("model.safetensors", content)
    return archive.getvalue()


def test_download_goes_on_where_the_connection_broke_and_begins_anew_where_the_model_is_gone(
    tmp_path: Path,
) -> None:
    old, new = model_file(b"old" * 1000), model_file(b"new" * 1000)

    def part(content: bytes, version: int, status: int = 200, until: int | None = None) -> Answer:
        length = {"content-length": str(len(content))} if until else {}
        return status, (content[:until], {MODEL_VERSION_HEADER: str(version), **length})

    answers = {
        "/model": [part(old, 3, until=1000), part(new, 4, until=1000)],
        "/model?version=3": [(404, {"detail": "version 3 is not kept"})],
        "/model?version=4": [part(new[1000:], 4, status=206)],
    }
    with fake_service() as fake, TrainingClient(fake.url, "key") as client:
        fake._answers = answers  # pyright: ignore[reportAttributeAccessIssue]
        assert client.get_model(tmp_path / "model.zip") == 4
        assert fake.sent_to("/model?version=4")[0]["range"] == "bytes=1000-"
    assert (tmp_path / "model.zip").read_bytes() == new
    assert [path.name for path in tmp_path.iterdir()] == ["model.zip"]


ALONE = """
import sys
from importlib.abc import MetaPathFinder

roots = {*sys.argv[1:], *sys.stdlib_module_names}

class Others(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        root = name.partition(".")[0]
        if root not in roots and not root.startswith("_sysconfigdata"):
            raise ModuleNotFoundError(f"{name} is not installed", name=name)

sys.meta_path.insert(0, Others())
from conch.errors import ServiceUnavailableError
from conch.service.client import TrainingClient

with TrainingClient("http://127.0.0.1:9", "key", retry_s=0) as client:
    try:
        client.get_status()
    except ServiceUnavailableError as error:
        print(error)
"""


def needed(*distributions: str) -> set[str]:
    """What is imported of these distributions and of all that they need, without extras."""
    wanted = [*distributions]
    for name in wanted:
        for line in metadata.requires(name) or ():
            requirement = Requirement(line)
            own = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if own and requirement.name not in wanted:
                wanted.append(requirement.name)
    files = [file for name in wanted for file in metadata.files(name) or ()]
    return {file.parts[0].partition(".")[0] for file in files}


def test_coroutine_for_a_reward_of_the_blocking_client_is_told() -> None:
    async def awaited(outputs: list[str], **_: Any) -> list[float]:
        return reward(outputs)

    with (
        fake_service(status=[RUNNING], completions_batch=[giving()]) as fake,
        TrainingClient(fake.url, "key") as client,
        pytest.raises(ServiceError, match="coroutine function: `AsyncTrainingClient` awaits such"),
    ):
        client.train(reward=awaited, prompts=["a"])


def test_model_for_a_folder_that_is_not_there_is_told_before_it_is_asked_for(tmp_path: Path) -> None:
    with (
        fake_service() as fake,
        TrainingClient(fake.url, "key") as client,
        pytest.raises(ServiceError, match=r"there is no folder .*nowhere"),
    ):
        client.get_model(tmp_path / "nowhere" / "model.zip")
    assert fake.asked == []


def test_client_needs_httpx_and_pydantic_alone() -> None:
    command = [sys.executable, "-c", ALONE, "conch", *needed("httpx2", "pydantic")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "http://127.0.0.1:9 does not answer (ConnectError" in done.stdout
