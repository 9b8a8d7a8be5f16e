"""Supervised fine-tuning: maximise the likelihood of given texts.

    L = - sum over learned tokens of log pi(y_t | y_<t) / number of learned tokens

The number counts the tokens of all micro-batches of all ranks, so a batch may be cut, padded and packed in
any way. Strings are learned from their second token on, of {"prompt", "completion"} pairs the completion, of
dialogues what the assistant says.

Legend: B rows of a micro-batch, T columns, R those that may be learned (the last R of T), V vocabulary.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is loaded, which help and mistyped keys do without
    from conch.training import run_program

    run_program("sft")

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conch.config import (
    DataConfig,
    GenerationConfig,
)
from conch.config.algorithms.sft import SFTConfig as SFTConfig
from conch.config.algorithms.sft import SFTRunConfig as SFTRunConfig
from conch.data.files import evaluation_rows, training_rows
from conch.data.formats import listed, sample_form
from conch.data.index_sampler import IndexStream, digest_of
from conch.data.packing import PackedBatch, collate_packed
from conch.data.samples import TokenBatch, TokenizedSample, collate, tokenize_samples
from conch.distributed.train_engine import TrainEngine
from conch.errors import ConfigError
from conch.evaluation.evaluator import Evaluator, eval_variants, longest_generation
from conch.evaluation.metrics import MetricFn
from conch.evaluation.watch import Evaluation
from conch.models.attention import check_packing, packed_logits
from conch.models.forward import ForwardInputs
from conch.models.freezing import freeze_layers
from conch.models.loading import context_window
from conch.models.policy import response_logits
from conch.ops import logprobs_of_labels, masked_sum
from conch.rewards.base import UserReward, sources_closed_on_failure
from conch.rewards.scorer import RewardScorer
from conch.rollouts.hf.engine import HFEngine
from conch.rollouts.prompts import tokenize_prompts
from conch.runs.tracking import Tracker
from conch.training import train
from conch.training.loop import fit
from conch.training.resume import start_run
from conch.training.setup import (
    check_gold,
    check_prompts,
    check_vocabulary,
    check_watching,
    eval_mode,
    eval_source,
    load_policy,
    load_policy_tokenizer,
    rows_per_process,
    save_on_main,
    text_codec,
    try_policy,
    watching_sources,
    with_gathered_weights,
)
from conch.training.statistics import update_metrics
from conch.types import Metrics

Sample = str | Mapping[str, Any] | Sequence[Mapping[str, Any]]


# --------------------------------------------------------------------------------------------------- the loss


def token_loss_sum(lm: PreTrainedModel, batch: TokenBatch) -> Float[Tensor, ""]:
    """Summed negative log-likelihood in nats of the learned tokens, of samples side by side or packed."""
    if isinstance(batch, PackedBatch):
        logits = packed_logits(lm, batch.input_ids, batch.position_ids)
    else:
        inputs = ForwardInputs(batch.input_ids, batch.attention_mask, batch.num_response)
        logits = response_logits(lm, inputs)
    return -masked_sum(logprobs_of_labels(logits, batch.response_ids), batch.loss_mask)


class TokenLoss(nn.Module):
    """A language model whose forward pass is `token_loss_sum`: DDP and DeepSpeed act in the forward pass of
    the module that they wrap, so all that is computed for the loss happens in there."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, batch: TokenBatch) -> Float[Tensor, ""]:
        """See `token_loss_sum`."""
        return token_loss_sum(self.lm, batch)


# ---------------------------------------------------------------------------------------------------- trainer


class SFTTrainer:
    """SFT with the verbs `experience` (texts to a batch) and `update`.

    samples: strings, {"prompt", "completion"} pairs, dialogues ({"messages": [{"role", "content"}, ...]} or
        the list itself), or what else docs/data.md has for SFT.
    eval_samples: held out, for the loss on them.
    eval_prompts: completed and measured in evaluations, by `metric_fn`, `reward` and `gold` where they are
        given.
    model: a loaded model with its tokenizer, instead of `config.model.path`.

    Raises:
        ConchError: from the constructor, for everything that can be known to be wrong before training.
    """

    @sources_closed_on_failure()
    def __init__(
        self,
        config: SFTRunConfig,
        *,
        samples: Iterable[Sample],
        eval_samples: Iterable[Sample] | None = None,
        eval_prompts: Sequence[str | Mapping[str, Any]] | None = None,
        reward: UserReward | Mapping[str, UserReward] | None = None,
        gold: UserReward | None = None,
        metric_fn: MetricFn | None = None,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.config = config
        self.engine = engine = TrainEngine(config.train)
        self.collectives = self.engine.collectives
        check_gold(config, reward, gold)
        if model is None:
            engine.check_weights(config.model)
        eval_prompts = listed(eval_prompts or [], "evaluation prompts", config.data)
        self.source = eval_source(self.collectives, reward, config.reward, eval_prompts, config.train)
        self.watching = watching_sources(self.collectives, config, eval_prompts, gold)
        self.tokenizer = load_policy_tokenizer(tokenizer, config.tokenizer, config.model.path)
        if config.sft.chat_template is not None:
            self.tokenizer.chat_template = read_chat_template(config.sft.chat_template)
        lm = load_policy(model, config.model, engine.precision)
        self.lm = lm.to(engine.device)  # pyright: ignore[reportArgumentType]
        check_vocabulary(self.lm, self.tokenizer)
        freeze_layers(self.lm, config.model)
        self.codec = text_codec(self.tokenizer, self.lm, config.tokenizer)
        try_policy(self.lm, self.codec, config.model, config.generation)
        self._init_data(samples, eval_samples)
        self._init_evaluation(eval_prompts, metric_fn)
        engine.prepare(
            TokenLoss(self.lm), config.optimizer, config.scheduler, total_updates=config.train.total_steps
        )
        engine.seed_sampling()
        self.run = start_run(self, self.lm)
        self.run_dir = self.run.folder

    def _init_data(self, samples: Iterable[Sample], eval_samples: Iterable[Sample] | None) -> None:
        config, ranks = self.config, self.collectives
        self._capacity = longest_sample(config.sft, self.lm)
        if config.sft.packing:
            with eval_mode(self.lm):
                check_packing(self.lm, self._capacity or 0)
        samples = listed(samples, "samples", config.data)
        self.samples = self._tokenized(samples, config.data)
        held_out = listed(eval_samples or [], "evaluation samples", config.data)
        self.eval_samples = self._tokenized(held_out) if held_out else []
        self._rows = rows_per_process(ranks, config.train, config.sft.batch_size, "sft.batch_size")
        self.stream = IndexStream(
            len(self.samples), config.train.seed, ranks.rank, ranks.num_ranks, digest_of(samples)
        )

    def _tokenized(
        self, samples: Iterable[Sample], lengths: DataConfig | None = None
    ) -> list[TokenizedSample]:
        return tokenize_samples(
            samples,
            self.codec,
            max_tokens=self._capacity,
            truncation_side=self.config.tokenizer.truncation_side,
            lengths=lengths,
        )

    def _init_evaluation(
        self, prompts: Sequence[str | Mapping[str, Any]], metric_fn: MetricFn | None
    ) -> None:
        config = self.config
        if not prompts and (metric_fn is not None or self.source is not None or self.watching):
            raise ConfigError(
                "`metric_fn`, `reward` and gold measure completions of `eval_prompts`: give some"
            )
        variants = eval_variants(config.generation, config.eval_generation)
        longest = longest_generation(variants)
        self.eval_prompts = (
            tokenize_prompts(prompts, self.codec, config.tokenizer, self.lm, longest) if prompts else []
        )
        check_prompts(self.collectives, self.source, self.eval_prompts, self.tokenizer)
        check_watching(self.collectives, self.watching, self.eval_prompts, self.tokenizer)
        agree = self.collectives.all_reduce_int
        self.scorer = RewardScorer(self.source, config.reward, agree) if self.source else None
        self.evaluator = Evaluator(
            self.collectives,
            self.eval_prompts,
            variants,
            self._make_sampler,
            config.train,
            scorer=self.scorer,
            metric_fn=metric_fn,
            watching=self.watching,
            keep=config.evaluation.keep,
        )

    def _make_sampler(self, generation: GenerationConfig) -> HFEngine:
        return HFEngine(
            lambda: self.lm,
            self.tokenizer,
            generation,
            version=lambda: self.run.step,
            autocast=self.engine.autocast,
        )

    # ------------------------------------------------------------------------------------------ the two verbs

    def experience(self, samples: Sequence[TokenizedSample]) -> list[TokenBatch]:
        """One batch per micro-batch, which all hold as many samples, laid out each on its own: however well
        they pack, no micro-batch is empty."""
        size = len(samples) // self.config.train.gradient_accumulation_steps
        return [self._laid_out(samples[start : start + size]) for start in range(0, len(samples), size)]

    def _laid_out(self, samples: Sequence[TokenizedSample]) -> TokenBatch:
        pad_id = int(self.tokenizer.pad_token_id)  # pyright: ignore[reportArgumentType]
        if self.config.sft.packing:
            assert self._capacity is not None
            return collate_packed(samples, pad_id, self._capacity, self.engine.device)
        return collate(samples, pad_id, self.engine.device)

    def update(self, batches: Sequence[TokenBatch]) -> Metrics:
        """One optimizer update from what `experience` gave."""
        counts = torch.tensor([_token_counts(batch) for batch in batches]).sum(dim=0)
        num_learned, num_real, num_all = self.collectives.all_reduce(counts).tolist()
        report = self.engine.update(batches, lambda batch: self.engine.module(batch) / max(num_learned, 1))
        return {
            "train/loss": report.loss,
            **update_metrics([report]),
            "train/padding_fraction": 1 - num_real / num_all,
            "train/epoch": self.stream.epoch,
        }

    # ----------------------------------------------------------------------------------------------- the loop

    def step(self) -> Metrics:
        """Draw a batch and train on it."""
        return self.update(self.experience([self.samples[row] for row in self.stream.draw(self._rows)]))

    @with_gathered_weights
    def evaluate(
        self, tracker: Tracker | None = None, step: int = 0, *, repeats: int | None = None
    ) -> Metrics:
        """Negative log-likelihood in nats per learned token of the held-out samples; means of the reward and
        of the user's metrics over `repeats` (or `train.eval_repeats`) completions per evaluation prompt.

        What was not given is left out.
        """
        metrics = {"eval/loss": self._eval_loss()} if self.eval_samples else {}
        if self.eval_prompts:
            metrics |= self.evaluator.run(tracker, step, repeats=repeats)
        return metrics

    def _eval_loss(self) -> float:
        own_samples = self.collectives.shard(self.eval_samples)
        size = self._rows // self.config.train.gradient_accumulation_steps
        totals = torch.zeros(2, dtype=torch.float64)
        with eval_mode(self.lm), self.engine.autocast():
            for start in range(0, len(own_samples), size):
                batch = self._laid_out(own_samples[start : start + size])
                loss = float(token_loss_sum(self.lm, batch))
                totals += torch.tensor([loss, int(batch.loss_mask.sum())], dtype=torch.float64)
        total, num_learned = self.collectives.all_reduce(totals).tolist()
        return total / num_learned

    @property
    def default_best_metric(self) -> str:
        """Gold where it is measured, else the first metric of the user's `metric_fn`, else the loss on
        held-out samples, else the reward."""
        return self.evaluator.best_metric or ("eval/loss" if self.eval_samples else "eval/reward")

    @property
    def evaluation(self) -> Evaluation | None:
        """What the latest evaluation measured, sample by sample; None without prompts to evaluate on."""
        return self.evaluator.latest

    def fit(self) -> Path:
        """Train for `train.total_steps` optimizer updates; returns the run folder."""
        return fit(self, "sft")

    @with_gathered_weights
    def generate(self, prompts: Sequence[str], *, greedy: bool = False) -> list[str]:
        """Completions of the current model."""
        config = self.config
        tokenized = tokenize_prompts(prompts, self.codec, config.tokenizer, self.lm, config.generation)
        chunks = self._make_sampler(config.generation).generate(tokenized, greedy=greedy)
        return [rollout.completion.text for chunk in chunks for rollout in chunk]

    @with_gathered_weights
    def save_pretrained(self, folder: Path) -> Path:
        """Write the model as a Hugging Face folder. Call it on all ranks."""
        return save_on_main(self.collectives, folder, self.lm, self.tokenizer, self.config.model)

    def state_dict(self) -> dict[str, Any]:
        """See `conch.training.loop.Trainer`."""
        return {"stream": self.stream.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.stream.load_state_dict(state["stream"])

    def close(self) -> None:
        """Stop the reward client and leave the process group."""
        if self.source is not None:
            self.source.close()
        self.evaluator.close()
        self.engine.close()


def _token_counts(batch: TokenBatch) -> tuple[int, int, int]:
    """Learned tokens, real tokens, and all columns of all rows."""
    real = batch.attention_mask
    return int(batch.loss_mask.sum()), int(real.sum()), real.numel()


def longest_sample(config: SFTConfig, lm: PreTrainedModel) -> int | None:
    """Tokens that a sample, or a row of packed samples, may have; None where nothing limits it.

    Raises:
        ConfigError: `sft.max_length` exceeds the model's window, or packing has no limit at all.
    """
    window, max_length = context_window(lm.config), config.max_length
    if max_length is not None and window is not None and max_length > window:
        raise ConfigError(f"`sft.max_length` = {max_length} exceeds the model's window of {window} tokens")
    if config.packing and max_length is None and window is None:
        raise ConfigError("`sft.packing` fills rows, and the model names no window: set `sft.max_length`")
    return max_length or window


def read_chat_template(path: Path) -> str:
    """The file's text.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"`sft.chat_template` = {path} cannot be read: {error}") from error


def run(config: SFTRunConfig) -> None:
    """Train with samples from `data.train`."""
    with closing(
        SFTTrainer(
            config,
            samples=training_rows(config.data, "samples", form=sample_form),
            eval_samples=evaluation_rows(config.data, form=sample_form),
        )
    ) as trainer:
        trainer.fit()


def main(argv: Sequence[str]) -> None:
    """Command line: `python -m conch.trainers.sft key=value ...`."""
    train("sft", argv)
