"""Clients of a training service in processes of their own, for `benchmarks/chaos_remote.py`.

    python -m benchmarks.chaos_remote_clients KIND URL NAME SEED NOTES

KIND: `trains` by the client's own loop; `by_hand`, group by group, each rewarded once or twice; `misbehaves`.
NAME: `client_id`. NOTES: file that gets a JSON line for each answer. The key is taken from the environment.
All end with code 0 once the run has made its last update.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx2

from conch.errors import ConchError, ServiceError
from conch.service.client import TrainingClient
from conch.service.client_calls import TRANSIENT
from conch.service.protocol import KEY_HEADER, KEY_VARIABLE, CompletionsResponse
from conch.service.refusals import RefusedError

PROMPTS = ["a", "bc", "def", "g", "ha", "b", "cd", "e"]
LONGEST_S = 240.0
"""A client gives up behind that."""

_THINKS_S = 0.15
"""Time that a reward takes."""

_REFUSALS = (404, 409, 410, 422)
_ENDED, _GONE = 409, 410


def vowels(outputs: Sequence[str], **_: Any) -> list[float]:
    """How many of `a` and `e` each output has."""
    time.sleep(_THINKS_S)
    return [float(sum(letter in "ae" for letter in output)) for output in outputs]


class Notes:
    """A file that gets a JSON line for each answer, whole or not at all."""

    def __init__(self, file: Path) -> None:
        self._path = file

    def add(self, **values: Any) -> None:
        """Add a line."""
        with self._path.open("ab", buffering=0) as file:
            file.write((json.dumps(values) + "\n").encode())

    def promise(self, sample_ids: Sequence[str], rewards: Sequence[float], reply: dict[str, Any]) -> None:
        """Note what a post of rewards was answered."""
        self.add(
            samples=[*sample_ids],
            rewards=[*rewards],
            outcome=reply["outcome"],
            version=reply["model_version"][1],
        )


def train(url: str, name: str) -> None:
    """The loop that comes with the client."""
    with TrainingClient(url, client_id=name, retry_s=LONGEST_S, wait_s=20.0) as client:
        try:
            client.train(reward=vowels, prompts=PROMPTS)
        except ServiceError:
            if client.get_status().state != "finished":  # one that comes behind the end has nothing to join
                raise


def train_by_hand(url: str, name: str, seed: int, notes: Notes) -> None:
    """Groups one by one; the answers are noted, and every third post is sent again."""
    draw = random.Random(seed)
    with TrainingClient(url, client_id=name, retry_s=LONGEST_S, wait_s=20.0) as client:
        while True:
            try:
                group = client.get_completions(draw.choice(PROMPTS))
                rewards = vowels(group.completions)
                for _ in range(1 + (draw.random() < 1 / 3)):
                    answer = client.submit_rewards(group, rewards).model_dump(mode="json")
                    notes.promise(group.sample_ids, rewards, answer)
            except RefusedError as error:
                if error.status == _ENDED and client.get_status().state == "finished":
                    return
                if error.status != _GONE:  # lapsed, behind a cut or a pause
                    raise


# -------------------------------------------------------------------------------------- what fits nothing


class UnexpectedError(ConchError):
    """The service has answered what it must not."""


class BadClient:
    """Takes completions and rewards them as nobody should. Raises `UnexpectedError` where that works."""

    def __init__(self, url: str, name: str, seed: int, notes: Notes) -> None:
        self._url = url
        self._name = name
        self._draw = random.Random(seed)
        self._notes = notes
        self._until = time.monotonic() + LONGEST_S
        self._http = httpx2.Client(
            headers={KEY_HEADER: os.environ[KEY_VARIABLE]}, timeout=20.0, trust_env=False
        )

    def run(self) -> None:
        """Until the run has ended."""
        with self._http:
            self._run()

    def _run(self) -> None:
        deeds: list[Callable[[CompletionsResponse], None]]
        deeds = [self._late, self._twice, self._few, self._no_number, self._tokens, self._others]
        number = 0
        while True:
            number += 1
            body = {"prompt": self._draw.choice(PROMPTS), "request_id": f"r{number}", "wait_s": 5.0}
            status, reply = self._post("/completions", body)
            if status == _ENDED and "finished" in reply["detail"]:
                return
            if status == 200:
                self._draw.choice(deeds)(CompletionsResponse.model_validate(reply))
            else:
                self._expect_refusal("asks", status, reply)

    def _late(self, group: CompletionsResponse) -> None:
        time.sleep(group.lease_s + 0.5)
        status, reply = self._reward(group, [1.0] * len(group.sample_ids))
        if status == 200:  # the service was down meanwhile, which does not count
            self._notes.promise(group.sample_ids, [1.0] * len(group.sample_ids), reply)
        else:
            self._expect_refusal("late", status, reply)

    def _twice(self, group: CompletionsResponse) -> None:
        rewards = vowels(group.completions)
        first = self._right(group, rewards)
        if first is not None:
            again = self._right(group, rewards)
            if again is not None and again != first:
                raise UnexpectedError(f"the same post was answered {first} and {again}")
            self._refused("twice, another reward", group, [9.0, *rewards[1:]])

    def _few(self, group: CompletionsResponse) -> None:
        rewards = vowels(group.completions)
        self._refused("too few", group, rewards[:-1])
        self._right(group, rewards)

    def _no_number(self, group: CompletionsResponse) -> None:
        rewards = vowels(group.completions)
        for bad in (float("nan"), float("inf"), 1e10):
            self._refused(f"{bad}", group, [bad, *rewards[1:]])
        self._right(group, rewards)

    def _tokens(self, group: CompletionsResponse) -> None:
        rewards = vowels(group.completions)
        self._refused("other hashes", group, rewards, token_hashes=["0" * 32] * len(rewards))
        tokens = [[1, *ids] for ids in group.completion_tokens]
        self._refused("other tokens", group, rewards, token_hashes=None, completion_tokens=tokens)
        self._right(group, rewards)

    def _others(self, group: CompletionsResponse) -> None:
        rewards = [9.0] * len(group.sample_ids)
        self._refused("another's group", group, rewards, client_id="thief")
        run_id, number, _ = group.sample_ids[0].rsplit(".", 2)
        if int(number):  # whoever has the one before
            ids = [f"{run_id}.{int(number) - 1}.{place}" for place in range(len(rewards))]
            self._refused("guessed ids", group, rewards, sample_ids=ids)

    def _right(self, group: CompletionsResponse, rewards: Sequence[float]) -> dict[str, Any] | None:
        status, reply = self._reward(group, rewards)
        if status == 200:
            self._notes.promise(group.sample_ids, rewards, reply)
            return reply
        self._expect_refusal("right, but behind the lease or the run", status, reply)
        return None

    def _refused(self, deed: str, group: CompletionsResponse, rewards: Sequence[float], **other: Any) -> None:
        self._expect_refusal(deed, *self._reward(group, rewards, **other))

    def _expect_refusal(self, deed: str, status: int, reply: dict[str, Any]) -> None:
        self._notes.add(deed=deed, status=status)
        if status not in _REFUSALS or not reply.get("detail"):
            raise UnexpectedError(f"{deed}: {status} {reply}")

    def _reward(
        self, group: CompletionsResponse, rewards: Sequence[float], **other: Any
    ) -> tuple[int, dict[str, Any]]:
        named = {"sample_ids": group.sample_ids, "token_hashes": group.token_hashes}
        return self._post("/rewards", {"rewards": [*rewards], **named, **other})

    def _post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and JSON, asked for again while the service is away or busy."""
        content = json.dumps({"client_id": self._name, **body})
        while time.monotonic() < self._until:
            try:
                reply = self._http.post(
                    self._url + path, content=content, headers={"content-type": "application/json"}
                )
                if reply.status_code not in TRANSIENT:
                    return reply.status_code, reply.json()
            except httpx2.RequestError:
                pass
            time.sleep(0.3)
        raise UnexpectedError(f"{path} was not answered in {LONGEST_S:g} s")


def main(kind: str, url: str, name: str, seed: str, notes: str) -> None:
    """As the command line says."""
    file = Notes(Path(notes))
    if kind == "trains":
        train(url, name)
    elif kind == "by_hand":
        train_by_hand(url, name, int(seed), file)
    else:
        BadClient(url, name, int(seed), file).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
