"""Evaluation by sampling, shared by the trainers whose models write: a reward, the user's metrics, a table,
for each value of a swept generation argument."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from transformers import PreTrainedModel

from conch.config import EvalGenerationConfig, GenerationConfig, OnlineRunConfig, TrainConfig, load
from conch.data.prompts import fit_prompts, usable_prompts
from conch.data.text import TextCodec
from conch.distributed.collectives import Collectives
from conch.distributed.random_state import own_generators
from conch.errors import ConfigError
from conch.evaluation.metrics import MetricFn, mean_of_finite, metric_columns
from conch.log import get_logger
from conch.rewards.base import RewardSource
from conch.rewards.scorer import RewardScorer, total_reward
from conch.rollouts.prompts import longest_prompt
from conch.runs.tracking import Tracker
from conch.types import Metrics, Prompt, RewardResult, Rollout, RolloutEngine

_log = get_logger(__name__)

GenerationT = TypeVar("GenerationT", bound=GenerationConfig)
_NOT_GENERATION = "do_sample"
_EVALUATION = 1
"""Keeps an evaluation's seeds apart from those that data and training make of the same numbers."""


@dataclass(frozen=True)
class Variant(Generic[GenerationT]):
    """One way to generate that is evaluated. suffix: of its metrics, `@beta=100` in a sweep, else empty."""

    suffix: str
    generation: GenerationT
    greedy: bool


def eval_variants(base: GenerationT, over: EvalGenerationConfig) -> list[Variant[GenerationT]]:
    """`base` with what `over` sets, once for each value of the key that is a list.

    Raises:
        ConfigError: `over` holds a value that `base` would refuse.
    """
    settings = {name: value for name, value in over.model_dump().items() if value is not None}
    swept_key = next((name for name, value in settings.items() if isinstance(value, list)), None)
    if swept_key is None:
        return [_variant("", base, settings)]
    values = settings.pop(swept_key)
    return [
        _variant(f"@{swept_key}={_shown(value)}", base, {**settings, swept_key: value}) for value in values
    ]


def _shown(value: int | float) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"


def _variant(suffix: str, base: GenerationT, changed: Mapping[str, Any]) -> Variant[GenerationT]:
    generation = {name: value for name, value in changed.items() if name != _NOT_GENERATION}
    try:
        varied = load(type(base), {**base.model_dump(), **generation})
    except ConfigError as error:
        raise ConfigError(f"`eval_generation`: {error}") from None
    return Variant(suffix, varied, greedy=not changed.get(_NOT_GENERATION, True))


def longest_generation(variants: Sequence[Variant[GenerationT]]) -> GenerationT:
    """The one that leaves the least room for prompts."""
    return max((variant.generation for variant in variants), key=lambda each: each.max_new_tokens)


@dataclass(frozen=True)
class SampledPrompts(Generic[GenerationT]):
    """What a trainer samples from: prompts to learn from, prompts to evaluate on, and the ways to do that."""

    train: list[Prompt]
    evaluation: list[Prompt]
    variants: list[Variant[GenerationT]]


def sampled_prompts(
    config: OnlineRunConfig,
    codec: TextCodec,
    lm: PreTrainedModel,
    prompts: Sequence[str | Mapping[str, Any]],
    eval_prompts: Sequence[str | Mapping[str, Any]] | None,
) -> SampledPrompts[GenerationConfig]:
    """Prompts that leave room for a completion; without `eval_prompts`, those that are learned from are
    evaluated on.

    config: the run's, for its sections `generation`, `eval_generation`, `rollout`, `tokenizer` and `data`.

    Raises:
        ConfigError, DataError: see `longest_prompt`, `conch.data.prompts.make_prompts` and `eval_variants`.
    """
    variants = eval_variants(config.generation, config.eval_generation)
    max_model_len = config.rollout.max_model_len if config.rollout.engine in ("vllm", "ray") else None
    train_limit, eval_limit = (
        longest_prompt(lm, generation, max_model_len)
        for generation in (config.generation, longest_generation(variants))
    )
    usable = usable_prompts(prompts, codec, lengths=config.data)
    train = fit_prompts(usable, codec, config.tokenizer, max_tokens=train_limit)
    if eval_prompts is None and eval_limit == train_limit:
        return SampledPrompts(train, list(train), variants)
    evaluated = usable if eval_prompts is None else usable_prompts(eval_prompts, codec)
    evaluation = fit_prompts(evaluated, codec, config.tokenizer, max_tokens=eval_limit)
    return SampledPrompts(train, evaluation, variants)


class Evaluator:
    """Samples completions of evaluation prompts on all ranks and measures them.

    make_sampler: gives an engine for a generation config.
    scorer: None measures without a reward.
    watching: sources by name that score the completions too, and are never learned from; what one of them
        does not score is counted and told, and stops nothing.
    config: for completions per prompt and the run's seed. An evaluation draws from generators of its own,
        made from the seed, the step and the rank: it changes nothing that training draws later, and comes out
        the same however often there is one.
    """

    def __init__(
        self,
        collectives: Collectives,
        prompts: Sequence[Prompt],
        variants: Sequence[Variant[Any]],
        make_sampler: Callable[[Any], RolloutEngine],
        config: TrainConfig,
        *,
        scorer: RewardScorer | None,
        metric_fn: MetricFn | None,
        watching: Mapping[str, RewardSource] | None = None,
    ) -> None:
        self._collectives = collectives
        self._prompts = prompts
        self._samplers = [(variant, make_sampler(variant.generation)) for variant in variants]
        self._scorer = scorer
        self._metric_fn = metric_fn
        self._watching = watching or {}
        self._config = config
        self.gold_metric: str | None = None
        """The first metric of `metric_fn`, as `eval/<name>`; known after the first evaluation."""

    def run(
        self,
        tracker: Tracker | None = None,
        step: int = 0,
        *,
        repeats: int | None = None,
        extra: Callable[[list[Rollout], Variant[Any]], Metrics] | None = None,
    ) -> Metrics:
        """Metrics `eval/<name>` of every variant; in a sweep those without a suffix are of its last value.

        repeats: completions per prompt instead of the default.
        extra: measures this rank's rollouts of a variant, with collectives if it likes; gives metrics that
            are the same on all ranks.

        Raises:
            RewardError, DataError: on all ranks.
            ConfigError: on all ranks, where two figures have the same name.
        """
        prompts = [prompt for prompt in self._prompts for _ in range(repeats or self._config.eval_repeats)]
        own_prompts = self._collectives.shard(prompts)
        metrics: Metrics = {}
        results: Metrics = {}
        with own_generators(_EVALUATION, self._config.seed, step, self._collectives.rank):
            for variant, sampler in self._samplers:
                results = self._measure(variant, sampler, own_prompts, tracker, step, extra)
                metrics |= {f"{name}{variant.suffix}": value for name, value in results.items()}
        return metrics | results

    def _measure(
        self,
        variant: Variant[Any],
        sampler: RolloutEngine,
        prompts: Sequence[Prompt],
        tracker: Tracker | None,
        step: int,
        extra: Callable[[list[Rollout], Variant[Any]], Metrics] | None,
    ) -> Metrics:
        if self._scorer is not None:
            rollouts = self._scorer.submit_each(sampler, prompts, greedy=variant.greedy)
        else:
            chunks = sampler.generate(prompts, greedy=variant.greedy)
            rollouts = [rollout for chunk in chunks for rollout in chunk]
        watched = {name: source.submit(rollouts) for name, source in self._watching.items()}
        metrics = extra(rollouts, variant) if extra is not None else {}
        columns: dict[str, list[float]] = {}
        if self._scorer is not None:
            results = self._scorer.gather()
            values = [total_reward(result, self._scorer.weights) for result in results]
            columns["reward"] = self._collectives.all_gather(values)
            if self._scorer.measures_facts:
                facts = self._columns([result.facts for result in results])
                columns = _beside(columns, facts, "a fact of the reward's verifier")
        for name, future in watched.items():
            rows = [watched_row(result) for result in _told(name, future.result())]
            column_of = {f"{name}/{key}": column for key, column in self._columns(rows).items()}
            columns = _beside(columns, column_of, f"`evaluation.verifier` = {name}")
        rollouts = self._collectives.all_gather(rollouts)
        gold = metric_columns(self._metric_fn, rollouts)
        self.gold_metric = next((f"eval/{name}" for name in gold), None)
        columns = _beside(columns, gold, "`metric_fn`")
        if tracker is not None:
            texts = [(rollout.prompt.text, rollout.completion.text) for rollout in rollouts]
            rows = [[*pair, *numbers] for pair, *numbers in zip(texts, *columns.values(), strict=True)]
            tracker.table(f"eval{variant.suffix}", step, ["prompt", "output", *columns], rows)
        return metrics | {f"eval/{name}": mean_of_finite(column) for name, column in columns.items()}

    def close(self) -> None:
        """Close the sources that watch."""
        for source in self._watching.values():
            source.close()

    def _columns(self, rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
        """What all ranks have of each name, NaN where a row has nothing of it."""
        all_rows = self._collectives.all_gather([dict(row) for row in rows])
        names = dict.fromkeys(name for row in all_rows for name in row)
        return {name: [row.get(name, math.nan) for row in all_rows] for name in names}


def _beside(
    columns: Mapping[str, list[float]], more: Mapping[str, list[float]], whose: str
) -> dict[str, list[float]]:
    """All columns.

    Raises:
        ConfigError: one of `more` is called like another.
    """
    if taken := sorted(columns.keys() & more.keys()):
        raise ConfigError(
            f"`eval/{taken[0]}` would be two figures, of the reward and of {whose}: give the member of the "
            "reward, or the metric, another name"
        )
    return {**columns, **more}


def _told(name: str, results: Sequence[RewardResult]) -> Sequence[RewardResult]:
    """The results of a source that watches, once a warning has told of those that are none."""
    failed = [result for result in results if not result.ok]
    if failed:
        first = f"{failed[0].detail} ({failed[0].status.value})"
        told = "%s checked %d of %d completions of this process only; first: %s"
        _log.warning(told, name, len(results) - len(failed), len(results), first)
    return results


def watched_row(result: RewardResult) -> dict[str, float]:
    """Reward, its parts where there are several, facts, and whether it failed, of a source that watches."""
    parts = result.scores if len(result.scores) > 1 else {}
    return {
        "reward": total_reward(result, {}),
        **{f"reward/{name}": score for name, score in parts.items()},
        **result.facts,
        "failed_fraction": float(not result.ok),
    }
