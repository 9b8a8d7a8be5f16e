"""What OpenRLHF's and verl's own client code makes of a reward server's answers.

python front_clients.py FOLDER HOST:PORT OUT.json

FOLDER: the packages openrlhf and verl, unpacked, without what they depend on.
OUT.json: what became of each sample of `CASES`, by client.

Of the packages the modules that ask a server are loaded from their files; what they import besides (Ray,
vLLM, tokenizers) is empty here, and their pauses are short. Imports nothing of the project.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import sys
import traceback
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch

CASES = {"good": "2+2=four", "invalid": "[invalid]", "down": "[down]", "late": "[late]"}
EMPTY = (
    *("ray", "ray.actor", "vllm", "tensordict", "omegaconf", "openrlhf.trainer.ray.vllm_engine"),
    *("verl.protocol", "verl.single_controller.ray.base", "verl.trainer.ppo.reward", "verl.utils"),
    *("verl.utils.fs", "verl.utils.ray_utils", "client.reward_model"),
)


def load(path: Path, name: str) -> ModuleType:
    """A module from its file."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Engine:
    """Samples what it is told to: a token a character."""

    def __init__(self, text: str) -> None:
        self._text = text

    async def generate(self, token_ids: list[int], params: Any, **_: Any) -> Any:
        del token_ids, params
        ids = [ord(character) for character in self._text]
        return SimpleNamespace(
            outputs=[SimpleNamespace(token_ids=ids, text=self._text, finish_reason="stop", logprobs=None)]
        )


class Tokenizer:
    """A token a character."""

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        return {"input_ids": torch.tensor([[ord(character) for character in text]])}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(map(chr, ids))


def by_openrlhf(folder: Path, server: str) -> dict[str, Any]:
    """The reward that its rollout and its `Experience` hold of each sample."""
    root = folder / "openrlhf"
    zero_pad = load(root / "utils/utils.py", "openrlhf.utils.utils").zero_pad_sequences
    assert callable(zero_pad)
    load(root / "trainer/ppo_utils/experience.py", "openrlhf.trainer.ppo_utils.experience")
    agent = load(root / "utils/agent.py", "openrlhf.utils.agent")
    samples = load(root / "trainer/ppo_utils/samples_generator.py", "samples_generator")
    executor = agent.SingleTurnAgentExecutor([f"http://{server}/get_reward"])
    generator = object.__new__(samples.SamplesGenerator)
    told: dict[str, Any] = {}
    for case, text in CASES.items():
        params = SimpleNamespace(max_tokens=64, logprobs=None)
        response = asyncio.run(executor.execute("2+2=", "4", params, 200, Tokenizer(), Engine(text)))
        experience = generator._process_response_into_experience(response, max_len=200)
        rewards = experience.rewards
        told[case] = {
            "reward": response["reward"],
            "scores": response["scores"],
            "experience": None if rewards is None else rewards.flatten().tolist(),
        }
    return told


def by_verl(folder: Path, server: str, engine: str) -> dict[str, Any]:
    """The score that its reward worker gives a sample, or the error that it raises."""
    loop = load(folder / "verl/experimental/reward_loop/reward_loop.py", "client.reward_loop")
    rollout = SimpleNamespace(name=engine)
    model = SimpleNamespace(rollout=rollout, model_path="/models/skywork")
    told: dict[str, Any] = {}
    for case, text in CASES.items():
        worker = object.__new__(loop.RewardLoopWorker)
        worker.config = SimpleNamespace(reward=SimpleNamespace(reward_model=model))
        worker.reward_router_address = server

        async def rendered(_: Any, text: str = text) -> str:
            return text

        worker._preprocess_reward_inputs = rendered
        try:
            told[case] = asyncio.run(worker.compute_score_disrm(None))
        except Exception as error:
            told[case] = f"{type(error).__name__} {getattr(error, 'status', '')}"
    return told


def main() -> None:
    folder, server, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    for name in EMPTY:
        sys.modules[name] = MagicMock(name=name)
    sys.modules["openrlhf.utils.logging_utils"] = MagicMock(init_logger=logging.getLogger)
    sys.modules["client"] = ModuleType("client")
    sys.modules["client"].__path__ = []
    sleep = asyncio.sleep
    asyncio.sleep = lambda seconds, *_: sleep(min(seconds, 0.01))  # type: ignore[assignment]
    told: dict[str, Any] = {}
    for name, ask in (
        ("openrlhf", lambda: by_openrlhf(folder, server)),
        ("verl", lambda: by_verl(folder, server, "vllm")),
        ("verl with sglang", lambda: by_verl(folder, server, "sglang")),
    ):
        try:
            told[name] = ask()
        except Exception:
            told[name] = traceback.format_exc()
    out.write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main()
