"""Rejection fine-tuning: sample many completions per prompt, imitate the best of them, and again.

For each prompt x, completions y_1 .. y_n of the current policy have the scores s_1 .. s_n. Then, for steps
i = 0 .. I - 1 of a round (Dong et al. 2023, arXiv:2304.06767, which keeps the best one; Yuan et al. 2023,
arXiv:2308.01825, section 3.3, the distinct right ones; Gulcehre et al. 2023, arXiv:2308.08998, all above a
bar that rises over the improvement steps that follow one sampling):

    p_i  = start + (end - start) * i / (I - 1)
    keep   y_k with s_k >= the p_i-quantile of s_1 .. s_n, each distinct completion once
    L    = - sum over their tokens of log pi(y_t | x, y_<t) / number of these tokens

Where this differs from these papers: the bar is each prompt's own, so that hard prompts are learned from as
well as easy ones; the worst completions of a prompt are left out even where there are so many of them that
the quantile is among them; the model goes on from its current weights each time, not from the first ones.
The token ids learned are those sampled, at temperature 1 whatever temperature they were sampled at. Every
rank holds all completions of the round and learns its part of each batch.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is loaded, which help and mistyped keys do without
    from conch.training import run_program

    run_program("rft")

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from conch.config.algorithms.rft import RFTConfig as RFTConfig
from conch.config.algorithms.rft import RFTRunConfig as RFTRunConfig
from conch.data.index_sampler import IndexStream, digest_of
from conch.data.samples import TokenizedSample, collate
from conch.distributed.train_engine import UpdateReport
from conch.errors import ConfigError
from conch.log import get_logger
from conch.rewards.scorer import total_reward
from conch.trainers.sft import TokenLoss
from conch.training import train
from conch.training.online import OnlineTrainer, run_online
from conch.training.reward_shaping import agreed_objectives
from conch.training.setup import (
    rows_per_process,
)
from conch.training.statistics import log_rollouts, reward_metrics, timer, update_metrics
from conch.types import Metrics, RewardResult, Rollout

_log = get_logger(__name__)

_PROMPTS_PER_ROUND = 64


@dataclass(frozen=True, slots=True)
class Candidates:
    """A prompt and its scored completions, one or more: token ids as sampled, and one score for each."""

    prompt_ids: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    scores: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Selection:
    """Completions of one prompt that are learned.

    threshold: lowest score that let a completion in.
    scores: distinct completion -> its score.
    """

    prompt_ids: tuple[int, ...]
    threshold: float
    scores: Mapping[tuple[int, ...], float]

    def samples(self) -> list[TokenizedSample]:
        """Prompt and completion, of which the completion is learned."""
        unlearned = (False,) * len(self.prompt_ids)
        return [
            TokenizedSample((*self.prompt_ids, *ids), (*unlearned, *(True for _ in ids)))
            for ids in self.scores
        ]


# --------------------------------------------------------------------------------------------- pure functions


def percentile_at(step: int, config: RFTConfig) -> float:
    """p_i for step i = 0, 1, .. of a round."""
    rise = config.end_percentile - config.start_percentile
    return config.start_percentile + rise * step / max(1, config.n_improve_steps - 1)


def group_by_prompt(
    rows: Iterable[tuple[tuple[int, ...], str, tuple[int, ...], float]],
) -> list[Candidates]:
    """Rows of prompt ids, digest of the prompt's metadata, completion ids and score, by prompt; a score of
    NaN leaves its row out.

    Sorted, so that nothing depends on which rank sampled what. Prompts of the same tokens count as one if
    what the reward is told of them is the same: another answer that is looked for makes another prompt.
    """
    groups: dict[tuple[tuple[int, ...], str], list[tuple[tuple[int, ...], float]]] = {}
    for prompt_ids, metadata, completion_ids, score in rows:
        if not math.isnan(score):
            groups.setdefault((prompt_ids, metadata), []).append((completion_ids, score))
    candidates: list[Candidates] = []
    for prompt in sorted(groups):
        completions, scores = zip(*sorted(groups[prompt]), strict=True)
        candidates.append(Candidates(prompt[0], completions, scores))
    return candidates


def keep_best(candidates: Candidates, percentile: float, min_score: float | None) -> Selection:
    """The completions whose score is at least the `percentile` of their prompt's scores and `min_score`.

    Those with the lowest score are left out unless all score alike: where most of them do, the quantile is
    that very score and would let everything in. Of a completion sampled more than once the best score
    counts.
    """
    scores = candidates.scores
    threshold = float(np.quantile(scores, percentile))
    if threshold <= min(scores) < max(scores):
        threshold = min(score for score in scores if score > min(scores))
    if min_score is not None:
        threshold = max(threshold, min_score)
    in_order = sorted(zip(candidates.completions, scores, strict=True))
    kept = {ids: score for ids, score in in_order if score >= threshold}
    return Selection(candidates.prompt_ids, threshold, kept)


# ---------------------------------------------------------------------------------------------------- trainer


class RFTTrainer(OnlineTrainer[RFTRunConfig]):
    """RFT; see `OnlineTrainer` for what it is made from.

    A round's completions are sampled in its first step and learned from in all of its steps.
    """

    name = "rft"

    def plan_batches(self) -> None:
        config = self.config
        self._num_prompts = config.rft.prompts_per_round or min(_PROMPTS_PER_ROUND, len(self.prompts))
        if self._num_prompts > len(self.prompts):
            raise ConfigError(
                f"`rft.prompts_per_round` = {self._num_prompts} is more than the {len(self.prompts)} prompts "
                "given: take that many, or leave it out"
            )
        # Every rank draws the same prompts; `_start_round` deals their completions out.
        self.stream = IndexStream(len(self.prompts), config.train.seed, digest=self.digest)
        self._rows = rows_per_process(self.collectives, config.train, config.rft.batch_size, "rft.batch_size")

    def setup(self) -> TokenLoss:
        """The model with its loss; a round's candidates are part of what a resumed run takes up."""
        self.steps_done = 0
        self.pool: list[Candidates] = []
        self._objectives: list[str] = []
        return TokenLoss(self.lm)

    @property
    def group_size(self) -> int:
        return self.config.rft.n_generations_per_prompt

    @property
    def updates_per_step(self) -> int:
        return self.config.rft.updates_per_step

    @property
    def checkpointed(self) -> PreTrainedModel:
        return self.lm

    # ----------------------------------------------------------------------------------------------- one step

    def step(self) -> Metrics:
        """One selection with its updates; the first step of a round samples first."""
        sampled = self._start_round() if self._round_begins else {}
        seconds: dict[str, float] = {}
        with timer(seconds, "time/update_s"):
            learned = self.update(self.pool)
        self.steps_done += 1
        return {**sampled, **learned, **seconds}

    def _start_round(self) -> Metrics:
        """New prompts, and completions of the current policy for them."""
        repeats = self.config.rft.n_generations_per_prompt
        seconds: dict[str, float] = {}
        drawn = self.stream.draw(self._num_prompts)
        if self.scorer.needs_groups:  # which compares what is on one rank
            rows = [row for row in self.collectives.shard(drawn) for _ in range(repeats)]
        else:
            rows = self.collectives.shard([row for row in drawn for _ in range(repeats)])
        with timer(seconds, "time/rollout_s"):
            rollouts = self.rollout([self.prompts[row] for row in rows])
        with timer(seconds, "time/score_s"):
            rewards = self.score(rollouts)
        with timer(seconds, "time/experience_s"):
            self.pool, metrics = self.make_batch(rollouts, rewards)
            if self.config.tracking.rollouts:
                log_rollouts(self.collectives, self.run, rollouts, rewards)
        return {**metrics, **seconds}

    def make_batch(
        self, rollouts: Sequence[Rollout], rewards: Sequence[RewardResult]
    ) -> tuple[list[Candidates], Metrics]:
        """Scored completions of all ranks by prompt, the same on all ranks; and the step's statistics."""
        weights = self.config.reward.weights
        own = [
            (
                rollout.prompt.token_ids,
                digest_of([rollout.prompt.metadata]),
                rollout.completion,
                total_reward(reward, weights),
            )
            for rollout, reward in zip(rollouts, rewards, strict=True)
        ]
        rows = self.collectives.all_gather(own)
        lengths = [len(completion.token_ids) for *_, completion, _ in rows]
        cut = [completion.finish_reason == "length" for *_, completion, _ in rows]
        self._objectives = self._objectives or agreed_objectives(rewards, self.collectives)
        pool = group_by_prompt(
            (prompt, metadata, completion.token_ids, score) for prompt, metadata, completion, score in rows
        )
        metrics = {
            **self.scorer.metrics(),
            **reward_metrics(rewards, weights, self._objectives, self.collectives.all_reduce),
            **self.fact_metrics(rewards),
            "rollout/length_mean": sum(lengths) / len(rows),
            "rollout/truncated_fraction": sum(cut) / len(rows),
            "rft/pool_size": float(sum(len(candidates.scores) for candidates in pool)),
        }
        return pool, metrics

    def update(self, pool: Sequence[Candidates]) -> Metrics:
        """Keep the best completions, by the percentile of this step of the round, and learn them.

        Where none are kept, which is for `rft.min_score` or a reward that always fails to bring about, the
        weights stay as they are, and so does the learning rate's schedule.
        """
        config = self.config.rft
        percentile = percentile_at(self.steps_done % config.n_improve_steps, config)
        selections = [keep_best(candidates, percentile, config.min_score) for candidates in pool]
        samples = [sample for one in selections for sample in one.samples()]
        metrics = {"rft/percentile": percentile, **_selection_metrics(selections)}
        if not samples:
            _log.warning(
                "step %d learns nothing: no completion has a score%s",
                self.steps_done + 1,
                "" if config.min_score is None else f" of at least rft.min_score = {config.min_score:g}",
            )
            return metrics
        reports = self._learn(samples)
        self.policy_version += 1
        return {
            **metrics,
            "rft/passes": config.updates_per_step * config.batch_size / len(samples),
            "train/loss": sum(report.loss for report in reports) / len(reports),
            **update_metrics(reports),
        }

    def _learn(self, samples: Sequence[TokenizedSample]) -> list[UpdateReport]:
        """This step's updates, on batches of shuffled samples."""
        ranks = self.collectives
        # A seed of the step's own instead of a stream that would have to be saved.
        seed = np.random.SeedSequence([self.config.train.seed, self.steps_done]).generate_state(1)
        stream = IndexStream(len(samples), int(seed[0]), ranks.rank, ranks.num_ranks)
        return [
            self._update_batch([samples[row] for row in stream.draw(self._rows)])
            for _ in range(self.config.rft.updates_per_step)
        ]

    def _update_batch(self, samples: Sequence[TokenizedSample]) -> UpdateReport:
        """One optimizer update on this rank's part of a batch."""
        engine = self.engine
        pad_id = int(self.tokenizer.pad_token_id)  # pyright: ignore[reportArgumentType]
        num_tokens = max(1, self.collectives.all_reduce_int(sum(sum(sample.loss_mask) for sample in samples)))
        size = len(samples) // self.config.train.gradient_accumulation_steps
        return engine.update(
            [samples[start : start + size] for start in range(0, len(samples), size)],
            lambda part: engine.module(collate(part, pad_id, engine.device)) / num_tokens,
        )

    @property
    def _round_begins(self) -> bool:
        return self.steps_done % self.config.rft.n_improve_steps == 0

    def state_dict(self) -> dict[str, Any]:
        """See `conch.training.loop.Trainer`. Within a round it holds the ids of all of its completions."""
        pool = [] if self._round_begins else self.pool
        return {
            **super().state_dict(),
            "steps_done": self.steps_done,
            "objectives": self._objectives,
            "pool": [[one.prompt_ids, one.completions, one.scores] for one in pool],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        super().load_state_dict(state)
        self.steps_done = state["steps_done"]
        self._objectives = state["objectives"]
        self.pool = [
            Candidates(tuple(prompt), tuple(map(tuple, completions)), tuple(scores))
            for prompt, completions, scores in state["pool"]
        ]


def _selection_metrics(selections: Sequence[Selection]) -> Metrics:
    """How many completions are learned and how good they are; NaN where there are none to speak of."""
    scores = [score for one in selections for score in one.scores.values()]
    return {
        "rft/kept": float(len(scores)),
        "rft/kept_prompts": float(sum(bool(one.scores) for one in selections)),
        "rft/threshold_mean": _mean([one.threshold for one in selections]),
        "rft/kept_score_mean": _mean(scores),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def run(config: RFTRunConfig) -> None:
    """Train with prompts from `data.train`."""
    run_online(RFTTrainer, config)


def main(argv: Sequence[str]) -> None:
    """Command line: `python -m conch.trainers.rft key=value ...`."""
    train("rft", argv)
