"""A reward model by TRL: a kind review is preferred to another one.

python reward_model.py --data rt-polarity.jsonl.gz --output outputs/trl/reviews
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

from tiny import model_of, reviews, tokenizer_of


def main() -> None:
    """Command line: see `--help`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="rows of JSON with `text` and `label`")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model")
    parser.add_argument("--model", help="folder or hub id; without it a tiny model of random weights")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()

    datasets: Any = importlib.import_module("datasets")
    trl: Any = importlib.import_module("trl")
    rows = reviews(options.data)
    kind, other = ([row["text"] for row in rows if row["label"] == label] for label in (1, 0))
    pairs = [{"chosen": good, "rejected": bad} for good, bad in zip(kind, other, strict=False)]
    tokenizer: Any = None if options.model else tokenizer_of([row["text"] for row in rows])
    model = options.model or model_of("GPT2ForSequenceClassification", tokenizer, num_labels=1)
    settings: dict[str, Any] = (
        {} if options.model else {"learning_rate": 1e-3, "use_cpu": True, "bf16": False}
    )
    trainer = trl.RewardTrainer(
        model=model,
        args=trl.RewardConfig(
            str(options.output),
            max_steps=options.steps,
            max_length=128,
            save_strategy="no",
            report_to=[],
            **settings,
        ),
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(options.output))


if __name__ == "__main__":
    main()
