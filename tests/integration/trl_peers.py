"""TRL's trainers on rewards of Conch's, run by an environment that has TRL.

python trl_peers.py SPEC.json OUT.json PART ...

SPEC.json: `text` and `chat`, addresses of served models; `policy` and `chat_policy`, folders of language
    models; `pairs`, rows of a preference dataset; `texts`; `reward_base`, a classifier; `scratch`.
OUT.json: part -> what came of it, on the first process.

Of Conch it imports `conch.interop` alone, as a user of TRL does.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conch.interop.trl import reward_function, reward_functions

trl: Any = importlib.import_module("trl")
datasets: Any = importlib.import_module("datasets")

TEXTS = [{"prompt": prompt, "answer": prompt[::-1]} for prompt in ("ab", "cd", "ef", "gh")]
CHATS = [
    {"prompt": [{"role": "user", "content": text}], "answer": text} for text in ("one?", "two?", "3?", "4?")
]
CALLS: list[dict[str, str]] = []
SAMPLES: list[list[Any]] = []


def spy(**arguments: Any) -> list[float]:
    """A reward of nothing that notes what TRL calls it with."""
    CALLS.append({name: type(value).__name__ for name, value in arguments.items()})
    SAMPLES.extend(map(list, zip(arguments["prompts"], arguments["completions"], strict=True)))
    return [0.0] * len(arguments["prompts"])


def odd_ones(samples: Any, prompts: Any, outputs: Sequence[str], **columns: Any) -> list[float]:
    """NaN, which is no score, for every third of a batch."""
    return [float("nan") if index % 3 == 2 else float(index) for index in range(len(outputs))]


def two_goals(samples: Any, prompts: Any, outputs: Sequence[str], **columns: Any) -> dict[str, list[float]]:
    return {"long": [float(len(output)) for output in outputs], "calm": [-1.0] * len(outputs)}


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    """What all of the trainers' configurations are told."""
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "log_completions": True,
        "disable_tqdm": True,
        "model_init_kwargs": {"dtype": "float32"},
        **more,
    }


def online(
    trainer: Any, config: Any, model: str, rewards: Any, rows: Any, folder: Path, **more: Any
) -> dict[str, Any]:
    """Train, and return the log and the table of completions."""
    CALLS.clear()
    SAMPLES.clear()
    eval_rows = more.pop("eval_rows", None)
    dataset = datasets.Dataset.from_list(rows) if isinstance(rows, list) else rows
    run = trainer(
        model=model,
        reward_funcs=rewards,
        args=config(**settings(folder, **more)),
        train_dataset=dataset,
        eval_dataset=None if eval_rows is None else datasets.Dataset.from_list(eval_rows),
    )
    run.train()
    pandas: Any = importlib.import_module("pandas")
    tables = sorted((folder / "completions").glob("*.parquet"))
    rows = [
        row for table in tables for row in json.loads(pandas.read_parquet(table).to_json(orient="records"))
    ]
    return {
        "log": run.state.log_history,
        "completions": rows,
        "call": CALLS[0] if CALLS else None,
        "samples": SAMPLES[:],
    }


def grpo(spec: dict[str, Any], folder: Path) -> Any:
    """Texts, with evaluations between, whose loaders fork while the client is open."""
    rewards = [reward_function(spec["text"]), spy]
    more = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
    more |= {"eval_rows": TEXTS, "dataloader_num_workers": 1, "reward_weights": [1.0, 0.0]}
    return online(trl.GRPOTrainer, trl.GRPOConfig, spec["policy"], rewards, TEXTS, folder, **more)


def rloo(spec: dict[str, Any], folder: Path) -> Any:
    rewards = [reward_function(spec["text"]), spy]
    return online(trl.RLOOTrainer, trl.RLOOConfig, spec["policy"], rewards, TEXTS, folder)


def chat(spec: dict[str, Any], folder: Path) -> Any:
    rewards = [reward_function(spec["chat"]), spy]
    return online(trl.GRPOTrainer, trl.GRPOConfig, spec["chat_policy"], rewards, CHATS, folder)


def stream(spec: dict[str, Any], folder: Path) -> Any:
    """A dataset without length and without other columns."""
    rows = datasets.IterableDataset.from_generator(lambda: iter([{"prompt": "ab"}, {"prompt": "cd"}] * 20))
    reward = reward_function(spec["text"], sync=True)
    return online(trl.GRPOTrainer, trl.GRPOConfig, spec["policy"], reward, rows, folder)


def failing(spec: dict[str, Any], folder: Path) -> Any:
    reward = reward_function(odd_ones)
    return online(trl.GRPOTrainer, trl.GRPOConfig, spec["policy"], reward, TEXTS, folder)


def failing_rloo(spec: dict[str, Any], folder: Path) -> Any:
    reward = reward_function(odd_ones)
    return online(trl.RLOOTrainer, trl.RLOOConfig, spec["policy"], reward, TEXTS, folder)


def objectives(spec: dict[str, Any], folder: Path) -> Any:
    rewards = reward_functions(["long", "calm"], two_goals)
    more = {"reward_weights": [1.0, 0.5]}
    return online(trl.GRPOTrainer, trl.GRPOConfig, spec["policy"], rewards, TEXTS, folder, **more)


def reward_trainer(spec: dict[str, Any], folder: Path) -> Any:
    """Train a reward model by TRL, and return what it says of some texts: as TRL scores them, and closed by
    the eos token, as it has learned from them."""
    torch: Any = importlib.import_module("torch")
    config = trl.RewardConfig(
        output_dir=str(folder / "run"),
        max_steps=3,
        per_device_train_batch_size=4,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        max_length=32,
    )
    trainer = trl.RewardTrainer(
        model=spec["reward_base"], args=config, train_dataset=datasets.Dataset.from_list(spec["pairs"])
    )
    trainer.train()
    trainer.save_model(str(folder / "model"))
    model, tokenizer = trainer.model.eval(), trainer.processing_class
    scores: dict[str, dict[str, float]] = {"open": {}, "closed": {}}
    for text in spec["texts"]:
        for form, read in (("open", text), ("closed", text + tokenizer.eos_token)):
            with torch.inference_mode():
                scores[form][text] = model(**tokenizer(read, return_tensors="pt")).logits.item()
    return {"folder": str(folder / "model"), "scores": scores}


PARTS = (grpo, rloo, chat, stream, failing, failing_rloo, objectives, reward_trainer)


def main() -> None:
    spec_file, out, *names = sys.argv[1:]
    spec = json.loads(Path(spec_file).read_text(encoding="utf-8"))
    parts = {part.__name__: part for part in PARTS}
    results = {name: parts[name](spec, Path(spec["scratch"]) / name) for name in names}
    accelerate: Any = importlib.import_module("accelerate")
    if accelerate.PartialState().is_main_process:
        Path(out).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
