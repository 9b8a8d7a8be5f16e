"""Learn to sort letters from a client in another process: from the checkout, in two terminals,

    python -m conch.service --api_key=default_key --output_dir outputs/service
    python -m examples.remote.alphabetical --api_key default_key

`fda>` is to be answered with `adf` and nothing more. The model that it starts from, a small GPT-2, has
learned that by SFT from people of whom one in four sorts right: the others swap two neighbours, or go on
writing. The client pays for letters in their right places, most for the whole answer, and less where there
is too much.

The lists that are measured on have letters that no list of training has together.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from conch.service.client import TrainingClient, TrainingSettings

LETTERS = "abcdefghijkl"
SHORTEST, LONGEST = 3, 6
_WINDOW = 2 * LONGEST + 6
_RIGHT, _SWAPPED = 0.25, 0.4
_HELD_OUT = 5
"""One set of letters in so many is held out."""

START = Path("outputs/alphabetical/start")


def lists(*, held_out: bool, seed: int, count: int) -> list[str]:
    """Prompts: letters in a random order, and `>`."""
    draw = random.Random(seed)
    sets = [
        letters
        for size in range(SHORTEST, LONGEST + 1)
        for letters in combinations(LETTERS, size)
        if (zlib.crc32("".join(letters).encode()) % _HELD_OUT == 0) is held_out
    ]
    return ["".join(draw.sample(letters, len(letters))) + ">" for letters in draw.choices(sets, k=count)]


def answer_of(prompt: str) -> str:
    """The letters of a prompt, sorted."""
    return "".join(sorted(prompt.removesuffix(">")))


def reward(prompts: Sequence[str], outputs: Sequence[str], **_: Any) -> list[float]:
    """1 for the sorted letters and nothing more; else half the share of places that are right."""
    return [_score(answer_of(prompt), output) for prompt, output in zip(prompts, outputs, strict=True)]


def _score(answer: str, output: str) -> float:
    if output == answer:
        return 1.0
    right = sum(ours == theirs for ours, theirs in zip(answer, output, strict=False))
    return 0.5 * right / max(len(answer), len(output))


def demonstrations(count: int, seed: int) -> list[dict[str, str]]:
    """What people answer, for SFT."""
    draw = random.Random(seed)
    return [
        {"prompt": prompt, "completion": _as_people_do(answer_of(prompt), draw)}
        for prompt in lists(held_out=False, seed=seed, count=count)
    ]


def _as_people_do(answer: str, draw: random.Random) -> str:
    luck = draw.random()
    if luck < _RIGHT:
        return answer
    if luck < _RIGHT + _SWAPPED:
        place = draw.randrange(len(answer) - 1)
        return answer[:place] + answer[place + 1] + answer[place] + answer[place + 2 :]
    return answer + "".join(draw.choices(LETTERS, k=draw.randint(1, 3)))


def make_start(folder: Path, seed: int = 0, *, steps: int = 800, batch: int = 64) -> Path:
    """Train the model that everything starts from, unless it is there."""
    if (folder / "config.json").exists():
        return folder
    from transformers import GPT2Config, GPT2LMHeadModel, set_seed

    from conch.config import load
    from conch.trainers.sft import SFTRunConfig, SFTTrainer
    from examples.letters import tokenizer_of

    tokenizer = tokenizer_of(LETTERS + ">", _WINDOW)
    set_seed(seed)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    shape = {"n_layer": 3, "n_embd": 96, "n_head": 4, "n_positions": _WINDOW, "vocab_size": len(tokenizer)}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**shape, **special, **no_dropout, bos_token_id=None))
    with tempfile.TemporaryDirectory() as run_dir:
        values = {
            "model": {"architecture": {"model_type": "gpt2"}},
            "generation": {"max_new_tokens": LONGEST + 4},
            "sft": {"batch_size": batch},
            "optimizer": {"learning_rate": 2e-3},
            "train": {"total_steps": steps, "eval_every": 0, "run_dir": Path(run_dir) / "run", "seed": seed},
        }
        samples = demonstrations(40_000, seed)
        trainer = SFTTrainer(load(SFTRunConfig, values), samples=samples, model=model, tokenizer=tokenizer)
        trainer.fit()
        folder.parent.mkdir(parents=True, exist_ok=True)
        trainer.save_pretrained(folder)
    return folder


def exact_share(folder: Path, count: int = 500) -> float:
    """The share of held-out lists that a model sorts, nothing more, in one sampled answer to each."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts = lists(held_out=True, seed=1, count=count)
    torch.manual_seed(0)
    rows = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    with torch.no_grad():
        ids = model.generate(
            **rows, do_sample=True, max_new_tokens=LONGEST + 4, pad_token_id=tokenizer.pad_token_id
        )
    outputs = tokenizer.batch_decode(ids[:, rows["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(score == 1.0 for score in reward(prompts, outputs)) / count


def settings_of(model: str, *, steps: int, seed: int) -> TrainingSettings:
    """A run of updates on 16 lists with 8 answers each. model: as the service finds it."""
    return TrainingSettings(
        model_id=model,
        max_completion_length=LONGEST + 4,
        num_completions_per_prompt=8,
        training_batch_size=16,
        learning_rate=5e-4,
        max_steps=steps,
        seed=seed,
        overrides={"grpo": {"kl": {"coef": 0.0}}, "scheduler": {"name": "constant"}},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: trains, and prints the share of exact answers before and behind it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the service")
    parser.add_argument("--api_key", help="None takes the environment variable CONCH_SERVICE_KEY")
    parser.add_argument("--model", type=Path, default=START, help="where the model of the start is, or goes")
    parser.add_argument("--steps", type=int, default=150, help="updates")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start-only", action="store_true", help="make the model of the start, and no more")
    options = parser.parse_args(argv)
    if options.start_only:
        make_start(options.model)
        return
    with TrainingClient(options.url, options.api_key) as client, tempfile.TemporaryDirectory() as folder:
        client.get_status()  # a wrong key or address is told before a model is trained for minutes
        start = make_start(options.model)
        print(f"exact at the start: {exact_share(start):.2f}", flush=True)
        client.train(
            reward=reward,
            prompts=lists(held_out=False, seed=options.seed, count=20_000),
            settings=settings_of(str(start.resolve()), steps=options.steps, seed=options.seed),
        )
        client.get_model(Path(folder) / "model.zip")
        with zipfile.ZipFile(Path(folder) / "model.zip") as files:
            files.extractall(Path(folder) / "model")
        print(f"exact at the end: {exact_share(Path(folder) / 'model'):.2f}")


if __name__ == "__main__":
    from conch.cli import run_main  # which needs more than clients have that import this

    run_main(main)
