"""The scoring rules of a checkpoint: from the options, else `reward_model.json`, else the model's kind.

Each rule is checked against the network and the tokenizer; a contradiction is refused with its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from conch.converters.checkpoints.architectures import Network, final_layer
from conch.converters.checkpoints.files import REWARD_MODEL_FILE, RewardModelFile, Source
from conch.converters.checkpoints.kinds import Kind
from conch.converters.checkpoints.tokenizer import choose_template, reads_dialogues, shown_date
from conch.converters.options import Normalise, ReadOptions
from conch.data.chat import what_template_reads
from conch.errors import ConversionError
from conch.models.loading import context_window
from conch.store.manifest import Aggregate, Pooling, ScoreFunction, ScoringRules
from conch.triton.contract import Form

# Tokenizers without a limit of their own say 10^30 or so.
_NO_LIMIT = 10**9


def scoring_rules(
    source: Source, requested: ReadOptions, from_file: RewardModelFile, tokenizer: Any, network: Network
) -> tuple[ScoringRules, dict[str, str]]:
    """Decide how the network's outputs become scores.

    requested: wins over `from_file`.
    from_file: the checkpoint's `reward_model.json`.

    Returns:
        the rules, and what was decided: name -> value and where it comes from.

    Raises:
        ConversionError: settings contradict the model or each other.
    """
    kind, decided = network.kind, dict(network.kind.decisions)
    pooling, why = _pooling(source, requested, from_file.pooling, network)
    decided.setdefault("pooling", f"{pooling} ({why})")
    _check_granularity(source, requested, pooling, network)
    steps, aggregate = _steps(source, requested, pooling, tokenizer)
    function, why = _function_to_apply(source, requested, pooling, network)
    if pooling == "steps" or function != "none":
        decided["function"] = f"{function} ({why})"
    _refuse_product(source, aggregate, function)
    columns, reward_names = _rewards(
        source, from_file.reward_names, requested.rewards, network, pooling, function
    )
    template, why = choose_template(requested, from_file, tokenizer, pooling)
    decided["template"] = f"{template} ({why})"
    decided |= _told_of_recipe_and_date(requested, tokenizer)
    closing_token_id, why = _closing_token(source, requested, kind, tokenizer)
    if closing_token_id is not None:
        token = tokenizer.convert_ids_to_tokens(closing_token_id)
        decided["closing token"] = f"{token!r}, id {closing_token_id} ({why})"
    pad_token_id, why = _pad_token_id(source, requested, network, tokenizer)
    decided["pad token"] = f"{tokenizer.convert_ids_to_tokens(pad_token_id)!r}, id {pad_token_id} ({why})"
    mean, std, normalise = _normalising(source, requested, from_file, network, reward_names, columns)
    _check_normalise(source, normalise, mean, std, network, pooling, function)
    if mean is not None and std is not None:
        how = "not applied" if normalise == "none" else f"applied ({normalise})"
        decided["normalisation"] = f"mean {_short(mean)}, std {_short(std)}, {how}"
    if requested.add_special_tokens is not None:
        decided["special tokens"] = f"{requested.add_special_tokens} (--add_special_tokens)"
    rules = ScoringRules(
        template=template,
        **_of_dialogues(template, tokenizer),
        truncation_side=tokenizer.truncation_side,
        max_length=_max_length(source, requested.max_length or from_file.max_length, network, tokenizer),
        pooling=pooling,
        pooling_token_id=_pooling_token(source, requested, pooling, tokenizer),
        add_special_tokens=requested.add_special_tokens,
        closing_token_id=closing_token_id,
        head_activation=network.head.activation if network.head else None,
        function_to_apply=function,
        columns=columns,
        reward_names=reward_names,
        **steps,
        aggregate=aggregate,
        granularity=requested.granularity,
        normalise=normalise == "parameters",
        folded=normalise == "fold",
        mean=mean,
        std=std,
        pad_token_id=pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        vocab_size=_vocab_size(source, network, tokenizer, pad_token_id),
    )
    return rules, decided


def _told_of_recipe_and_date(requested: ReadOptions, tokenizer: Any) -> dict[str, str]:
    told = {"recipe": requested.recipe} if requested.recipe else {}
    day = shown_date(tokenizer)
    if day:
        of_today = "of the conversion; the chat template writes today's"
        told["date"] = f"{day} ({'--template_date' if requested.template_date else of_today})"
    return told


def _of_dialogues(template: str, tokenizer: Any) -> dict[str, Any]:
    """Return the rules on what a sample is, and in which form a chat template reads it."""
    if not reads_dialogues(template):
        return {"reads": "texts"}
    contents, arguments = what_template_reads(tokenizer) if tokenizer.chat_template else ({}, "")
    return {"reads": "dialogues", "contents": contents, "arguments": arguments or None}


def _refuse_product(source: Source, aggregate: Aggregate | None, function: ScoreFunction) -> None:
    if aggregate == "prod" and function == "none":
        raise ConversionError(
            f"{source.name} has scores that are no probabilities: a product of such means nothing; use min, "
            "mean or last, or --function_to_apply sigmoid if that is what the model was trained with"
        )


def _short(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def check_dense(rules: ScoringRules, tokenizer: Any, form: Form) -> None:
    """Raise ConversionError unless scores of steps or tokens have places in what a client sends.

    In the text form these are places in the client's own text, so the tokenizer must know from which
    characters a token was made, and the template must not end steps itself.
    """
    if rules.granularity == "sample":
        return
    if len(rules.reward_names) > 1:
        raise ConversionError(
            f"--granularity {rules.granularity} serves one reward, and these are "
            f"{', '.join(rules.reward_names)}: say with --reward which"
        )
    if form == "token":
        return
    if not tokenizer.is_fast:
        raise ConversionError(
            f"{type(tokenizer).__name__} does not tell which characters a token was made of, so "
            f"the score of a {rules.granularity} has no place in a text: use --form token"
        )
    if rules.reads == "dialogues":
        raise ConversionError(
            f"--granularity {rules.granularity} tells places in the client's text, and with the template "
            f"`{rules.template}` there is none: serve texts (--template '{{text}}'), or use --form token"
        )
    before, _, after = rules.template.partition("{text}")
    if after not in ("", "{eos}"):
        raise ConversionError(
            f"template {rules.template!r}: behind {{text}} only {{eos}} may stand with --granularity "
            f"{rules.granularity}, or the last score would be read in the template"
        )
    ids = tokenizer(before.format(eos=tokenizer.eos_token or "")).input_ids
    if rules.separator_id is not None and rules.separator_id in ids:
        raise ConversionError(
            f"template {rules.template!r} holds the step separator, which would end a step before the "
            "text begins: take it out, or use --form token"
        )


def _pooling(
    source: Source, requested: ReadOptions, from_file: Pooling | None, network: Network
) -> tuple[Pooling, str]:
    """Return the rule, and where it comes from."""
    chosen, why = requested.pooling or from_file, "--pooling" if requested.pooling else REWARD_MODEL_FILE
    if requested.pooling_token is not None and requested.pooling in (None, "token"):
        chosen, why = "token", "--pooling_token"
    if chosen is None or chosen == network.pooling:
        if chosen is None and network.pooling == "hf" and _has_no_pad(network):
            # Its own class reads the last token then, if it is asked for one sample at a time.
            return "last_token", "config.json has no pad token"
        return network.pooling, why if chosen else "default of this kind"
    if "steps" in (chosen, network.pooling):
        raise ConversionError(
            f"{source.name}: pooling {chosen!r} does not fit: process rewards (token classifiers, or what is "
            "converted with --step_separator) are read at the ends of their steps, and only they are"
        )
    if chosen == "hf":
        raise ConversionError(
            f"{source.name}: pooling 'hf' is what a transformers classifier does, and this is a head on a "
            "trunk: choose last_token, first_eos, token, cls or mean"
        )
    if network.head is None:
        raise ConversionError(
            f"{source.name}: pooling {chosen!r} cannot be had: between the states and the scores of "
            f"{type(network.model).__name__} stands more than one linear layer, which only its own class "
            "can run; leave pooling out"
        )
    if chosen == "token" and requested.pooling_token is None:
        raise ConversionError("pooling 'token' needs --pooling_token, the text of the token that is read")
    return chosen, why


def _has_no_pad(network: Network) -> bool:
    config = network.model.config.get_text_config()
    return config.pad_token_id is None and network.kind.name == "classifier" and network.head is not None


def _pooling_token(source: Source, requested: ReadOptions, pooling: Pooling, tokenizer: Any) -> int | None:
    if requested.pooling_token is None:
        return None
    if pooling != "token":
        raise ConversionError(
            f"{source.name}: --pooling_token goes with --pooling token, and this is {pooling}"
        )
    return _one_token(source, "--pooling_token", requested.pooling_token, tokenizer)


def _closing_token(
    source: Source, requested: ReadOptions, kind: Kind, tokenizer: Any
) -> tuple[int | None, str]:
    if requested.closing_token is not None:
        return _one_token(source, "--closing_token", requested.closing_token, tokenizer), "--closing_token"
    return kind.closing_token_id, "reward_token_id of config.json"


def _one_token(source: Source, option: str, text: str, tokenizer: Any) -> int:
    number = tokenizer.get_vocab().get(text)
    if number is None:
        raise ConversionError(
            f"{source.name}: {text!r} of {option} is no token of the tokenizer: give the text of one, as it "
            "stands in the vocabulary"
        )
    return int(number)


def _function_to_apply(
    source: Source, requested: ReadOptions, pooling: Pooling, network: Network
) -> tuple[ScoreFunction, str]:
    """Return what is applied to the outputs, and where that comes from."""
    function, outputs = requested.function_to_apply, len(network.labels)
    if function is not None and network.head is None:
        raise ConversionError(
            f"{source.name}: --function_to_apply needs a head of linear layers, and "
            f"{type(network.model).__name__} gives its scores itself"
        )
    if function == "softmax" and outputs == 1:
        raise ConversionError(f"{source.name} has one output, whose softmax is always 1: use sigmoid or none")
    if function is not None:
        return function, "--function_to_apply"
    if outputs > 1 and (pooling == "steps" or requested.score_tokens):
        return "softmax", f"default for {outputs} outputs of this kind"
    return "none", "default"


def _check_granularity(source: Source, requested: ReadOptions, pooling: Pooling, network: Network) -> None:
    if requested.granularity == "step" and pooling != "steps":
        raise ConversionError(
            f"{source.name} is no process reward model (a token classifier), so its steps have no scores: "
            "use --granularity token for a score at every token, or sample"
        )
    if requested.granularity == "token" and network.head is None:
        raise ConversionError(
            f"{source.name}: its tokens cannot be scored: between the states and the scores of "
            f"{type(network.model).__name__} stands more than one linear layer, which reads whole samples; "
            "use --granularity sample"
        )
    if requested.granularity == "token" and requested.step_separator is not None:
        raise ConversionError(
            "--granularity token scores every token, so none separates steps: leave out --step_separator, "
            "or use --granularity step"
        )


def _steps(
    source: Source, requested: ReadOptions, pooling: Pooling, tokenizer: Any
) -> tuple[dict[str, Any], Aggregate | None]:
    """Return the rules on where steps end, and how scores of steps become one; process rewards only."""
    given = [
        option
        for option in ("step_separator", "aggregate", "step_delimiter", "steps_apart")
        if getattr(requested, option)
    ]
    if pooling != "steps":
        if given:
            raise ConversionError(
                f"{source.name} is no process reward model (a token classifier): it has no steps to separate "
                f"or aggregate (--{given[0]})"
            )
        return {}, None
    aggregate = requested.aggregate or "min"
    if requested.granularity == "token":
        return {}, aggregate
    if requested.step_separator is None:
        raise ConversionError(
            f"{source.name} scores the steps of a text: say with --step_separator which token ends a step, "
            "or score every token with --granularity token"
        )
    ids = separator_ids(requested.step_separator, tokenizer)
    if not ids or tokenizer.unk_token_id in ids:
        raise ConversionError(
            f"step separator {requested.step_separator!r} is no text that the tokenizer knows ({ids}): give "
            "one that is"
        )
    return {
        "separator_id": ids[-1],
        "separator_ids": tuple(ids) if len(ids) > 1 else (),
        "step_separator": requested.step_separator,
        "step_delimiter": requested.step_delimiter,
        "steps_apart": requested.steps_apart,
    }, aggregate


def separator_ids(separator: str, tokenizer: Any) -> list[int]:
    """Return the tokens of a separator: where it is no single token by itself, those that it has behind a
    word.

    A sentencepiece tokenizer puts a space before a text, which is none of the separator's.
    """
    alone = list(tokenizer(separator, add_special_tokens=False).input_ids)
    before = list(tokenizer("a", add_special_tokens=False).input_ids)
    behind = list(tokenizer(f"a{separator}", add_special_tokens=False).input_ids)
    if len(alone) > 1 and behind[: len(before)] == before and 0 < len(behind) - len(before) < len(alone):
        return behind[len(before) :]
    return alone


def _rewards(
    source: Source,
    from_file: tuple[str, ...] | None,
    requested: Sequence[str],
    network: Network,
    pooling: Pooling,
    function: ScoreFunction,
) -> tuple[tuple[int, ...] | None, tuple[str, ...]]:
    """Return the numbers of the outputs that are served, None for all, and their names.

    from_file: names of all outputs; None takes the network's labels.
    requested: names or numbers of the outputs to serve; empty serves all.
    """
    names, outputs = from_file or network.labels, len(network.labels)
    if len(names) != outputs:
        raise ConversionError(
            f"{source.name}: the head has {outputs} outputs (num_labels) but {REWARD_MODEL_FILE} names "
            f"{len(names)}: {', '.join(names)}"
        )
    if len(set(names)) != outputs or any(not name or "," in name for name in names):
        raise ConversionError(
            f"{source.name}: reward names {list(names)} must differ, not be empty and hold no comma"
        )
    if requested:
        columns = tuple(_column(source, name, names) for name in requested)
        return columns, tuple(names[column] for column in columns)
    if network.kind.scores_tokens:
        return ((0,), ("reward",)) if function == "softmax" else (None, tuple(names))
    if pooling == "steps" and outputs == 2:  # wrong and right
        return (1,), ("reward",)
    if pooling == "steps" and outputs > 2:
        raise ConversionError(
            f"{source.name} tells {outputs} kinds of steps apart ({_numbered(names)}): "
            "say with --reward the probability of which is the reward"
        )
    return None, tuple(names)


def _column(source: Source, requested: str, names: tuple[str, ...]) -> int:
    if requested in names:
        return names.index(requested)
    if requested.isdecimal() and int(requested) < len(names):
        return int(requested)
    raise ConversionError(f"{source.name} has no reward {requested!r}; it has: {_numbered(names)}")


def _numbered(names: Sequence[str]) -> str:
    return ", ".join(f"{index} {name}" for index, name in enumerate(names))


def _pad_token_id(
    source: Source, requested: ReadOptions, network: Network, tokenizer: Any
) -> tuple[int, str]:
    """Return what fills short rows, and where that comes from; the model's own class gets to know it too."""
    config = network.model.config.get_text_config()
    if requested.pad_token is not None:
        config.pad_token_id = _one_token(source, "--pad_token", requested.pad_token, tokenizer)
        return config.pad_token_id, "--pad_token"
    if config.pad_token_id is not None:
        return config.pad_token_id, "config.json"
    if tokenizer.pad_token_id is not None:
        config.pad_token_id = tokenizer.pad_token_id
        return tokenizer.pad_token_id, "tokenizer"
    # Nothing is read from padding then, see `_pooling`: any id that the model embeds will do.
    config.pad_token_id = 0 if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    return config.pad_token_id, "neither config.json nor tokenizer has one"


def _vocab_size(source: Source, network: Network, tokenizer: Any, pad_token_id: int) -> int:
    """Return how many ids the model embeds; refuse a pad token or a tokenizer beyond them."""
    embeddings: Any = network.model.get_input_embeddings()
    highest = max(tokenizer.get_vocab().values())
    for description, token in (("pad_token_id", pad_token_id), ("the tokenizer's highest id", highest)):
        if not 0 <= token < embeddings.num_embeddings:
            raise ConversionError(
                f"{source.name}: {description} is {token}, but the model embeds ids "
                f"0..{embeddings.num_embeddings - 1} only"
            )
    return embeddings.num_embeddings


def _max_length(source: Source, requested: int | None, network: Network, tokenizer: Any) -> int:
    """Return the tokens that a sample may have: as requested, else the smaller of the two windows."""
    window = context_window(network.model.config.get_text_config())
    limits = [limit for limit in (window, tokenizer.model_max_length) if limit and limit < _NO_LIMIT]
    if requested is None and not limits:
        raise ConversionError(
            f"{source.name}: neither model nor tokenizer says how long a sample may be; give --max_length"
        )
    length = requested if requested is not None else min(limits)
    if length < 1 or (window and length > window):
        raise ConversionError(f"{source.name}: max_length is {length}, the model's window is {window} tokens")
    return length


def _per_reward(
    statistic: str,
    from_file: float | tuple[float, ...] | None,
    reward_names: tuple[str, ...],
    columns: tuple[int, ...] | None,
    labels: tuple[str, ...],
) -> tuple[float, ...] | None:
    """Return the statistic of each served reward; None if never measured.

    statistic: `mean` or `std`, for messages.
    from_file: one number, one for each served reward, or one for each output.
    """
    if from_file is None:
        return None
    values = from_file if isinstance(from_file, tuple) else (from_file,)
    if columns is not None and len(values) == len(labels):
        values = tuple(values[column] for column in columns)
    if len(values) != len(reward_names):
        raise ConversionError(
            f"{REWARD_MODEL_FILE}: {statistic} has {len(values)} values for {len(reward_names)} rewards"
        )
    if statistic == "std" and min(values) <= 0:
        raise ConversionError(f"{REWARD_MODEL_FILE}: std is {list(values)}, it must be above 0")
    return values


def _normalising(
    source: Source,
    requested: ReadOptions,
    from_file: RewardModelFile,
    network: Network,
    reward_names: tuple[str, ...],
    columns: tuple[int, ...] | None,
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None, Normalise]:
    """Return mean and std of the served rewards, and what becomes of them."""
    own = network.statistics
    if (
        own is not None
        and not own.applied
        and (min(own.std) <= 0 or len(own.mean) not in (1, len(reward_names)))
    ):
        own = None  # nothing is done with it, and it fits nothing
    mean, std = (
        _per_reward(statistic, values, reward_names, columns, network.labels)
        for statistic, values in (
            ("mean", from_file.mean if from_file.mean is not None else own and own.mean),
            ("std", from_file.std if from_file.std is not None else own and own.std),
        )
    )
    applied = from_file.normalise or (from_file.mean is None and own is not None and own.applied)
    return mean, std, requested.normalise or ("parameters" if applied else "none")


def _check_normalise(
    source: Source,
    normalise: Normalise,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    network: Network,
    pooling: Pooling,
    function: ScoreFunction,
) -> None:
    if normalise != "none" and (mean is None or std is None):
        raise ConversionError(
            f"normalise was asked for, but {source.name} has no reward_model.json with `mean` and `std`"
        )
    is_linear = function == "none" and (
        network.head is not None or (pooling == "hf" and final_layer(network.model) is not None)
    )
    if normalise == "fold" and not is_linear:
        raise ConversionError(
            f"{source.name}: mean and std cannot be folded into its weights, its scores are not one linear "
            "layer's outputs: use --normalise parameters"
        )
