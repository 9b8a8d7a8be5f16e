"""Supervised fine-tuning: maximise the likelihood of given texts.

    L = - sum over learned tokens of log pi(y_t | y_<t) / number of learned tokens

The number counts the tokens of all micro-batches of all ranks, so a batch may be cut in any way. Strings are
learned from their second token on, of {"prompt", "completion"} pairs the completion; an eos token ends each.

Legend: B samples, T tokens (padded right).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conch.checkpoint import save_model
from conch.cli import load_run_config, run_main
from conch.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    SchedulerConfig,
    Section,
    TokenizerConfig,
    TrackingConfig,
    TrainConfig,
)
from conch.data.files import read_rows
from conch.data.samples import TokenBatch, TokenizedSample, collate, tokenize_samples
from conch.data.stream import IndexStream
from conch.engine import Engine
from conch.errors import ConfigError
from conch.experience import take_rows
from conch.models.loading import context_window, freeze_trunk
from conch.ops import logprobs_of_labels, masked_sum, position_ids
from conch.tracking import Tracker
from conch.trainers.common import (
    check_vocabulary,
    evaluating,
    given_or_loaded_lm,
    given_or_loaded_tokenizer,
    rows_per_process,
    update_metrics,
)
from conch.trainers.run import fit, start_run
from conch.types import Metrics

Sample = str | Mapping[str, str]


class SFTConfig(Section):
    """The algorithm's own settings."""

    batch_size: int = Field(default=32, ge=1)
    """Samples per optimizer update, over all processes."""


class SFTRunConfig(Section):
    """Everything an SFT run is made from."""

    model: ModelConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    sft: SFTConfig = SFTConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    tracking: TrackingConfig = TrackingConfig()


class SFTTrainer:
    """SFT with the verbs `experience` (texts to a batch) and `update`.

    Raises:
        ConchError: from the constructor, for everything that can be known to be wrong before training.
    """

    def __init__(
        self,
        config: SFTRunConfig,
        *,
        samples: Sequence[Sample],
        eval_samples: Sequence[Sample] | None = None,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.config = config
        self.engine = engine = Engine(config.train)
        self.tokenizer = given_or_loaded_tokenizer(tokenizer, config.tokenizer, config.model.path)
        self.lm = given_or_loaded_lm(model, config.model).to(engine.device)  # pyright: ignore[reportArgumentType]
        check_vocabulary(self.lm, self.tokenizer)
        freeze_trunk(self.lm, config.model.num_layers_unfrozen)
        window = context_window(self.lm.config)
        self.samples = tokenize_samples(samples, self.tokenizer, max_tokens=window)
        self.eval_samples = (
            tokenize_samples(eval_samples, self.tokenizer, max_tokens=window) if eval_samples else []
        )
        self._rows = rows_per_process(engine, config.train, config.sft.batch_size, "sft.batch_size")
        self.stream = IndexStream(len(self.samples), config.train.seed, engine.rank, engine.num_ranks)
        engine.prepare(self.lm, config.optimizer, config.scheduler, total_updates=config.train.total_steps)
        engine.seed_sampling()
        self.run = start_run(self, self.lm)
        self.run_dir = self.run.folder

    def experience(self, samples: Sequence[TokenizedSample]) -> TokenBatch:
        """Pad samples into a batch."""
        return collate(samples, int(self.tokenizer.pad_token_id), self.engine.device)  # pyright: ignore[reportArgumentType]

    def update(self, batch: TokenBatch) -> Metrics:
        """One optimizer update."""
        num_tokens = self.engine.sum(batch.loss_mask[:, 1:].sum()).clamp(min=1).float()
        micro_batches = torch.arange(len(batch.input_ids)).chunk(
            self.config.train.gradient_accumulation_steps
        )
        report = self.engine.update(
            micro_batches,
            lambda rows: token_loss_sum(self.engine.module, take_rows(batch, rows)) / num_tokens,
        )
        return {
            "train/loss": report.loss,
            **update_metrics([report]),
            "train/epoch": self.stream.epoch,
        }

    def step(self) -> Metrics:
        """Draw a batch and train on it."""
        return self.update(self.experience([self.samples[row] for row in self.stream.draw(self._rows)]))

    def evaluate(self, tracker: Tracker | None = None, step: int = 0) -> Metrics:
        """Negative log-likelihood in nats per learned token of the held-out samples; nothing without any."""
        mine = self.eval_samples[self.engine.rank :: self.engine.num_ranks]
        totals = torch.zeros(2, device=self.engine.device)
        with evaluating(self.lm):
            for start in range(0, len(mine), self._rows):
                batch = self.experience(mine[start : start + self._rows])
                loss = token_loss_sum(self.lm, batch)
                totals += torch.stack([loss, batch.loss_mask[:, 1:].sum().to(loss.dtype)])
        totals = self.engine.sum(totals)
        return {"eval/loss": float(totals[0] / totals[1])} if self.eval_samples else {}

    @property
    def default_best_metric(self) -> str:
        """The metric that decides which checkpoint is best."""
        return "eval/loss"

    def fit(self) -> Path:
        """Train for `train.total_steps` optimizer updates; returns the run folder."""
        return fit(self, "sft")

    def save_pretrained(self, folder: Path) -> Path:
        """Write the model as a Hugging Face folder. Call it on all ranks."""
        self.engine.together(
            lambda: save_model(folder, self.lm, self.tokenizer) if self.engine.is_main else None
        )
        return folder

    def state_dict(self) -> dict[str, Any]:
        """See `conch.trainers.run.Trainer`."""
        return {"stream": self.stream.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.stream.load_state_dict(state["stream"])

    def close(self) -> None:
        """Leave the process group."""
        self.engine.close()


def token_loss_sum(lm: torch.nn.Module, batch: TokenBatch) -> Float[Tensor, ""]:
    """Summed negative log-likelihood of the learned tokens; the first token of a sample is never learned."""
    output = lm(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask.long(),
        position_ids=position_ids(batch.attention_mask),
        use_cache=False,
    )
    logprobs = logprobs_of_labels(output.logits[:, :-1], batch.input_ids[:, 1:])
    return -masked_sum(logprobs, batch.loss_mask[:, 1:])


def main(argv: Sequence[str]) -> None:
    """Command line: `python -m conch.trainers.sft key=value ...` with samples from `data.train`."""
    config = load_run_config(SFTRunConfig, argv, default_name="sft")
    if config.data.train is None:
        raise ConfigError("no samples: set `data.train` to a .txt or .jsonl file")
    eval_samples = read_rows(config.data.eval) if config.data.eval else None
    trainer = SFTTrainer(config, samples=read_rows(config.data.train), eval_samples=eval_samples)
    try:
        trainer.fit()
    finally:
        trainer.close()


if __name__ == "__main__":
    run_main(main)
