"""verl and OpenRLHF call reward functions of Conch's by their own code, as much of it as needs no GPU.

python interop_clients.py PACKAGES OUT.json

PACKAGES: a folder with verl and OpenRLHF and nothing that they need.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

VERL_REWARDS = """
from conch.interop.verl import reward_function

def score(samples, prompts, outputs, answer, **rest):
    return [float(len(sample)) + (output == right)
            for sample, output, right in zip(samples, outputs, answer)]

compute_score = reward_function(score, prompt="question")
"""
OPENRLHF_REWARDS = """
from conch.interop.openrlhf import reward_function

def score(samples, prompts, outputs, answer, **rest):
    return [float(len(output)) + (output == right) for output, right in zip(outputs, answer)]

reward_func = reward_function(score, end="<eos>")
"""


def hollow(packages: Path, *names: str) -> None:
    """Put packages in place without running their `__init__`, which import what is not installed."""
    for name in names:
        module = types.ModuleType(name)
        module.__path__ = [str(packages / name.replace(".", "/"))]
        sys.modules[name] = module


class Letters:
    """A tokenizer of letters by their code points."""

    def decode(self, ids: Any, skip_special_tokens: bool) -> str:
        text = "".join(map(chr, ids))
        return text if skip_special_tokens else f"{text}<eos>"

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        return {"input_ids": torch.tensor([list(map(ord, text))])}


class Batch:
    """One row of what verl's managers take."""

    def __init__(self) -> None:
        ids = torch.tensor([list(map(ord, "four"))])
        self.batch = {"responses": ids[0], "attention_mask": torch.ones(8, dtype=torch.long)}
        self.non_tensor_batch = {
            "data_source": "sums",
            "reward_model": {"ground_truth": "four"},
            "extra_info": {"question": "2+2="},
        }

    def __getitem__(self, _: Any) -> Batch:
        return self


def by_verl(packages: Path, folder: Path) -> Any:
    """Load the function as `reward.custom_reward_function` does, and score by the manager `naive`."""
    parts = ("", ".utils", ".trainer", ".trainer.ppo", ".experimental", ".experimental.reward_loop")
    hollow(packages, *(f"verl{part}" for part in (*parts, ".experimental.reward_loop.reward_manager")))
    verl: Any = sys.modules["verl"]
    verl.DataProto = Batch
    file = folder / "verl_rewards.py"
    file.write_text(VERL_REWARDS)
    named = {"path": str(file), "name": "compute_score", "reward_kwargs": {"style": "plain"}}
    config = SimpleNamespace(reward={"custom_reward_function": named})
    function = importlib.import_module("verl.trainer.ppo.reward").get_custom_reward_fn(config)
    place = "verl.experimental.reward_loop.reward_manager"
    registry: Any = importlib.import_module(f"{place}.registry")
    package: Any = sys.modules[place]
    package.register = registry.register
    naive: Any = importlib.import_module(f"{place}.naive")

    async def score() -> Any:
        manager = naive.NaiveRewardManager(config, Letters(), function)
        return [manager.is_async_reward_score, await manager.run_single(Batch())]

    return asyncio.run(score())


def by_openrlhf(packages: Path, folder: Path) -> Any:
    """Load the function as `--reward.remote_url` does, and let the executor of single turns call it."""
    hollow(packages, "openrlhf", "openrlhf.utils")
    file = folder / "openrlhf_rewards.py"
    file.write_text(OPENRLHF_REWARDS)
    agent: Any = importlib.import_module("openrlhf.utils.agent")
    executor = agent.SingleTurnAgentExecutor(str(file))

    class Engine:
        async def generate(self, ids: list[int], parameters: Any, **_: Any) -> Any:
            output = SimpleNamespace(token_ids=list(map(ord, "four")), finish_reason="stop", logprobs=None)
            return SimpleNamespace(outputs=[output])

    parameters = SimpleNamespace(max_tokens=8, logprobs=None)
    done = asyncio.run(executor.execute("2+2=", "four", parameters, 64, Letters(), Engine()))
    return {key: done[key] for key in ("reward", "scores", "extra_logs")}


def main() -> None:
    packages, out = Path(sys.argv[1]), Path(sys.argv[2])
    sys.path.append(str(packages))
    found = {"verl": by_verl(packages, out.parent), "openrlhf": by_openrlhf(packages, out.parent)}
    out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
