"""Clients of a training service in processes of their own, to be killed.

python -m tests.integration.remote_client URL asks       takes completions, and rewards none of them
python -m tests.integration.remote_client URL trains     trains to the end of the run that is under way
"""

from __future__ import annotations

import sys
import time

from conch.service.client import TrainingClient

PROMPTS = ["ab", "cd", "ef", "gh"]


def vowels(outputs: list[str], **_: object) -> list[float]:
    """How many of `a` and `e` each output has."""
    return [float(sum(letter in "ae" for letter in output)) for output in outputs]


def main(url: str, what: str) -> None:
    """Say `ready` once there are completions; the key is taken from the environment."""
    with TrainingClient(url, client_id=f"{what}-{time.time_ns()}", retry_s=240.0) as client:
        if what == "asks":
            client.get_completions("abc")
            print("ready", flush=True)
            time.sleep(600)
        print("ready", flush=True)
        print(client.train(reward=vowels, prompts=PROMPTS).state)


if __name__ == "__main__":
    main(*sys.argv[1:])
