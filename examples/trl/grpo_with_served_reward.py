"""GRPO by TRL, on a reward that Conch serves.

python grpo_with_served_reward.py --data rt-polarity.jsonl.gz --reward 127.0.0.1:8001/reviews
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

from tiny import model_of, reviews, tokenizer_of

from conch.interop.trl import reward_function

_OPENING_WORDS = 4


def main() -> None:
    """Command line: see `--help`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--data", type=Path, required=True, help="rows of JSON with a `text`, whose openings are prompts"
    )
    parser.add_argument("--reward", required=True, help="host:port/model, or what else docs/trl.md names")
    parser.add_argument("--model", help="folder or hub id; without it a tiny model of random weights")
    parser.add_argument("--output", type=Path, default=Path("outputs/trl/grpo"))
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()

    reward = reward_function(options.reward)
    texts = [row["text"] for row in reviews(options.data)]
    datasets: Any = importlib.import_module("datasets")
    trl: Any = importlib.import_module("trl")
    prompts = dict.fromkeys(" ".join(text.split()[:_OPENING_WORDS]) for text in texts)
    tokenizer: Any = None if options.model else tokenizer_of(texts)
    settings: dict[str, Any] = (
        {} if options.model else {"learning_rate": 1e-3, "use_cpu": True, "bf16": False}
    )
    trainer = trl.GRPOTrainer(
        model=options.model or model_of("GPT2LMHeadModel", tokenizer),
        reward_funcs=reward,
        args=trl.GRPOConfig(
            str(options.output),
            max_steps=options.steps,
            per_device_train_batch_size=32,
            num_generations=8,
            max_completion_length=16,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            **settings,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer,
    )
    trainer.train()
    print(f"{reward.samples} samples, {reward.failed} of them without a reward")


if __name__ == "__main__":
    main()
