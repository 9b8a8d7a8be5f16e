"""Start of every trainer: policy, tokenizer and reward opened and checked; batches cut; models saved."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conch.config import (
    GOLD_METRIC,
    EvaluationConfig,
    GenerationConfig,
    ModelConfig,
    OnlineRunConfig,
    RewardConfig,
    TokenizerConfig,
    TrainConfig,
)
from conch.data.files import place_of
from conch.data.formats import prompt_metadata
from conch.data.text import TextCodec, decode, lost_in_text, special_tokens
from conch.distributed.collectives import Collectives
from conch.errors import ConfigError, DataError, ModelError, RewardError, RewardUnavailableError
from conch.evaluation.evaluator import check_groups_of_evaluation
from conch.evaluation.records import GOLD
from conch.evaluation.watch import NO_GOLD
from conch.log import get_logger
from conch.models.freezing import freeze_unreached
from conch.models.kernels import apply_kernels, check_kernels
from conch.models.loading import (
    check_start_token,
    check_tokenizer,
    load_lm,
    load_tokenizer,
    make_ready,
    set_truncation_side,
    vocabulary_size,
)
from conch.models.padding import with_pad_token
from conch.rewards.base import RewardSource, UserReward
from conch.rewards.combined import DeltaReward, check_originals
from conch.rewards.factory import from_user, is_function_name, named_function, shared_reward
from conch.rollouts.stopping import StopCondition, with_end_ids
from conch.runs.checkpoint import save_model
from conch.training.resume import is_resumed
from conch.training.trial import check_language_model
from conch.types import Prompt

_log = get_logger(__name__)

_NUM_NAMED = 3

VerbT = TypeVar("VerbT", bound=Callable[..., Any])


def with_gathered_weights(verb: VerbT) -> VerbT:
    """A trainer's method that runs the model without training it: see `TrainEngine.gathered_weights`."""

    @functools.wraps(verb)
    def whole(trainer: Any, *args: Any, **settings: Any) -> Any:
        with trainer.engine.gathered_weights():
            return verb(trainer, *args, **settings)

    return whole  # pyright: ignore[reportReturnType]  the same signature


def check_deadlines(config: OnlineRunConfig, num_ranks: int) -> None:
    """Check that no rank gives up the others before one of them may give up what it waits for itself.

    Raises:
        ConfigError: `train.collective_timeout_s` is too short.
    """
    waits = {
        "rollout.deadline_s": config.rollout.deadline_s,
        "reward.client.deadline_s": config.reward.client.deadline_s,
        "reference.deadline_s": config.reference.deadline_s,
    }
    name = max(waits, key=waits.__getitem__)
    _check_wait(config.train, num_ranks, name, waits[name])


def _check_wait(train: TrainConfig, num_ranks: int, name: str, seconds: float) -> None:
    if num_ranks > 1 and train.collective_timeout_s <= seconds:
        raise ConfigError(
            f"`train.collective_timeout_s` = {train.collective_timeout_s:g} must exceed `{name}` = "
            f"{seconds:g}: while one process waits that long, the {num_ranks - 1} others wait for it"
        )


def _check_judges_wait(
    source: RewardSource, train: TrainConfig, num_ranks: int, name: str = "reward.judge.deadline_s"
) -> None:
    """Check that ranks wait for each other longer than a source with a deadline of its own may take."""
    if source.deadline_s is not None:
        _check_wait(train, num_ranks, name, source.deadline_s)


def load_policy(model: PreTrainedModel | None, config: ModelConfig, precision: str) -> PreTrainedModel:
    """The model that a user passed, with dropout and kernels as the config says, or the one that it names.

    precision: the mixed precision that it is trained in, see `TrainEngine.precision`.

    Raises:
        ModelError, ConfigError: see `load_lm` and `check_kernels`.
    """
    check_kernels(config, precision, model)
    if model is None:
        return load_lm(config)
    check_start_token(model.config)
    apply_kernels(model, config)
    make_ready(model, config)
    return model


def load_policy_tokenizer(
    tokenizer: PreTrainedTokenizerBase | None,
    config: TokenizerConfig,
    model_path: str | None,
    *,
    reward_model: bool = False,
) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer that a user passed, checked and set as the config says, or the one that the
    config names.

    reward_model: of a reward model, which must not pad with eos.

    Raises:
        ModelError: there is none, or its special tokens will not do.
    """
    if tokenizer is None:
        return load_tokenizer(config, model_path, reward_model=reward_model)
    name = tokenizer.name_or_path or type(tokenizer).__name__
    tokenizer = copy.deepcopy(tokenizer)  # the user's stays as it is
    tokenizer = with_pad_token(tokenizer, config.pad_token, name=name, reward_model=reward_model)
    check_tokenizer(tokenizer, name=name)
    set_truncation_side(tokenizer, config.truncation_side)
    return tokenizer


def text_codec(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, config: TokenizerConfig
) -> TextCodec:
    """What encodes a run's prompts and responses.

    Raises:
        ModelError: see `TextCodec`.
    """
    return TextCodec(
        tokenizer,
        encoder_decoder=bool(model.config.is_encoder_decoder),
        add_special_tokens=config.add_special_tokens,
    )


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer whose special tokens the model has no embeddings for.

    Raises:
        ModelError: names the token and both sizes.
    """
    known = vocabulary_size(model)
    for name, token_id in (("pad", tokenizer.pad_token_id), ("eos", tokenizer.eos_token_id)):
        if int(token_id) >= known:  # pyright: ignore[reportArgumentType]
            raise ModelError(
                f"the tokenizer's {name} token has id {token_id}, the vocabulary ends at {known - 1}; "
                "take the model's own tokenizer, or a `tokenizer.pad_token` of its vocabulary"
            )


def try_policy(
    lm: PreTrainedModel, codec: TextCodec, config: ModelConfig, generation: GenerationConfig
) -> None:
    """Freeze what no text reaches of a policy, and try it out; see `conch.training.trial`. Call it after
    `freeze_layers`, with `lm` on its device, on all ranks.

    Raises:
        ModelError: the architecture is not fit for training, with what to do.
    """
    freeze_unreached(lm)
    tokenizer = codec.tokenizer
    end_ids = StopCondition(tokenizer, with_end_ids(generation, lm, tokenizer)).end_ids
    check_language_model(lm, config, sorted(end_ids))
    if config.trial and (lost := lost_in_text(codec)) is not None:
        _log.warning(
            "the tokenizer does not give texts back as they were: rewards will read %r for %r "
            "(`model.trial=false` leaves this check out)",
            *reversed(lost),
        )


def rows_per_process(
    collectives: Collectives, train: TrainConfig, total: int, name: str, minibatches: int = 1
) -> int:
    """A process's part of `total` rows; see `rows_of_rank`.

    Raises:
        ConfigError: it does not come out whole.
    """
    return rows_of_rank(total, name, collectives.num_ranks, minibatches, train.gradient_accumulation_steps)


def rows_of_rank(total: int, name: str, ranks: int, minibatches: int, steps: int) -> int:
    """The one place where batches are cut: into ranks, these into minibatches, these into micro-batches.

    total: rows of a whole batch, the setting `name`, which begins with its section.
    steps: micro-batches of an update.

    Raises:
        ConfigError: it does not come out whole, with the numbers named, and the nearest that do.
    """
    unit = ranks * minibatches * steps
    if total % unit == 0:
        return total // ranks
    below = total - total % unit
    remedy = f"take {below} or {below + unit}" if below else f"take {unit}"
    if total % ranks:
        raise ConfigError(f"`{name}` = {total} does not divide among {ranks} processes: {remedy}")
    section = name.partition(".")[0]
    cut = f"`{section}.minibatches` = {minibatches} times " if minibatches > 1 else ""
    raise ConfigError(
        f"`{name}` = {total} gives each of {ranks} processes {total // ranks} rows, which do not divide into "
        f"{cut}`train.gradient_accumulation_steps` = {steps}: {remedy}"
    )


def save_on_main(
    collectives: Collectives,
    folder: Path,
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: ModelConfig,
    **beside: Any,
) -> Path:
    """Write a Hugging Face folder, on rank 0 alone; called on all ranks.

    beside: `heads` and `extra` of `conch.runs.checkpoint.save_model`.

    Raises:
        CheckpointError: it cannot be written; a DistributedError on the other ranks.
    """

    def write() -> None:
        if collectives.is_main:
            save_model(folder, lm, tokenizer, merge_adapter=config.merge_adapter, **beside)

    collectives.run_on_all_ranks(write)
    return folder


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Without gradient and without dropout."""
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(was_training)


def eval_source(
    collectives: Collectives,
    reward: UserReward | Mapping[str, UserReward] | None,
    config: RewardConfig,
    prompts: Sequence[str | Mapping[str, Any]] | None,
    train: TrainConfig,
) -> RewardSource | None:
    """Reward source for evaluation only (SFT, ILQL). None unless `reward` or `config` names one; the
    environment variable TRITON_HOST alone does not.

    Raises:
        ConfigError: `reward.delta` or `reward.dense` is set, or the source will not do, or may take longer
            than ranks wait.
        RewardError: it does not answer.
    """
    if config.delta or config.dense:
        name = "delta" if config.delta else "dense"
        raise ConfigError(f"`reward.{name}` is for rewards that are learned from; here they only measure")
    if not _is_named(reward, config):
        return None
    _check_wait(train, collectives.num_ranks, "reward.client.deadline_s", config.client.deadline_s)
    source = checked_source(collectives, reward, config, prompts or [])
    _check_judges_wait(source, train, collectives.num_ranks)
    return source


def _is_named(reward: UserReward | Mapping[str, UserReward] | None, config: RewardConfig) -> bool:
    """Whether the user gives a reward, other than by TRITON_HOST."""
    return reward is not None or config.replay is not None or bool(config.named_by)


def checked_source(
    collectives: Collectives,
    reward: UserReward | Mapping[str, UserReward] | None,
    config: RewardConfig,
    prompts: Sequence[str | Mapping[str, Any]],
    tokenizer: Callable[[], PreTrainedTokenizerBase] | None = None,
    *,
    may_be_away: bool = False,
) -> RewardSource:
    """The reward source as user and configuration name it, once it has answered every rank and read every
    prompt's row.

    tokenizer: gives the policy's, which `reward.dense` needs; called once samples are scored, so it may be
        loaded after the source is found good.
    may_be_away: a server that does not answer is a warning.

    Raises:
        ConfigError: the source will not do.
        RewardError: it does not answer.
        DataError: completions of a prompt cannot be scored, by what its row says or lacks.
    """
    to_text = None if tokenizer is None else lambda ids: decode(tokenizer(), ids)
    rows = [prompt_metadata(prompt) for prompt in prompts]
    keys = list(dict.fromkeys(key for row in rows if row is not None for key in row))
    sources: list[RewardSource] = []
    collectives.run_on_all_ranks(
        lambda: sources.append(
            from_user(reward, config, metadata_keys=keys, decode=to_text, rank=collectives.rank)
        )
    )
    (source,) = sources

    def check() -> None:
        try:
            source.check()
        except RewardUnavailableError as error:
            if not may_be_away:
                raise
            _log.warning("the run goes on without it until it is back: %s", error)

    collectives.run_on_all_ranks(check)
    names = [place_of(prompts, index, "prompt") for index in range(len(prompts))]
    collectives.run_on_all_ranks(lambda: _check_rows(source, zip(names, rows, strict=True)))
    return source


def _check_rows(source: RewardSource, rows: Iterable[tuple[str, Mapping[str, Any] | None]]) -> None:
    """See that the reward can read what it needs of each prompt's row, before long work starts.

    rows: each behind its place.

    Raises:
        DataError: names the first rows that it cannot.
    """
    problems: list[str] = []
    for place, row in rows:
        try:
            if row is not None:
                source.check_row(row)
        except DataError as error:
            problems.append(f"{place} {error}")
    if problems:
        more = f"; and {len(problems) - _NUM_NAMED} more" if len(problems) > _NUM_NAMED else ""
        raise DataError(f"{source.name} cannot check completions: {'; '.join(problems[:_NUM_NAMED])}{more}")


@runtime_checkable
class WatchedRunConfig(Protocol):
    """The sections of a run that evaluates with rewards."""

    @property
    def train(self) -> TrainConfig:
        """Its length and whether it goes on with another."""
        ...

    @property
    def reward(self) -> RewardConfig:
        """What is learned from, or measured with."""
        ...

    @property
    def evaluation(self) -> EvaluationConfig:
        """What watches."""
        ...


def watching_sources(
    collectives: Collectives,
    config: WatchedRunConfig,
    prompts: Sequence[str | Mapping[str, Any]],
    gold: UserReward | None,
) -> dict[str, RewardSource]:
    """What watches evaluations on these prompts without being learned from, by name.

    gold: what the user passed; None takes what the config names.

    Raises:
        ConfigError, DataError, RewardError: see `checked_source`; a gold server that is away is a warning
            where a run is resumed.
    """
    evaluation = config.evaluation
    sources: dict[str, RewardSource] = {}
    gold = evaluation.gold if gold is None else gold
    if gold is not None:
        sources[GOLD] = _gold_source(collectives, config, prompts, gold)
    if evaluation.verifier is not None:
        verifier = RewardConfig(
            verifier=evaluation.verifier, gsm8k=evaluation.gsm8k, ifeval=evaluation.ifeval
        )
        sources[evaluation.verifier] = checked_source(collectives, None, verifier, prompts)
    return sources


def check_gold(
    config: WatchedRunConfig,
    reward: UserReward | Mapping[str, UserReward] | None,
    gold: UserReward | None,
) -> None:
    """See, before anything is opened, that gold is another source than the reward, and there where a run
    stops by it.

    reward, gold: what the user passed; None takes what the config names.

    Raises:
        ConfigError: it is not.
    """
    gold = config.evaluation.gold if gold is None else gold
    if gold is None:
        if config.train.stop_rule is not None and config.train.stop_rule.metric == GOLD_METRIC:
            raise ConfigError(NO_GOLD)
        return
    if config.train.eval_every == 0:
        _log.warning("gold is never asked: it watches evaluations, and `train.eval_every` = 0 makes none")
    if not isinstance(config, OnlineRunConfig) and not _is_named(reward, config.reward):
        return
    member = shared_reward(gold, _gold_settings(config.evaluation), reward, config.reward)
    if member is not None:
        place = f"a member, `{member}`, of the reward" if member else "the reward"
        raise ConfigError(
            f"`evaluation.gold` is {place} that this run learns from: what a policy is trained to please "
            "cannot watch it; name another source, or leave gold out"
        )


def _gold_settings(evaluation: EvaluationConfig) -> RewardConfig:
    return RewardConfig(
        dialect=evaluation.gold_dialect,
        client=evaluation.gold_client,
        auth=evaluation.gold_auth,
        gsm8k=evaluation.gsm8k,
        ifeval=evaluation.ifeval,
    )


def _gold_source(
    collectives: Collectives,
    config: WatchedRunConfig,
    prompts: Sequence[str | Mapping[str, Any]],
    gold: UserReward,
) -> RewardSource:
    settings = _gold_settings(config.evaluation)
    if isinstance(gold, str):
        wait_s = settings.client.deadline_s
        _check_wait(config.train, collectives.num_ranks, "evaluation.gold_client.deadline_s", wait_s)
    resumed = collectives.broadcast(is_resumed(config.train) if collectives.is_main else False)
    loaded: list[UserReward] = []

    def load() -> None:
        if isinstance(gold, str) and is_function_name(gold):
            loaded.append(named_function(gold, "evaluation.gold"))
        else:
            loaded.append(gold)

    collectives.run_on_all_ranks(load)
    try:
        source = checked_source(collectives, loaded[0], settings, prompts, may_be_away=resumed)
    except (ConfigError, RewardError, DataError) as error:
        raise type(error)(f"gold: {error}") from error
    name = "deadline_s` of the judge in `evaluation.gold"
    _check_judges_wait(source, config.train, collectives.num_ranks, name)
    return source


def check_watching(
    collectives: Collectives,
    watching: Mapping[str, RewardSource],
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """See that what watches can read these prompts; see `check_prompts`."""
    for source in watching.values():
        check_prompts(collectives, source, prompts, tokenizer)


def check_prompts(
    collectives: Collectives,
    source: RewardSource | None,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """See that the reward can read these prompts, before long work starts.

    tokenizer: the policy's.

    Raises:
        ConfigError: it can not.
    """
    if source is not None:
        collectives.run_on_all_ranks(lambda: source.check_prompts(prompts, special_tokens(tokenizer)))


def less_originals(
    source: RewardSource,
    prompts: Sequence[str | Mapping[str, Any]],
    codec: TextCodec,
) -> RewardSource:
    """Rewards less those of each prompt's original output: `reward.delta`.

    Raises:
        DataError: a prompt has no original output.
    """
    check_originals(prompts)
    return DeltaReward(source, lambda prompt, text: codec.response_ids(prompt.text, prompt.token_ids, text))


def check_groups(source: RewardSource, config: OnlineRunConfig, group_size: int) -> None:
    """See, before long work, that a source which compares the completions of a prompt gets some to compare.

    group_size: completions of a prompt in a step of training.

    Raises:
        ConfigError: it does not.
    """
    if not source.needs_groups:
        return
    if group_size < 2:
        raise ConfigError(
            f"{source.name} compares the completions of one prompt with each other, and this trainer samples "
            "one of each: train with `grpo`, `async_grpo`, or `rft` with `rft.n_generations_per_prompt` of 2 "
            "or more"
        )
    if config.reward.delta and config.reward.replay is None:
        raise ConfigError(
            f"`reward.delta` takes off the score of one reference answer, and {source.name} has no score of "
            "a single answer: leave `reward.delta` out"
        )
    if config.train.eval_every:
        check_groups_of_evaluation(source, config.train.eval_repeats)


def open_reward(
    collectives: Collectives,
    reward: UserReward | Mapping[str, UserReward] | None,
    config: OnlineRunConfig,
    prompts: Sequence[str | Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase | None,
    group_size: int = 1,
) -> tuple[RewardSource, PreTrainedTokenizerBase]:
    """What a trainer learns from, once it has answered every rank, and the policy's tokenizer.

    config: the run's, for its sections `reward`, `tokenizer`, `model` and `train`.
    group_size: completions of a prompt that a source which wants groups gets together.

    Raises:
        ConchError: see `checked_source`, `load_policy_tokenizer` and `less_originals`.
        ConfigError: the source wants groups and there are none, or may take longer than ranks wait.
    """
    loaded: list[PreTrainedTokenizerBase] = []
    source = checked_source(collectives, reward, config.reward, prompts, lambda: loaded[0])
    check_groups(source, config, group_size)
    _check_judges_wait(source, config.train, collectives.num_ranks)
    loaded.append(load_policy_tokenizer(tokenizer, config.tokenizer, config.model.path))
    if config.reward.delta and config.reward.replay is None:  # what is recorded is the difference
        codec = TextCodec(loaded[0], add_special_tokens=config.tokenizer.add_special_tokens)
        source = less_originals(source, prompts, codec)
    return source, loaded[0]
