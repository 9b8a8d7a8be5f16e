"""The scoring rules of a checkpoint: from the options, else `reward_model.json`, else the model's kind.

Each rule is checked against the network and the tokenizer; a contradiction is refused with its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from conch.converters.checkpoints.architectures import Network, final_layer
from conch.converters.checkpoints.files import REWARD_MODEL_FILE, RewardModelFile, Source
from conch.converters.checkpoints.tokenizer import choose_template, reads_dialogues
from conch.converters.options import Normalise, ReadOptions
from conch.data.chat import what_template_reads
from conch.errors import ConversionError
from conch.models.loading import context_window
from conch.store.manifest import Aggregate, Pooling, ScoringRules
from conch.triton.contract import Form

# Tokenizers without a limit of their own say 10^30 or so.
_NO_LIMIT = 10**9


def scoring_rules(
    source: Source, requested: ReadOptions, from_file: RewardModelFile, tokenizer: Any, network: Network
) -> ScoringRules:
    """Decide how the network's outputs become scores.

    requested: wins over `from_file`.
    from_file: the checkpoint's `reward_model.json`.

    Raises:
        ConversionError: settings contradict the model or each other.
    """
    pooling = _pooling(source, requested.pooling or from_file.pooling, network)
    _check_granularity(source, requested, pooling, network)
    separator_id, aggregate = _steps(source, requested, pooling, tokenizer, len(network.labels))
    columns, reward_names = _rewards(source, from_file.reward_names, requested.rewards, network, pooling)
    template = choose_template(requested.template, from_file.template, tokenizer, pooling)
    pad_token_id = _pad_token_id(source, network, pooling, tokenizer)
    mean, std = (
        _per_reward(statistic, getattr(from_file, statistic), reward_names, columns, network.labels)
        for statistic in ("mean", "std")
    )
    normalise = requested.normalise or ("parameters" if from_file.normalise else "none")
    _check_normalise(source, normalise, mean, std, network, pooling)
    of_dialogues: dict[str, Any] = {"reads": "texts"}
    if reads_dialogues(template):
        contents, arguments = what_template_reads(tokenizer)
        of_dialogues = {"reads": "dialogues", "contents": contents, "arguments": arguments or None}
    return ScoringRules(
        template=template,
        **of_dialogues,
        truncation_side=tokenizer.truncation_side,
        max_length=_max_length(source, requested.max_length or from_file.max_length, network, tokenizer),
        pooling=pooling,
        function_to_apply=requested.function_to_apply
        or ("softmax" if pooling == "steps" and len(network.labels) > 1 else "none"),
        columns=columns,
        reward_names=reward_names,
        separator_id=separator_id,
        step_separator=requested.step_separator,
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


def _pooling(source: Source, requested: Pooling | None, network: Network) -> Pooling:
    if requested is None or requested == network.pooling:
        return network.pooling
    if "steps" in (requested, network.pooling):
        raise ConversionError(
            f"{source.name}: pooling {requested!r} does not fit: process rewards (token classifiers) are "
            "read at the ends of their steps, and only they are"
        )
    if requested == "hf":
        raise ConversionError(
            f"{source.name}: pooling 'hf' is what a transformers classifier does, and this is a value head: "
            "choose last_token, first_eos, cls or mean"
        )
    if network.head is None:
        raise ConversionError(
            f"{source.name}: pooling {requested!r} cannot be had: between the states and the scores of "
            f"{type(network.model).__name__} stands more than one linear layer, which only its own class "
            "can run; leave pooling out"
        )
    return requested


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
    source: Source, requested: ReadOptions, pooling: Pooling, tokenizer: Any, outputs: int
) -> tuple[int | None, Aggregate | None]:
    """Return the id of the token that ends a step, and how scores of steps become one; process rewards only.

    outputs: how many outputs the head has for each token.
    """
    if pooling != "steps":
        if requested.step_separator is not None or requested.aggregate is not None:
            raise ConversionError(
                f"{source.name} is no process reward model (a token classifier): it has no steps to separate "
                "or aggregate"
            )
        return None, None
    aggregate = requested.aggregate or "min"
    if aggregate == "prod" and outputs == 1:
        raise ConversionError(
            f"{source.name} has one output a token, which is no probability: a product of such scores means "
            "nothing; use min, mean or last"
        )
    if requested.granularity == "token":
        return None, aggregate
    if requested.step_separator is None:
        raise ConversionError(
            f"{source.name} scores the steps of a text: say with --step_separator which token ends a step, "
            "or score every token with --granularity token"
        )
    ids = tokenizer(requested.step_separator, add_special_tokens=False).input_ids
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise ConversionError(
            f"step separator {requested.step_separator!r} is no single token that the tokenizer knows "
            f"({ids}): give one that is"
        )
    return ids[0], aggregate


def _rewards(
    source: Source,
    from_file: tuple[str, ...] | None,
    requested: Sequence[str],
    network: Network,
    pooling: Pooling,
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


def _pad_token_id(source: Source, network: Network, pooling: Pooling, tokenizer: Any) -> int:
    config = network.model.config.get_text_config()
    pad_token_id = config.pad_token_id
    if pad_token_id is None and source.is_adapter:
        # A base model need not have one; whoever trained the adapter saved its tokenizer with theirs.
        pad_token_id = config.pad_token_id = tokenizer.pad_token_id
    if pad_token_id is None and pooling == "hf":
        raise ConversionError(
            f"{source.name}: config.json has no pad_token_id, so samples cannot be batched; "
            "set it to the pad token that the model was trained with"
        )
    # Elsewhere nothing is read from padding: any id that the model embeds will do.
    candidates = (pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None)


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


def _check_normalise(
    source: Source,
    normalise: Normalise,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    network: Network,
    pooling: Pooling,
) -> None:
    if normalise != "none" and (mean is None or std is None):
        raise ConversionError(
            f"normalise was asked for, but {source.name} has no reward_model.json with `mean` and `std`"
        )
    if pooling == "steps":
        is_linear = len(network.labels) == 1  # several labels give probabilities
    else:
        is_linear = network.head is not None or final_layer(network.model) is not None
    if normalise == "fold" and not is_linear:
        raise ConversionError(
            f"{source.name}: mean and std cannot be folded into its weights, its scores are not one linear "
            "layer's outputs: use --normalise parameters"
        )
