"""Read a reward-model checkpoint of any kind; refuse, with the reason, what cannot be served faithfully.

What a checkpoint must be to give scores of steps or tokens; refused, with the reason, where it is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from transformers import AutoTokenizer

from conch.config import Section, load
from conch.converters.checkpoints.architectures import (
    Head,
    Network,
    final_layer,
    numbered,
    read_network,
)
from conch.converters.checkpoints.files import Source, find_source
from conch.converters.options import Normalise, ReadOptions
from conch.data.preferences import default_template, template_mistake
from conch.errors import ConfigError, ConversionError, ModelError, first_line
from conch.models.adapter import adapter_base
from conch.models.loading import context_window
from conch.store.manifest import Aggregate, Pooling
from conch.triton.contract import Form, Granularity

REWARD_MODEL_FILE = "reward_model.json"
CHAT = "chat"

# Tokenizers without a limit of their own say 10^30 or so.
_NO_LIMIT = 10**9


class RewardModelFile(Section):
    """`reward_model.json`, which the reward-model trainer writes beside the weights. No key is required."""

    template: str | None = None
    """Python format string over {text} and {eos}, or `chat`."""

    pooling: Pooling | None = None
    """Which tokens' states become the score; None means what the kind of checkpoint does."""

    max_length: int | None = None
    """Tokens a sample may have, special tokens included."""

    reward_names: tuple[str, ...] | None = None
    """One name per output of the head."""

    mean: float | tuple[float, ...] | None = None
    """Mean of raw scores on reference samples; one number, or one per reward."""

    std: float | tuple[float, ...] | None = None
    """Standard deviation of raw scores on reference samples."""

    normalise: bool = False
    """Serve (raw - mean) / std unless told otherwise."""

    rng_seed: int | None = None
    """Names the member of an ensemble."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A reward model in the precision it is stored in, with what is needed to serve it.

    model, head: as in `Network`; the model may be mapped from disk.
    columns: numbers of the outputs that are rewards, None for all. reward_names: one per such output.
    mean, std: statistics of raw scores per reward, None if not known. normalise: what becomes of them.
    pad_token_id: fills short rows; of pooling `hf`, the id that the model's pooling takes for padding.
    vocab_size: token ids must be below this.
    separator_id, aggregate: of process rewards, see `Manifest`. granularity: what gets a score of its own.
    """

    model: Any
    head: Head | None
    pooling: Pooling
    tokenizer: Any
    template: str
    max_length: int
    columns: tuple[int, ...] | None
    reward_names: tuple[str, ...]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    normalise: Normalise
    pad_token_id: int
    vocab_size: int
    separator_id: int | None = None
    aggregate: Aggregate | None = None
    granularity: Granularity = "sample"
    base_model: str | None = None
    sha256: str = ""

    @property
    def trunk(self) -> Any:
        """The model below the head."""
        return self.model.base_model


def read_checkpoint(name: str, reading: ReadOptions | None = None) -> Checkpoint:
    """Load a folder, file or hub id; what `reading` says wins over `reward_model.json`.

    Raises:
        ConversionError: missing, of no kind we know, incomplete weights, NaN, no tokenizer, no pad token, or
            settings that contradict the model.
    """
    wanted = reading or ReadOptions()
    source = find_source(name, wanted.revision)
    told = _read_reward_model_file(source.folder / REWARD_MODEL_FILE)
    tokenizer = _load_tokenizer(source, wanted)
    network = read_network(source, wanted.base_model, trust_remote_code=wanted.trust_remote_code)
    network.model.to(wanted.device)
    pooling = _pooling(source, wanted.pooling or told.pooling, network)
    _check_granularity(source, wanted, pooling, network)
    separator, aggregate = _steps(source, wanted, pooling, tokenizer, len(network.labels))
    columns, reward_names = _rewards(source, told.reward_names, wanted.rewards, network, pooling)
    template = _template(wanted.template or told.template, tokenizer, pooling)
    pad = _pad_token_id(source, network, pooling, tokenizer)
    mean, std = (
        _per_reward(what, getattr(told, what), reward_names, columns, network.labels)
        for what in ("mean", "std")
    )
    normalise = wanted.normalise or ("parameters" if told.normalise else "none")
    _check_normalise(source, normalise, mean, std, network, pooling)
    return Checkpoint(
        model=network.model,
        head=network.head,
        pooling=pooling,
        tokenizer=tokenizer,
        template=template,
        max_length=_max_length(source, wanted.max_length or told.max_length, network.model.config, tokenizer),
        columns=columns,
        reward_names=reward_names,
        mean=mean,
        std=std,
        normalise=normalise,
        pad_token_id=pad,
        vocab_size=_check_vocabulary(source, network.model, tokenizer, pad),
        separator_id=separator,
        aggregate=aggregate,
        granularity=wanted.granularity,
        base_model=network.base_model,
        sha256=network.sha256,
    )


def checkpoint_sha256(name: str, reading: ReadOptions) -> str:
    """What `read_checkpoint` would give as `sha256`, without loading the model; at disk speed."""
    source = find_source(name, reading.revision)
    if not source.is_adapter:
        return source.sha256()
    return source.sha256() + find_source(_base_of(source, reading)).sha256()


def check_template(template: str, tokenizer: Any) -> None:
    """Raise ConversionError unless the template is a format string with {text} once and nothing unknown."""
    if mistake := template_mistake(template):
        raise ConversionError(mistake)
    if "\0" in template.format(text="", eos="\0") and not tokenizer.eos_token:
        raise ConversionError(f"template {template!r} uses {{eos}} but the tokenizer has no eos token")


def _template(wanted: str | None, tokenizer: Any, pooling: Pooling) -> str:
    """{prompt}{output} is {text}: a client sends a sample as one text, its prompt and output joined."""
    if wanted is None:
        # An eos behind the last step would only stand in the way: steps are read at their own ends.
        return "{text}" if pooling == "steps" else default_template(tokenizer)
    if wanted == CHAT:
        if not tokenizer.chat_template:
            raise ConversionError("template chat: the tokenizer has no chat template; give one in its folder")
        return CHAT
    template = wanted.replace("{prompt}{output}", "{text}")
    if "{prompt}" in template or "{output}" in template:
        raise ConversionError(
            f"template {wanted!r} puts something between {{prompt}} and {{output}}, but a client sends both "
            "joined as one text: write {prompt}{output}, and what stands between them into the trainer's "
            "prompts; or use the template `chat`"
        )
    check_template(template, tokenizer)
    return template


def _read_reward_model_file(path: Path) -> RewardModelFile:
    if not path.is_file():
        return RewardModelFile()
    try:
        return load(RewardModelFile, _json_object(path))
    except ConfigError as error:
        raise ConversionError(f"{path}: {error}") from error


def _json_object(path: Path) -> dict[str, Any]:
    try:
        return TypeAdapter(dict[str, Any]).validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ConversionError(f"{path} is not a readable JSON object: {error}") from error


def _load_tokenizer(source: Source, wanted: ReadOptions) -> Any:
    """The checkpoint's own, else the base model's."""
    tokenizer = _tokenizer_in(source.folder, wanted.trust_remote_code)
    base = _base_of(source, wanted)
    if tokenizer is None and base:
        tokenizer = _tokenizer_in(find_source(base, weights=False).folder, wanted.trust_remote_code)
    if tokenizer is None:
        raise ConversionError(
            f"{source.name} has no tokenizer files{f', and neither has {base}' if base else ''}; save the "
            "tokenizer that the model was trained with beside it (tokenizer.save_pretrained), or give the "
            "--base_model that has it"
        )
    if wanted.truncation_side:
        tokenizer.truncation_side = wanted.truncation_side
    return tokenizer


def _base_of(source: Source, wanted: ReadOptions) -> str:
    try:
        return wanted.base_model or adapter_base(str(source.folder)) or ""
    except ModelError as error:
        raise ConversionError(f"{error}, or give --base_model") from error


def _tokenizer_in(folder: Path, trust_remote_code: bool) -> Any | None:
    if not any(folder.glob("*token*")) and not any(folder.glob("*vocab*")):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds for the same thing
        raise ConversionError(
            f"{folder} has no tokenizer that can be loaded ({first_line(error)}); "
            "save the one that the model was trained with beside it (tokenizer.save_pretrained)"
        ) from error
    # Where the files are missing, transformers makes up a tokenizer with nothing but special tokens.
    return tokenizer if set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids) else None


def _pooling(source: Source, wanted: Pooling | None, network: Network) -> Pooling:
    if wanted is None or wanted == network.pooling:
        return network.pooling
    if "steps" in (wanted, network.pooling):
        raise ConversionError(
            f"{source.name}: pooling {wanted!r} does not fit: process rewards (token classifiers) are read "
            "at the ends of their steps, and only they are"
        )
    if wanted == "hf":
        raise ConversionError(
            f"{source.name}: pooling 'hf' is what a transformers classifier does, and this is a value head: "
            "choose last_token, first_eos, cls or mean"
        )
    if network.head is None:
        raise ConversionError(
            f"{source.name}: pooling {wanted!r} cannot be had: between the states and the scores of "
            f"{type(network.model).__name__} stands more than one linear layer, which only its own class "
            "can run; leave pooling out"
        )
    return wanted


def _check_granularity(source: Source, wanted: ReadOptions, pooling: Pooling, network: Network) -> None:
    if wanted.granularity == "step" and pooling != "steps":
        raise ConversionError(
            f"{source.name} is no process reward model (a token classifier), so its steps have no scores: "
            "use --granularity token for a score at every token, or sample"
        )
    if wanted.granularity == "token" and network.head is None:
        raise ConversionError(
            f"{source.name}: its tokens cannot be scored: between the states and the scores of "
            f"{type(network.model).__name__} stands more than one linear layer, which reads whole samples; "
            "use --granularity sample"
        )
    if wanted.granularity == "token" and wanted.step_separator is not None:
        raise ConversionError(
            "--granularity token scores every token, so none separates steps: leave out --step_separator, "
            "or use --granularity step"
        )


def _steps(
    source: Source, wanted: ReadOptions, pooling: Pooling, tokenizer: Any, outputs: int
) -> tuple[int | None, Aggregate | None]:
    if pooling != "steps":
        if wanted.step_separator is not None or wanted.aggregate is not None:
            raise ConversionError(
                f"{source.name} is no process reward model (a token classifier): it has no steps to separate "
                "or aggregate"
            )
        return None, None
    aggregate = wanted.aggregate or "min"
    if aggregate == "prod" and outputs == 1:
        raise ConversionError(
            f"{source.name} has one output a token, which is no probability: a product of such scores means "
            "nothing; use min, mean or last"
        )
    if wanted.granularity == "token":
        return None, aggregate
    if wanted.step_separator is None:
        raise ConversionError(
            f"{source.name} scores the steps of a text: say with --step_separator which token ends a step, "
            "or score every token with --granularity token"
        )
    ids = tokenizer(wanted.step_separator, add_special_tokens=False).input_ids
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise ConversionError(
            f"step separator {wanted.step_separator!r} is no single token that the tokenizer knows ({ids}): "
            "give one that is"
        )
    return ids[0], aggregate


def _rewards(
    source: Source,
    told: tuple[str, ...] | None,
    chosen: Sequence[str],
    network: Network,
    pooling: Pooling,
) -> tuple[tuple[int, ...] | None, tuple[str, ...]]:
    """Which outputs are served, None for all, and their names."""
    names, outputs = told or network.labels, len(network.labels)
    if len(names) != outputs:
        raise ConversionError(
            f"{source.name}: the head has {outputs} outputs (num_labels) but {REWARD_MODEL_FILE} names "
            f"{len(names)}: {', '.join(names)}"
        )
    if len(set(names)) != outputs or any(not name or "," in name for name in names):
        raise ConversionError(
            f"{source.name}: reward names {list(names)} must differ, not be empty and hold no comma"
        )
    if chosen:
        columns = tuple(_column(source, name, names) for name in chosen)
        return columns, tuple(names[column] for column in columns)
    if pooling == "steps" and outputs == 2:  # wrong and right
        return (1,), ("reward",)
    if pooling == "steps" and outputs > 2:
        raise ConversionError(
            f"{source.name} tells {outputs} kinds of steps apart ({numbered(names)}): "
            "say with --reward the probability of which is the reward"
        )
    return None, tuple(names)


def _column(source: Source, chosen: str, names: tuple[str, ...]) -> int:
    if chosen in names:
        return names.index(chosen)
    if chosen.isdecimal() and int(chosen) < len(names):
        return int(chosen)
    raise ConversionError(f"{source.name} has no reward {chosen!r}; it has: {numbered(names)}")


def _pad_token_id(source: Source, network: Network, pooling: Pooling, tokenizer: Any) -> int:
    config = network.model.config.get_text_config()
    pad = config.pad_token_id
    if pad is None and source.is_adapter:
        # A base model need not have one; whoever trained the adapter saved its tokenizer with theirs.
        pad = config.pad_token_id = tokenizer.pad_token_id
    if pad is None and pooling == "hf":
        raise ConversionError(
            f"{source.name}: config.json has no pad_token_id, so samples cannot be batched; "
            "set it to the pad token that the model was trained with"
        )
    # Elsewhere nothing is read from padding: any id that the model embeds will do.
    return next(
        token for token in (pad, tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None
    )


def _check_vocabulary(source: Source, model: Any, tokenizer: Any, pad: int) -> int:
    rows = model.get_input_embeddings().num_embeddings
    highest = max(tokenizer.get_vocab().values())
    for what, token in (("pad_token_id", pad), ("the tokenizer's highest id", highest)):
        if not 0 <= token < rows:
            raise ConversionError(
                f"{source.name}: {what} is {token}, but the model embeds ids 0..{rows - 1} only"
            )
    return rows


def _max_length(source: Source, told: int | None, config: Any, tokenizer: Any) -> int:
    window = context_window(config.get_text_config())
    limits = [limit for limit in (window, tokenizer.model_max_length) if limit and limit < _NO_LIMIT]
    if told is None and not limits:
        raise ConversionError(
            f"{source.name}: neither model nor tokenizer says how long a sample may be; give --max_length"
        )
    length = told if told is not None else min(limits)
    if length < 1 or (window and length > window):
        raise ConversionError(f"{source.name}: max_length is {length}, the model's window is {window} tokens")
    return length


def _per_reward(
    what: str,
    told: float | tuple[float, ...] | None,
    reward_names: tuple[str, ...],
    columns: tuple[int, ...] | None,
    labels: tuple[str, ...],
) -> tuple[float, ...] | None:
    """The statistic of each served reward; told for these, or for all outputs."""
    if told is None:
        return None
    values = told if isinstance(told, tuple) else (told,)
    if columns is not None and len(values) == len(labels):
        values = tuple(values[column] for column in columns)
    if len(values) != len(reward_names):
        raise ConversionError(
            f"{REWARD_MODEL_FILE}: {what} has {len(values)} values for {len(reward_names)} rewards"
        )
    if what == "std" and min(values) <= 0:
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
    if normalise == "fold" and not _can_fold(network, pooling):
        raise ConversionError(
            f"{source.name}: mean and std cannot be folded into its weights, its scores are not one linear "
            "layer's outputs: use --normalise parameters"
        )


def _can_fold(network: Network, pooling: Pooling) -> bool:
    if pooling == "steps":
        return len(network.labels) == 1  # others are probabilities
    return network.head is not None or final_layer(network.model) is not None


def check_dense(checkpoint: Checkpoint, form: Form) -> None:
    """Raise ConversionError unless the scores of its steps or tokens have places in what a client sends.

    In the text form these are places in the client's own text, so the tokenizer must know from which
    characters a token was made, and the template must not end steps itself.
    """
    if checkpoint.granularity == "sample":
        return
    if len(checkpoint.reward_names) > 1:
        raise ConversionError(
            f"--granularity {checkpoint.granularity} serves one reward, and these are "
            f"{', '.join(checkpoint.reward_names)}: say with --reward which"
        )
    if form == "text":
        _check_tokenizer(checkpoint)
        _check_template(checkpoint)


def _check_tokenizer(checkpoint: Checkpoint) -> None:
    if not checkpoint.tokenizer.is_fast:
        raise ConversionError(
            f"{type(checkpoint.tokenizer).__name__} does not tell which characters a token was made of, so "
            f"the score of a {checkpoint.granularity} has no place in a text: use --form token"
        )


def _check_template(checkpoint: Checkpoint) -> None:
    if checkpoint.template == CHAT:
        raise ConversionError(
            f"--granularity {checkpoint.granularity} tells places in the client's text, which the template "
            "`chat` takes apart: write the conversation into --template, or use --form token"
        )
    before, _, after = checkpoint.template.partition("{text}")
    if after not in ("", "{eos}"):
        raise ConversionError(
            f"template {checkpoint.template!r}: behind {{text}} only {{eos}} may stand with --granularity "
            f"{checkpoint.granularity}, or the last score would be read in the template"
        )
    ids = checkpoint.tokenizer(before.format(eos=checkpoint.tokenizer.eos_token or "")).input_ids
    if checkpoint.separator_id is not None and checkpoint.separator_id in ids:
        raise ConversionError(
            f"template {checkpoint.template!r} holds the step separator, which would end a step before the "
            "text begins: take it out, or use --form token"
        )
