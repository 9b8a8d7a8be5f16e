"""Does a training service that lives long grow? Its memory over 100,000 samples that it trains on.

    python -m benchmarks.remote_soak

`python -m conch.service` in a process trains a tiny GPT-2 for real, 40 samples an update (4 prompts of 10
completions of up to 5 tokens), a checkpoint every 100th; a client in this process asks and rewards over HTTP,
and every tenth update it sends a post again, a reward that fits nothing, and asks for the status. USS is what
the service's process alone holds in memory, the trainer in it. What the service remembers has bounds: 1024
groups that have ended and 1000 events, which are reached behind the first 40,000 samples; so the second half
is held against the middle.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from conch.errors import ConchError, ServiceError
from conch.service.client import TrainingClient
from conch.service.protocol import CompletionsResponse, RewardsRequest, RewardsResponse
from conch.service.refusals import RefusedError
from tests.services import KEY, service, tiny_model, tiny_settings

_GROUPS, _GROUP_SIZE = 4, 10
_PER_STEP = _GROUPS * _GROUP_SIZE
_PROMPTS = ["a", "bc", "def", "g", "ha", "b", "cd", "e"]
_CLIENT = "soak"
_WAIT_S = 60.0
_MISBEHAVES_EVERY = 10
_MOST_GROWTH = 0.02


@dataclass(frozen=True, slots=True)
class Look:
    """What the service held after so many samples. uss, disk: bytes, of its process and of the journal."""

    samples: int
    seconds: float
    uss: int
    files: int
    threads: int
    disk: int

    def row(self) -> str:
        """As a line of a Markdown table."""
        memory = f"{self.uss / 2**20:.1f} | {self.files} | {self.threads}"
        return f"| {self.samples:,} | {self.seconds:.0f} | {memory} | {self.disk / 1e6:.2f} |"


def soak(folder: Path, samples: int, looks: int) -> list[Look]:
    """Train on so many samples, and look at the service in between.

    Raises:
        ConchError: an answer is none that it should be.
    """
    steps, found = samples // _PER_STEP, list[Look]()
    with service(folder / "service") as running:
        started, process = time.monotonic(), psutil.Process(running.process.pid)
        with TrainingClient(running.url, KEY, client_id=_CLIENT, wait_s=_WAIT_S) as client:
            settings = tiny_settings(
                tiny_model(folder / "model"),
                num_completions_per_prompt=_GROUP_SIZE,
                training_batch_size=_GROUPS,
                max_steps=steps + 1,
                save_every=100,
            )
            run_id = client.start(settings).run_id
            journal = running.output_dir / "runs" / run_id / "journal"
            for step in range(1, steps + 1):
                _take_step(client, step)
                if step in {1, *(steps * part // looks for part in range(1, looks + 1))}:
                    disk = sum(path.stat().st_size for path in journal.iterdir())
                    memory, seconds = process.memory_full_info().uss, time.monotonic() - started
                    files, threads = process.num_fds(), process.num_threads()
                    found.append(Look(step * _PER_STEP, seconds, memory, files, threads, disk))
                    print(found[-1].row(), file=sys.stderr, flush=True)
            counts = client.get_status().counts
            if (counts["samples_rewarded"], counts["groups_learned"]) != (steps * _PER_STEP, steps * _GROUPS):
                raise ServiceError(f"not each sample was learned from once: {counts}")
    return found


def _take_step(client: TrainingClient, step: int) -> None:
    prompts = [_PROMPTS[(step * _GROUPS + place) % len(_PROMPTS)] for place in range(_GROUPS)]
    groups = client.get_completions_batch(prompts)
    posts = [RewardsRequest.from_completions(each, _rewards(each), _CLIENT) for each in groups]
    posts[-1] = posts[-1].model_copy(update={"wait_s": _WAIT_S})
    replies = client.submit_rewards_batch(posts)
    for reply in replies:
        if not isinstance(reply, RewardsResponse) or reply.model_version[1] != step:
            raise ServiceError(f"a group is not learned from in update {step}: {reply}")
    if step % _MISBEHAVES_EVERY == 0:
        if client.submit_rewards_batch(posts) != replies:
            raise ServiceError("a post that was repeated got another answer")
        try:
            client.submit_rewards(groups[0], [99.0] * _GROUP_SIZE)
        except RefusedError:
            client.get_status()
        else:
            raise ServiceError("other rewards for samples that have some were taken")


def _rewards(group: CompletionsResponse) -> list[float]:
    return [float(sum(letter in "ae" for letter in output)) for output in group.completions]


def table(looks: Sequence[Look]) -> str:
    """As Markdown."""
    head = "| samples | s | USS, MiB | files and sockets | threads | journal, MB |\n" + "|---" * 6 + "|"
    said = f"memory grew by {growth(looks):+.2%} in the second half; at most {_MOST_GROWTH:.0%} is let pass"
    return "\n".join([head, *(look.row() for look in looks), "", said])


def growth(looks: Sequence[Look]) -> float:
    """Of the USS from the middle to the end, as a share."""
    return looks[-1].uss / looks[len(looks) // 2].uss - 1


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 where memory did not grow and files and threads did not become more, with a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.remote_soak", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--samples", type=int, default=100_000, help="default: %(default)s")
    parser.add_argument("--looks", type=int, default=10, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="conch-soak-") as folder:
            looks = soak(Path(folder), arguments.samples, arguments.looks)
    except (ConchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(looks))
    middle, last = looks[len(looks) // 2], looks[-1]
    leaks = last.files > middle.files or last.threads > middle.threads
    return int(leaks or growth(looks) > _MOST_GROWTH)


if __name__ == "__main__":
    sys.exit(main())
