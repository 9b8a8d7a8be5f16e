"""Train a reward model: regression on scores, or Bradley-Terry on preference pairs.

    regression    L = mean_i (s(x_i) - y_i)^2
    pairs         L = - mean_i log sigmoid(s(chosen_i) - s(rejected_i))   (Bradley & Terry 1952)

s reads the hidden state of a text's last real token through a linear head that starts as N(0, 1/(d+1))
without bias (Stiennon et al. 2020, appendix B). A text is formatted by `reward_model.template` first, with
the eos token at its end by default. The mean and standard deviation of s on the evaluation texts (the
training texts where there are none) are saved with the model, for whoever wants normalised rewards.

The saved folder is what `to_triton` converts: Hugging Face weights, tokenizer, and `reward_model.json`.

Legend: B texts or pairs, T tokens (padded right).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedTokenizerBase

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
from conch.data.stream import IndexStream
from conch.engine import Engine
from conch.errors import ConfigError, DataError, ModelError
from conch.experience import take_rows
from conch.models.loading import context_window, freeze_trunk, load_sequence_classifier
from conch.tracking import Tracker
from conch.trainers.common import (
    check_vocabulary,
    evaluating,
    given_or_loaded_tokenizer,
    rows_per_process,
    update_metrics,
)
from conch.trainers.run import fit, start_run
from conch.types import DEFAULT_OBJECTIVE, Metrics

METADATA_FILE = "reward_model.json"


class RewardModelConfig(Section):
    """The algorithm's own settings."""

    batch_size: int = Field(default=64, ge=1)
    """Texts or pairs per optimizer update, over all processes."""

    template: str = "{text}{eos}"
    """How a text is presented to the model; {text} is prompt and output, {eos} the eos token."""

    max_length: int | None = Field(default=None, ge=2)
    """Longest formatted text in tokens; None takes the model's window."""

    @field_validator("template")
    @classmethod
    def _has_text(cls, template: str) -> str:
        try:
            formatted = template.format(text="\0", eos="")
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"only {{text}} and {{eos}} can stand in braces ({error})") from error
        if "\0" not in formatted:
            raise ValueError("the template must contain {text}")
        return template


class RewardModelRunConfig(Section):
    """Everything a reward-model run is made from."""

    model: ModelConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    tracking: TrackingConfig = TrackingConfig()


@dataclass(frozen=True)
class Texts:
    """input_ids [B, T]; attention_mask [B, T], True at real tokens."""

    input_ids: Int[Tensor, "B T"]
    attention_mask: Bool[Tensor, "B T"]


@dataclass(frozen=True)
class ScoredTexts:
    """Texts with the scores [B] they should get."""

    texts: Texts
    targets: Float[Tensor, " B"]


@dataclass(frozen=True)
class Pairs:
    """Preferences: of each pair, text 0 is preferred to text 1.

    input_ids [B, 2, T]; attention_mask [B, 2, T], True at real tokens.
    """

    input_ids: Int[Tensor, "B 2 T"]
    attention_mask: Bool[Tensor, "B 2 T"]


# --------------------------------------------------------------------------------------------- pure functions


def scores_of(model: torch.nn.Module, texts: Texts) -> Float[Tensor, " B"]:
    """One float32 score per text."""
    output = model(input_ids=texts.input_ids, attention_mask=texts.attention_mask.long())
    return output.logits.float().squeeze(-1)


def scores_and_loss(
    model: torch.nn.Module, batch: ScoredTexts | Pairs
) -> tuple[Float[Tensor, "B K"], Float[Tensor, ""]]:
    """Scores of each row's one text or two, and the summed squared error or negative log-likelihood.

    The two of a pair go through one forward pass: DDP allows a single one per backward.
    """
    if isinstance(batch, ScoredTexts):
        scores = scores_of(model, batch.texts)
        return scores.unsqueeze(1), ((scores - batch.targets) ** 2).sum()
    flat = Texts(batch.input_ids.flatten(0, 1), batch.attention_mask.flatten(0, 1))
    pairs = scores_of(model, flat).unflatten(0, (-1, 2))
    return pairs, -logsigmoid(pairs[:, 0] - pairs[:, 1]).sum()


def rank_correlation(left: Sequence[float], right: Sequence[float]) -> float:
    """Spearman's rho, with average ranks for ties; 0 where one side does not vary."""
    x, y = _ranks(left), _ranks(right)
    if x.std() == 0 or y.std() == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


# ---------------------------------------------------------------------------------------------------- trainer


class RewardModelTrainer:
    """Reward modelling with the verbs `experience` (rows to a batch) and `update`.

    samples: all {"text", "score"} rows (regression) or all {"chosen", "rejected"} rows (pairs); a string
        is a whole sample, prompt and output.

    Raises:
        ConchError: from the constructor, for everything that can be known to be wrong before training.
    """

    def __init__(
        self,
        config: RewardModelRunConfig,
        *,
        samples: Sequence[Mapping[str, Any]],
        eval_samples: Sequence[Mapping[str, Any]] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.config = config
        self.engine = Engine(config.train)
        self.tokenizer = given_or_loaded_tokenizer(tokenizer, config.tokenizer, config.model.path)
        if self.tokenizer.pad_token_id == self.tokenizer.eos_token_id:
            raise ModelError(
                "the tokenizer's pad and eos are one token: a reward model reads its score at the last token "
                "that is not padding, so an eos would be skipped; set `tokenizer.pad_token` to another token"
            )
        self._kind = check_rows(samples)
        if eval_samples and check_rows(eval_samples) is not self._kind:
            raise DataError(
                "training and evaluation rows are of different kinds: scores in one, pairs in the other"
            )
        self.samples, self.eval_samples = samples, eval_samples or []
        self._init_model()
        self.run = start_run(self, self.model)
        self.run_dir = self.run.folder

    def _init_model(self) -> None:
        config, engine = self.config, self.engine
        self.model = load_sequence_classifier(
            config.model,
            num_labels=1,
            pad_token_id=int(self.tokenizer.pad_token_id),  # pyright: ignore[reportArgumentType]
        ).to(engine.device)  # pyright: ignore[reportArgumentType]
        freeze_trunk(self.model, config.model.num_layers_unfrozen)
        head = getattr(self.model, "score", None) or getattr(self.model, "classifier", None)
        if head is not None:
            head.requires_grad_(True)
        check_vocabulary(self.model, self.tokenizer)
        self.max_length = config.reward_model.max_length or context_window(self.model.config)
        total = config.reward_model.batch_size
        self._rows = rows_per_process(engine, config.train, total, "reward_model.batch_size")
        self.stream = IndexStream(len(self.samples), config.train.seed, engine.rank, engine.num_ranks)
        engine.prepare(self.model, config.optimizer, config.scheduler, total_updates=config.train.total_steps)
        engine.seed_sampling()

    def experience(self, samples: Sequence[Mapping[str, Any]]) -> ScoredTexts | Pairs:
        """Format, tokenise and pad rows."""
        if self._kind is ScoredTexts:
            targets = torch.tensor([float(row["score"]) for row in samples], device=self.engine.device)
            return ScoredTexts(self._tokenize([row["text"] for row in samples]), targets)
        flat = self._tokenize([text for row in samples for text in (row["chosen"], row["rejected"])])
        return Pairs(flat.input_ids.unflatten(0, (-1, 2)), flat.attention_mask.unflatten(0, (-1, 2)))

    def update(self, batch: ScoredTexts | Pairs) -> Metrics:
        """One optimizer update."""
        num_rows = self.engine.sum(torch.tensor(float(self._rows), device=self.engine.device))
        micro_batches = torch.arange(self._rows).chunk(self.config.train.gradient_accumulation_steps)
        report = self.engine.update(
            micro_batches,
            lambda rows: scores_and_loss(self.engine.module, take_rows(batch, rows))[1] / num_rows,
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
        """Held-out loss, and Spearman's rank correlation or the pairs' accuracy; nothing without rows."""
        if not self.eval_samples:
            return {}
        mine = self.eval_samples[self.engine.rank :: self.engine.num_ranks]
        predicted: list[list[float]] = []
        loss = torch.zeros((), device=self.engine.device)
        with evaluating(self.model):
            for start in range(0, len(mine), self._rows):
                batch = self.experience(mine[start : start + self._rows])
                scores, batch_loss = scores_and_loss(self.model, batch)
                predicted += scores.tolist()
                loss += batch_loss
        predicted = self.engine.gather(predicted)
        metrics = {"eval/loss": float(self.engine.sum(loss)) / len(self.eval_samples)}
        if self._kind is Pairs:
            right = [chosen > rejected for chosen, rejected in predicted]
            return {**metrics, "eval/accuracy": sum(right) / len(right)}
        wanted = self.engine.gather([float(row["score"]) for row in mine])
        return {**metrics, "eval/spearman": rank_correlation([score for (score,) in predicted], wanted)}

    @property
    def default_best_metric(self) -> str:
        """The metric that decides which checkpoint is best."""
        return "eval/accuracy" if self._kind is Pairs else "eval/spearman"

    def fit(self) -> Path:
        """Train for `train.total_steps` optimizer updates; returns the run folder."""
        return fit(self, "reward_model")

    def save_pretrained(self, folder: Path) -> Path:
        """Write model, tokenizer and `reward_model.json`: what `to_triton` converts. Call it on all ranks."""
        mean, std = self._score_moments()
        metadata = {
            "template": self.config.reward_model.template,
            "pooling": "hf",
            "max_length": self.max_length,
            "reward_names": [DEFAULT_OBJECTIVE],
            "mean": mean,
            "std": std,
        }

        def write() -> None:
            if self.engine.is_main:
                save_model(folder, self.model, self.tokenizer, extra={METADATA_FILE: metadata})

        self.engine.together(write)
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

    def _score_moments(self) -> tuple[float, float]:
        """Mean and standard deviation of scores on at most 1,000 reference texts; the same on every rank."""
        rows = (self.eval_samples or self.samples)[:1000]
        texts = (
            [row["text"] for row in rows] if self._kind is ScoredTexts else [row["chosen"] for row in rows]
        )
        parts = [self._tokenize(texts[start : start + 256]) for start in range(0, len(texts), 256)]
        with evaluating(self.model):
            scores = torch.cat([scores_of(self.model, part) for part in parts])
        return float(scores.mean()), float(scores.std(correction=0))

    def _tokenize(self, texts: Sequence[str]) -> Texts:
        template, eos = self.config.reward_model.template, self.tokenizer.eos_token
        encoded = self.tokenizer(
            [template.format(text=text, eos=eos) for text in texts],
            padding=True,
            padding_side="right",
            truncation=self.max_length is not None,
            max_length=self.max_length,
            return_tensors="pt",
        ).to(self.engine.device)
        return Texts(encoded["input_ids"], encoded["attention_mask"].bool())


def check_rows(rows: Sequence[Any]) -> type[ScoredTexts] | type[Pairs]:
    """Which kind of rows these are, all being of one kind.

    Raises:
        DataError: there are none, a row has other keys, a text is no string, or a score no finite number.
    """
    if not rows:
        raise DataError("no rows to train a reward model on: give at least one")
    kind = ScoredTexts if isinstance(rows[0], Mapping) and "score" in rows[0] else Pairs
    texts = ("text",) if kind is ScoredTexts else ("chosen", "rejected")
    for index, row in enumerate(rows):
        for key in texts:
            if not isinstance(row, Mapping) or not isinstance(row.get(key), str):
                has = f"keys here: {', '.join(map(str, row))}" if isinstance(row, Mapping) else repr(row)
                raise DataError(
                    f'row {index} has no string "{key}": rows are all {{"text", "score"}} or all '
                    f'{{"chosen", "rejected"}} ({has})'
                )
        if kind is ScoredTexts and not _is_finite_number(row.get("score")):
            raise DataError(f"row {index}: its score {row.get('score')!r} is not a finite number")
    return kind


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and bool(np.isfinite(value))


def main(argv: Sequence[str]) -> None:
    """Command line: `python -m conch.trainers.reward_model key=value ...` with rows from `data.train`."""
    config = load_run_config(RewardModelRunConfig, argv, default_name="reward_model")
    if config.data.train is None:
        raise ConfigError("no rows: set `data.train` to a .jsonl file")
    eval_samples = read_rows(config.data.eval) if config.data.eval else None
    trainer = RewardModelTrainer(config, samples=read_rows(config.data.train), eval_samples=eval_samples)
    try:
        trainer.fit()
    finally:
        trainer.close()


if __name__ == "__main__":
    run_main(main)
