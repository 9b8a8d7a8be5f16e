"""Evaluation by sampling, shared by the trainers whose models write: a reward, the user's metrics, a table,
for each value of a swept generation argument."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from transformers import PreTrainedModel

from conch.config import (
    GOLD_METRIC,
    EvalGenerationConfig,
    GenerationConfig,
    OnlineRunConfig,
    TrainConfig,
    load,
)
from conch.data.prompts import fit_prompts, usable_prompts
from conch.data.text import TextCodec
from conch.distributed.collectives import Collectives
from conch.distributed.random_state import own_generators
from conch.errors import ConfigError
from conch.evaluation.metrics import MetricFn, mean_of_finite, metric_columns
from conch.evaluation.records import (
    GOLD,
    PROXY,
    EvaluatedSample,
    EvaluationRecord,
    number_or_none,
    record_path,
    write_record,
)
from conch.evaluation.sources import WatchingSource
from conch.evaluation.watch import (
    GOLD_COLUMN,
    LENGTH_COLUMN,
    VARIANCE_COLUMN,
    Evaluation,
    prompt_means,
    standard_error,
)
from conch.log import get_logger
from conch.rewards.base import RewardSource
from conch.rewards.combined import disagreement
from conch.rewards.scorer import RewardScorer, total_reward, weight_of
from conch.rollouts.prompts import longest_prompt
from conch.runs.tracking import Tracker
from conch.triton.contract import TEMPLATE_KWARGS, TOOLS
from conch.types import Metrics, Prompt, RewardResult, Rollout, RolloutEngine

_log = get_logger(__name__)

GenerationT = TypeVar("GenerationT", bound=GenerationConfig)
RowT = TypeVar("RowT")
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


def check_groups_of_evaluation(source: RewardSource, repeats: int) -> None:
    """See that a source which compares the completions of a prompt gets some to compare.

    repeats: completions of a prompt in an evaluation.

    Raises:
        ConfigError: it does not.
    """
    if source.needs_groups and repeats < 2:
        raise ConfigError(
            f"{source.name} compares the completions of one prompt with each other, and an evaluation "
            "samples one of each: set `train.eval_repeats` to 2 or more, or `train.eval_every=0` to make none"
        )


class Evaluator:
    """Samples completions of evaluation prompts on all ranks and measures them.

    make_sampler: gives an engine for a generation config.
    scorer: None measures without a reward.
    watching: sources by name that score the completions too, and are never learned from; what one of them
        does not score is counted and told, and stops nothing.
    keep: whether each evaluation of a run is kept in its folder; see `conch.evaluation.records`.
    config: for completions per prompt, deadlines and the run's seed. An evaluation draws from generators of
        its own, made from the seed, the step and the rank: it changes nothing that training draws later, and
        comes out the same however often there is one.
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
        keep: bool = True,
    ) -> None:
        self._collectives = collectives
        self._prompts = prompts
        self._samplers = [(variant, make_sampler(variant.generation)) for variant in variants]
        self._scorer = scorer
        self._metric_fn = metric_fn
        # Other ranks wait for this one no longer than `collective_timeout_s`.
        longest_wait_s = config.collective_timeout_s / 2
        self._watching = [
            WatchingSource(name, source, longest_wait_s) for name, source in (watching or {}).items()
        ]
        self._keep = keep
        self._config = config
        wanting_groups = [source for source in (watching or {}).values() if source.needs_groups]
        self._needs_groups = bool(wanting_groups) or (scorer is not None and scorer.needs_groups)
        if config.eval_every:
            self._check_groups(config.eval_repeats)
        self._user_metric: str | None = None
        self.latest: Evaluation | None = None
        """What the latest evaluation measured, of a sweep its last variant; None before the first."""

    @property
    def best_metric(self) -> str | None:
        """The metric that decides which checkpoint is best: gold, else the first of `metric_fn`, which is
        known after the first evaluation; None without either."""
        has_gold = any(source.name == GOLD for source in self._watching)
        return GOLD_METRIC if has_gold else self._user_metric

    def run(
        self,
        tracker: Tracker | None = None,
        step: int = 0,
        *,
        repeats: int | None = None,
        extra: Callable[[list[Rollout], Variant[Any]], Metrics] | None = None,
    ) -> Metrics:
        """Metrics `eval/<name>` of every variant; in a sweep those without a suffix are of its last value.

        tracker: of a run, for tables of samples, and for its folder, where the evaluation is kept.
        repeats: completions per prompt instead of the default.
        extra: measures this rank's rollouts of a variant, with collectives if it likes; gives metrics that
            are the same on all ranks.

        Raises:
            RewardError, DataError: on all ranks.
            ConfigError: on all ranks, where two figures have the same name.
        """
        repeats = repeats or self._config.eval_repeats
        self._check_groups(repeats)
        metrics: Metrics = {}
        results: Metrics = {}
        evaluations: list[Evaluation] = []
        with own_generators(_EVALUATION, self._config.seed, step, self._collectives.rank):
            own_places = self._own_places(repeats)
            own_prompts = [self._prompts[place // repeats] for place in own_places]
            places = self._collectives.all_gather([*own_places])
            order = sorted(range(len(places)), key=places.__getitem__)
            for variant, sampler in self._samplers:
                rollouts = self._sample(sampler, own_prompts, greedy=variant.greedy, repeats=repeats)
                for source in self._watching:
                    source.submit(rollouts, group_size=repeats)
                measured = extra(rollouts, variant) if extra is not None else {}
                samples = self._collect(rollouts, order)
                if tracker is not None:
                    tracker.table(f"eval{variant.suffix}", step, *samples.table())
                results = measured | self._metrics(samples, measured, repeats)
                evaluations.append(self._evaluation(samples, results, step, variant.suffix, repeats))
                metrics |= {f"{name}{variant.suffix}": value for name, value in results.items()}
        self.latest = evaluations[-1] if evaluations else None
        if tracker is not None and self._keep and self._collectives.is_main:
            _keep(tracker.run_dir, [each.record for each in evaluations])
        return metrics | results

    def close(self) -> None:
        """Close the sources that watch."""
        for source in self._watching:
            source.close()

    def _own_places(self, repeats: int) -> Sequence[int]:
        """This rank's places among all completions; whole prompts where a source compares their
        completions."""
        if not self._needs_groups:
            return self._collectives.shard(range(len(self._prompts) * repeats))
        own = self._collectives.shard(range(len(self._prompts)))
        return [prompt * repeats + repeat for prompt in own for repeat in range(repeats)]

    def _check_groups(self, repeats: int) -> None:
        sources = [source.source for source in self._watching]
        if self._scorer is not None:
            sources.append(self._scorer.source)
        for source in sources:
            check_groups_of_evaluation(source, repeats)

    def _sample(
        self, sampler: RolloutEngine, prompts: Sequence[Prompt], *, greedy: bool, repeats: int
    ) -> list[Rollout]:
        """Completions of this rank's prompts; the rewards that are learned from are under way."""
        if self._scorer is not None:
            return self._scorer.submit_each(sampler, prompts, greedy=greedy, group_size=repeats)
        return [rollout for chunk in sampler.generate(prompts, greedy=greedy) for rollout in chunk]

    def _collect(self, rollouts: list[Rollout], order: Sequence[int]) -> _Samples:
        """Wait for all scores, and put those of all ranks together in the order of the prompts.

        order: places of the samples among those of all ranks.
        """

        def gathered(rows: Sequence[RowT]) -> list[RowT]:
            everyone = self._collectives.all_gather([*rows])
            return [everyone[place] for place in order]

        columns: dict[str, list[float]] = {}
        members: list[Mapping[str, float | None]] = [{} for _ in order]
        variances: list[float] = []
        if self._scorer is not None:
            results = self._scorer.gather()
            weights = self._scorer.weights
            columns["reward"] = gathered([total_reward(result, weights) for result in results])
            members = gathered([member_totals(result, weights) for result in results])
            variances = gathered([_nan_for_none(disagreement(result)) for result in results])
            if self._scorer.measures_facts:
                facts = _columns(gathered([dict(result.facts) for result in results]))
                columns = _beside(columns, facts, "a fact of the reward's verifier")
        prices: Metrics = {}
        for source in self._watching:
            rows = gathered([watched_row(result) for result in source.gather()])
            column_of = {f"{source.name}/{key}": column for key, column in _columns(rows).items()}
            setting = "gold" if source.name == GOLD else f"verifier` = `{source.name}"
            columns = _beside(columns, column_of, f"`evaluation.{setting}`")
            if source.name == GOLD:
                price = self._collectives.all_gather([(float(source.requests), source.seconds)])
                requests, seconds = zip(*price, strict=True)
                prices = {"eval/gold/requests": sum(requests), "eval/gold/seconds": max(seconds)}
        rollouts = gathered(rollouts)
        of_user = metric_columns(self._metric_fn, rollouts)
        self._user_metric = next((f"eval/{name}" for name in of_user), None)
        return _Samples(rollouts, _beside(columns, of_user, "`metric_fn`"), members, variances, prices)

    def _metrics(self, samples: _Samples, measured: Metrics, repeats: int) -> Metrics:
        """Means over the samples, and what is made of them.

        measured: metrics that the trainer has added.

        Raises:
            ConfigError: two figures have the same name.
        """
        prompts = [place // repeats for place in range(len(samples.rollouts))]
        more = {**samples.prices, "eval/length_mean": mean_of_finite(samples.lengths)}
        for column, name in (("reward", "reward_standard_error"), (GOLD_COLUMN, "gold/standard_error")):
            if column in samples.columns:
                more[f"eval/{name}"] = standard_error(prompt_means(prompts, samples.columns[column]))
        if samples.variances is not None:
            more["eval/members_variance"] = mean_of_finite(samples.variances)
        if "eval/kl" in measured:
            more["eval/sqrt_kl"] = math.sqrt(max(measured["eval/kl"], 0.0))  # in this order NaN stays NaN
        means = {f"eval/{name}": mean_of_finite(column) for name, column in samples.columns.items()}
        if taken := sorted(means.keys() & (more | measured).keys()):
            raise ConfigError(
                f"`{taken[0]}` would be two figures, one of every evaluation and one of the reward's "
                "verifier or of `metric_fn`: give that one another name"
            )
        return more | means

    def _evaluation(
        self, samples: _Samples, metrics: Metrics, step: int, variant: str, repeats: int
    ) -> Evaluation:
        """One evaluation as it is kept, and as it is watched."""
        sources = {source.name: source.source_name for source in self._watching}
        if self._scorer is not None:
            sources = {PROXY: self._scorer.source_name, **sources}
        scores = {name: samples.columns["reward" if name == PROXY else f"{name}/reward"] for name in sources}
        rows = tuple(
            EvaluatedSample(
                place // repeats,
                _input(rollout.prompt),
                rollout.completion.text,
                len(rollout.completion.token_ids),
                {name: number_or_none(column[place]) for name, column in scores.items()},
                samples.members[place],
                kept_metadata(rollout.prompt),
            )
            for place, rollout in enumerate(samples.rollouts)
        )
        columns = {**samples.columns, LENGTH_COLUMN: samples.lengths}
        if samples.variances is not None:
            columns[VARIANCE_COLUMN] = samples.variances
        shown = {name: number_or_none(value) for name, value in metrics.items()}
        return Evaluation(EvaluationRecord(step, rows, shown, variant, sources), columns)


@dataclass(frozen=True)
class _Samples:
    """An evaluation's completions with their figures, of all ranks, in the order of the prompts.

    members: scores of an ensemble's members for each; empty without one.
    member_variances: of these scores, NaN where there are none.
    prices: metrics of what gold cost.
    """

    rollouts: list[Rollout]
    columns: dict[str, list[float]]
    members: list[Mapping[str, float | None]]
    member_variances: list[float]
    prices: Metrics

    @property
    def lengths(self) -> list[float]:
        """Tokens of each completion."""
        return [float(len(rollout.completion.token_ids)) for rollout in self.rollouts]

    @property
    def variances(self) -> list[float] | None:
        """Variance of each one's members, NaN where none scored it; None where there are no members."""
        return self.member_variances if any(self.members) else None

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Names and rows of the table of samples."""
        texts = [(rollout.prompt.text, rollout.completion.text) for rollout in self.rollouts]
        rows = [[*pair, *numbers] for pair, *numbers in zip(texts, *self.columns.values(), strict=True)]
        return ["prompt", "output", *self.columns], rows


def _keep(run_dir: Path, records: Sequence[EvaluationRecord]) -> None:
    """Write the records of one evaluation; a disk that takes none costs the record and not the run."""
    try:
        for record in records:
            write_record(record_path(run_dir, record.step, record.variant), record)
    except (OSError, TypeError, ValueError) as error:  # of the disk, or of what JSON has no form for
        _log.warning("the evaluation of step %d is not kept: %s", records[0].step, error)


def _input(prompt: Prompt) -> str | list[Mapping[str, Any]]:
    """A prompt as it is kept: its messages, or its text where messages hold what JSON has no form for."""
    if prompt.dialogue is None:
        return prompt.text
    messages: list[Mapping[str, Any]] = [dict(message) for message in prompt.dialogue.messages]
    try:
        json.dumps(messages)
    except (TypeError, ValueError):  # a picture, say
        return prompt.text
    return messages


def kept_metadata(prompt: Prompt) -> Mapping[str, Any]:
    """A prompt's extra keys, among them what its chat template reads beside the messages."""
    dialogue = prompt.dialogue
    if dialogue is None:
        return dict(prompt.metadata)
    tools = {} if dialogue.tools is None else {TOOLS: list(dialogue.tools)}
    variables = {TEMPLATE_KWARGS: dict(dialogue.template_kwargs)} if dialogue.template_kwargs else {}
    return {**prompt.metadata, **tools, **variables}


def _nan_for_none(value: float | None) -> float:
    return math.nan if value is None else value


def member_totals(result: RewardResult, weights: Mapping[str, float]) -> Mapping[str, float | None]:
    """Each member's own total score; of members with several objectives, the weighted sum of theirs.

    What is no number is None.
    """
    members = {name: number_or_none(score) for name, score in result.members.items()}
    parts: dict[str, dict[str, float | None]] = {}
    for name, score in members.items():
        member, _, objective = name.rpartition("/")
        parts.setdefault(member, {})[objective] = score
    if len(result.scores) < 2 or any(each.keys() != result.scores.keys() for each in parts.values()):
        return members
    return {
        member: None
        if None in each.values()
        else sum(weight_of(name, weights) * (score or 0.0) for name, score in each.items())
        for member, each in parts.items()
    }


def _columns(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """A column for each name, NaN where a row has nothing of it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name, math.nan) for row in rows] for name in names}


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


def watched_row(result: RewardResult) -> dict[str, float]:
    """Reward, its parts where there are several, facts, and whether it failed, of a source that watches."""
    parts = result.scores if len(result.scores) > 1 else {}
    return {
        "reward": total_reward(result, {}),
        **{f"reward/{name}": score for name, score in parts.items()},
        **result.facts,
        "failed_fraction": float(not result.ok),
    }
