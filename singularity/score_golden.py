"""Score the golden samples of a store's model on a running server with Conch's client, and compare.

python singularity/score_golden.py localhost:8001/my-rm model_store --wait 120
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from conch.addresses import Endpoint
from conch.config import RewardConfig
from conch.errors import ConchError, RewardUnavailableError
from conch.rewards.served import TritonReward
from conch.store.manifest import Golden
from conch.store.store import read_model
from conch.types import Completion, Prompt, Rollout


def main() -> int:
    """Exit code 0 if every score is within the tolerance of the store, else 1 with the reason on stderr."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url", help="host:port/model")
    parser.add_argument("store", type=Path, help="model store that the server serves")
    parser.add_argument("--wait", type=float, default=0.0, help="seconds to wait for the server; default: 0")
    arguments = parser.parse_args()
    try:
        golden = read_model(arguments.store, Endpoint.parse(arguments.url).model).golden
        with TritonReward(arguments.url, RewardConfig()) as reward:
            _wait(reward, arguments.wait)
            worst = _worst_error(reward, golden)
    except ConchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    right = worst <= golden.tolerance
    print(
        f"{len(golden.samples)} golden samples, largest error {worst:.1e}, tolerance {golden.tolerance:.0e}"
    )
    return 0 if right else 1


def _wait(reward: TritonReward, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            return reward.check()
        except RewardUnavailableError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _worst_error(reward: TritonReward, golden: Golden) -> float:
    nothing = Completion("", (), (), "length")
    prompts = [Prompt(sample.text or "", tuple(sample.input_ids or ())) for sample in golden.samples]
    rollouts = [Rollout(prompt, nothing, policy_version=0) for prompt in prompts]
    worst = 0.0
    for sample, result in zip(golden.samples, reward.submit(rollouts).result(), strict=True):
        if not result.ok:
            raise RewardUnavailableError(result.detail)
        pairs = zip(result.scores.values(), sample.scores, strict=True)
        worst = max(worst, *(abs(served - right) / max(1.0, abs(right)) for served, right in pairs))
    return worst


if __name__ == "__main__":
    sys.exit(main())
