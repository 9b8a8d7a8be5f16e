"""Train a reward model: regression on scores, or Bradley-Terry on preference pairs.

    regression    L = mean_ik (s_k(x_i) - y_ik)^2
    pairs         L = mean_i [ - log sigmoid(c_i - r_i - m_i) + center_coef * (c_i + r_i)^2 ]

c and r are the scores of a pair's chosen and rejected text (Bradley & Terry 1952). The margin m is a row's
own, 0 without one (Touvron et al. 2023, arXiv:2307.09288, equation 2). Centering keeps scores around 0, where
the first term alone leaves them anywhere (Eisenstein et al. 2023, arXiv:2312.09244). With several objectives
the model has one output k for each, and a pair is about one of them.

s reads the hidden state of a text's last real token through a linear head that starts as N(0, 1/(d+1))
without bias (Stiennon et al. 2020, appendix B). A text is put into `reward_model.template` first, with the
eos token at its end by default. Mean and standard deviation of s on reference texts are saved with the
model. With `reward_model.normalise`, for pairs alone since scores have a scale of their own, they are made 0
and 1: before training in the head, where it has no bias the deviation only, which is all that the first term
sees; afterwards by the server, for which any head will do.

The saved folder is what `to_triton` converts: Hugging Face weights, tokenizer, and `reward_model.json`.

Legend: B texts or pairs, K objectives, T tokens (padded right).
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is loaded, which help and mistyped keys do without
    from conch.training import run_program

    run_program("reward_model")

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conch.config.algorithms.reward_model import RewardModelConfig as RewardModelConfig
from conch.config.algorithms.reward_model import RewardModelRunConfig as RewardModelRunConfig
from conch.data.files import evaluation_rows, read_rows, training_rows
from conch.data.index_sampler import IndexStream, digest_of
from conch.data.preferences import (
    Judgement,
    Pairs,
    PreferencePair,
    ScoredText,
    ScoredTexts,
    TextEncoder,
    Texts,
    check_rows,
    check_texts,
    collate_judgements,
    collate_texts,
    hold_out,
    judgement,
    judgements,
    template_for,
)
from conch.data.rollout_batch import take_rows
from conch.distributed.train_engine import TrainEngine
from conch.errors import ConfigError, DataError, ModelError
from conch.evaluation.metrics import pair_metrics, score_metrics
from conch.log import get_logger
from conch.models.freezing import freeze_layers, freeze_unreached
from conch.models.kernels import check_kernels
from conch.models.loading import context_window, load_sequence_classifier
from conch.ops import at_least_float32
from conch.runs.tracking import Tracker
from conch.training import train
from conch.training.loop import fit
from conch.training.resume import start_run
from conch.training.setup import (
    check_vocabulary,
    eval_mode,
    load_policy_tokenizer,
    rows_per_process,
    save_on_main,
    with_gathered_weights,
)
from conch.training.statistics import update_metrics
from conch.training.trial import check_classifier
from conch.types import Metrics

_log = get_logger(__name__)

METADATA_FILE = "reward_model.json"

_NUM_REFERENCES = 1000
_FORWARD_ROWS = 64
_NO_LIMIT = 10**9
"""Tokenizers without a limit of their own say 10^30 or so."""


# --------------------------------------------------------------------------------------------- pure functions


def scores_of(model: nn.Module, texts: Texts) -> Float[Tensor, "B K"]:
    """One score per text and objective, in float32 at least."""
    scores = model(input_ids=texts.input_ids, attention_mask=texts.attention_mask.long()).logits
    return at_least_float32(scores)


def scores_and_loss(
    model: nn.Module, batch: ScoredTexts | Pairs, center_coef: float = 0.0
) -> tuple[Float[Tensor, "B N"], Float[Tensor, ""]]:
    """Scores of each row, and the loss summed over rows.

    Of a text the scores of all objectives, N = K; of a pair those of chosen and rejected, N = 2, by the
    objective that it is about. The two of a pair go through one forward pass: DDP allows a single one per
    backward.
    """
    if isinstance(batch, ScoredTexts):
        scores = scores_of(model, batch.texts)
        return scores, ((scores - batch.targets) ** 2).mean(dim=1).sum()
    flat = Texts(batch.input_ids.flatten(0, 1), batch.attention_mask.flatten(0, 1))
    outputs = scores_of(model, flat).unflatten(0, (-1, 2))
    pairs = outputs.take_along_dim(batch.objectives[:, None, None], dim=2).squeeze(2)
    return pairs, pair_losses(pairs, batch.margins, center_coef).sum()


def pair_losses(
    pairs: Float[Tensor, "B 2"], margins: Float[Tensor, " B"], center_coef: float
) -> Float[Tensor, " B"]:
    """Negative log-likelihood in nats of each preference, with centering; see this module's docstring."""
    chosen, rejected = pairs.unbind(dim=1)
    return -logsigmoid(chosen - rejected - margins) + center_coef * (chosen + rejected) ** 2


def normalise_head(model: PreTrainedModel, mean: Sequence[float], std: Sequence[float]) -> None:
    """Rescale the head so that scores of this mean and standard deviation get mean 0, if it has a bias, and
    standard deviation 1; numbers per objective.

    Raises:
        ModelError: there is no linear head.
    """
    head = getattr(model, "score", None) or getattr(model, "classifier", None) or nn.Identity()
    linear = [module for module in head.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ModelError(f"{type(model).__name__} has no linear head: set `reward_model.normalise=false`")
    # Some heads have layers before the last; beside an adapter the trained copy comes last.
    weight, bias = linear[-1].weight, linear[-1].bias
    with torch.no_grad():
        scale = torch.tensor(std, dtype=weight.dtype, device=weight.device)
        weight.div_(scale.unsqueeze(1))
        if bias is not None:
            bias.sub_(torch.tensor(mean, dtype=bias.dtype, device=bias.device)).div_(scale)


# ---------------------------------------------------------------------------------------------------- trainer


class RewardModelTrainer:
    """Reward modelling with the verbs `experience` (rows to a batch) and `update`.

    samples: rows, all of one form (see `conch.data.preferences`).
    eval_samples: held-out rows of that form; None holds out `reward_model.eval_fraction` of the samples.
    reference: texts whose scores' mean and standard deviation are saved; None takes those of rows (see
        `reward_model.reference`).

    Raises:
        ConchError: from the constructor, for everything that can be known to be wrong before training.
    """

    def __init__(
        self,
        config: RewardModelRunConfig,
        *,
        samples: Iterable[Mapping[str, Any]],
        eval_samples: Iterable[Mapping[str, Any]] | None = None,
        reference: Sequence[Any] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.config = config
        self.engine = TrainEngine(config.train)
        self.collectives = self.engine.collectives
        self.engine.check_weights(config.model)
        self.scorer = None
        samples = judgements(samples, config=config.data)
        self._digest = digest_of(samples)
        if eval_samples is not None:
            eval_samples = judgements(eval_samples, what="evaluation row", config=config.data)
        self._check_input(samples, eval_samples, reference)
        if not config.tokenizer.add_special_tokens:
            raise ConfigError(
                "`tokenizer.add_special_tokens=false` is for policies: a served reward model adds what its "
                "tokenizer adds, so it has to learn with them; take the post-processor out of tokenizer.json"
            )
        self.tokenizer = load_policy_tokenizer(
            tokenizer, config.tokenizer, config.model.path, reward_model=True
        )
        if self.tokenizer.pad_token_id == self.tokenizer.eos_token_id:
            raise ModelError(
                "the tokenizer's pad and eos are one token: a reward model reads its score at the last token "
                "that is not padding, so an eos would be skipped; set `tokenizer.pad_token` to another token"
            )
        self._load_model()
        self._tokenize(samples, eval_samples or [], reference)
        if config.reward_model.normalise:
            normalise_head(self.model, *self._varied_moments())
        self._init_training()
        self.run = start_run(self, self.model)
        self.run_dir = self.run.folder

    def _check_input(
        self, samples: Sequence[Any], eval_samples: Sequence[Any] | None, reference: Sequence[Any] | None
    ) -> None:
        self.form = check_rows(samples)
        if eval_samples:
            check_rows(eval_samples, like=self.form, what="evaluation row")
        if reference is not None:
            check_texts(reference)
        if self.config.reward_model.normalise and not self.form.compares:
            raise ConfigError(
                "`reward_model.normalise` is for preference pairs: these rows have scores, whose scale the "
                "model is to learn; leave it off, or normalise when the model is converted"
            )

    def _load_model(self) -> None:
        config = self.config
        self.rng_seed = config.train.seed if (seed := config.reward_model.rng_seed) is None else seed
        torch.manual_seed(self.rng_seed)
        check_kernels(config.model, self.engine.precision)
        model = load_sequence_classifier(
            config.model,
            num_labels=len(self.form.reward_names),
            pad_token_id=self._pad_token_id,
        )
        freeze_layers(model, config.model)
        check_vocabulary(model, self.tokenizer)
        self.model = model.to(self.engine.device)  # pyright: ignore[reportArgumentType]
        freeze_unreached(self.model)
        check_classifier(self.model, config.model)

    def _tokenize(
        self,
        samples: Sequence[Mapping[str, Any]],
        eval_samples: Sequence[Mapping[str, Any]],
        reference: Sequence[Any] | None,
    ) -> None:
        """Set `samples`, `eval_samples` and the reference texts."""
        settings = self.config.reward_model
        self.template = settings.template or template_for(samples, self.form, self.tokenizer)
        self.max_length = longest_text(settings.max_length, self.model, self.tokenizer)
        encoder = TextEncoder(self.tokenizer, self.template, self.max_length)
        self.samples = encoder.encode_rows(samples, self.form, self.config.data)
        self.eval_samples = encoder.encode_rows(eval_samples, self.form)
        if not eval_samples and settings.eval_fraction:
            self.samples, self.eval_samples = hold_out(
                self.samples, settings.eval_fraction, self.config.train.seed
            )
            _log.info(
                "%d of %d rows are held out for evaluation (`reward_model.eval_fraction` = %g)",
                *(len(self.eval_samples), len(self.samples) + len(self.eval_samples), settings.eval_fraction),
            )
        if reference is None:
            rows = (self.eval_samples or self.samples)[:_NUM_REFERENCES]
            self._reference = [
                row.chosen if isinstance(row, PreferencePair) else row.token_ids for row in rows
            ]
        else:
            self._reference = encoder.encode(reference)
        encoder.report_cuts()

    def _init_training(self) -> None:
        config, engine = self.config, self.engine
        total = config.reward_model.batch_size
        ranks = self.collectives
        self._rows = rows_per_process(ranks, config.train, total, "reward_model.batch_size")
        self.stream = IndexStream(len(self.samples), self.rng_seed, ranks.rank, ranks.num_ranks, self._digest)
        engine.prepare(self.model, config.optimizer, config.scheduler, total_updates=config.train.total_steps)
        engine.seed_sampling()

    @property
    def _pad_token_id(self) -> int:
        return int(self.tokenizer.pad_token_id)  # pyright: ignore[reportArgumentType]

    def experience(self, samples: Sequence[Judgement]) -> ScoredTexts | Pairs:
        """Pad rows into a batch."""
        return collate_judgements(samples, self._pad_token_id, self.engine.device)

    def update(self, batch: ScoredTexts | Pairs) -> Metrics:
        """One optimizer update."""
        num_rows = self.collectives.all_reduce(torch.tensor(float(self._rows), device=self.engine.device))
        micro_batches = torch.arange(self._rows).chunk(self.config.train.gradient_accumulation_steps)
        center_coef = self.config.reward_model.center_coef
        report = self.engine.update(
            micro_batches,
            lambda rows: (
                scores_and_loss(self.engine.module, take_rows(batch, rows), center_coef)[1] / num_rows
            ),
        )
        return {
            "train/loss": report.loss,
            **update_metrics([report]),
            "train/epoch": self.stream.epoch,
        }

    def step(self) -> Metrics:
        """Draw a batch and train on it."""
        return self.update(self.experience([self.samples[row] for row in self.stream.draw(self._rows)]))

    @with_gathered_weights
    def evaluate(self, tracker: Tracker | None = None, step: int = 0) -> Metrics:
        """Held-out loss, with Spearman's rank correlation or the pairs' accuracy and calibration; nothing
        without rows."""
        if not self.eval_samples:
            return {}
        own_samples = self.collectives.shard(self.eval_samples)
        found: list[list[float]] = []
        loss = torch.zeros((), device=self.engine.device)
        with eval_mode(self.model):
            for batch in map(self.experience, _chunks(own_samples, self._rows)):
                scores, batch_loss = scores_and_loss(self.model, batch, self.config.reward_model.center_coef)
                found += scores.tolist()
                loss += batch_loss
        found = self.collectives.all_gather(found)
        metrics = {"eval/loss": float(self.collectives.all_reduce(loss)) / len(self.eval_samples)}
        names = self.form.reward_names
        if self.form.compares:
            about = self.collectives.all_gather(
                [row.objective for row in own_samples if isinstance(row, PreferencePair)]
            )
            return metrics | pair_metrics(found, about, names)
        targets = self.collectives.all_gather(
            [row.scores for row in own_samples if isinstance(row, ScoredText)]
        )
        return metrics | score_metrics(found, targets, names)

    @property
    def default_best_metric(self) -> str:
        """The metric that decides which checkpoint is best."""
        return "eval/accuracy" if self.form.compares else "eval/spearman"

    @property
    def evaluation(self) -> None:
        """None: nothing is sampled."""
        return None

    def fit(self) -> Path:
        """Train for `train.total_steps` optimizer updates; returns the run folder."""
        return fit(self, "reward_model")

    @with_gathered_weights
    def moments(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of the scores of the reference texts, each per objective; the same on
        every rank. Call it on all."""
        own_rows = self.collectives.shard(self._reference)
        columns: list[list[float]] = []
        with eval_mode(self.model):
            for rows in _chunks(own_rows, _FORWARD_ROWS):
                texts = collate_texts(rows, self._pad_token_id, self.engine.device)
                columns += scores_of(self.model, texts).tolist()
        scores = np.array(self.collectives.all_gather(columns))
        return scores.mean(axis=0).tolist(), scores.std(axis=0).tolist()

    def _varied_moments(self) -> tuple[list[float], list[float]]:
        mean, std = self.moments()
        if not vary(mean, std):
            raise DataError(
                f"`reward_model.normalise`: the scores of the {len(self._reference)} reference texts do not "
                f"vary (mean {mean}): give texts that differ"
            )
        return mean, std

    @with_gathered_weights
    def save_pretrained(self, folder: Path) -> Path:
        """Write model, tokenizer and `reward_model.json`: what `to_triton` converts. Call it on all ranks."""
        mean, std = self.moments()
        known = vary(mean, std)
        metadata = {
            "template": self.template,
            "pooling": "hf",
            "max_length": self.max_length,
            "reward_names": list(self.form.reward_names),
            "mean": _one_or_all(mean) if known else None,
            "std": _one_or_all(std) if known else None,
            "normalise": self.config.reward_model.normalise,
            "rng_seed": self.rng_seed,
        }
        extra = {METADATA_FILE: metadata}
        return save_on_main(
            self.collectives, folder, self.model, self.tokenizer, self.config.model, extra=extra
        )

    def state_dict(self) -> dict[str, Any]:
        """See `conch.training.loop.Trainer`."""
        return {"stream": self.stream.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.stream.load_state_dict(state["stream"])

    def close(self) -> None:
        """Leave the process group."""
        self.engine.close()


def longest_text(
    max_length: int | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> int | None:
    """Longest text in tokens: `max_length`, else what model and tokenizer take; None where neither says.

    Raises:
        ConfigError: the model's window is shorter than `max_length`.
    """
    window = context_window(model.config)
    if max_length is not None and window is not None and max_length > window:
        raise ConfigError(f"`reward_model.max_length` is {max_length}, the model's window {window} tokens")
    limits = [limit for limit in (window, tokenizer.model_max_length) if limit and limit < _NO_LIMIT]
    return max_length or min(limits, default=None)


def vary(mean: Sequence[float], std: Sequence[float]) -> bool:
    """Whether scores of this mean and standard deviation differ by more than float32 rounds them."""
    return all(deviation > 1e-5 * abs(middle) for middle, deviation in zip(mean, std, strict=True))


def _one_or_all(values: list[float]) -> float | list[float]:
    return values[0] if len(values) == 1 else values


def _chunks(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def run(config: RewardModelRunConfig) -> None:
    """Train with rows from `data.train`."""
    reference = read_rows(config.reward_model.reference) if config.reward_model.reference else None
    with closing(
        RewardModelTrainer(
            config,
            samples=training_rows(config.data, "rows", form=judgement),
            eval_samples=evaluation_rows(config.data, form=judgement),
            reference=reference,
        )
    ) as trainer:
        trainer.fit()


def main(argv: Sequence[str]) -> None:
    """Command line: `python -m conch.trainers.reward_model key=value ...`."""
    train("reward_model", argv)
