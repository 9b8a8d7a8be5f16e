"""Read a reward-model checkpoint and refuse, with the reason, what cannot be served faithfully."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from conch.config import Section, load
from conch.data.judgements import default_template, template_mistake
from conch.errors import ConfigError, ConversionError
from conch.models.adapter import ADAPTER_FILE

REWARD_MODEL_FILE = "reward_model.json"

# Tokenizers without a limit of their own say 10^30 or so.
_NO_LIMIT = 10**9


class RewardModelFile(Section):
    """`reward_model.json`, which the reward-model trainer writes beside the weights. No key is required."""

    template: str | None = None
    """Python format string over {text} and {eos}."""

    pooling: str = "hf"
    """`hf`: the token that the checkpoint's own class reads the score at."""

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
    """A classifier in float32 with what is needed to serve it.

    mean, std: statistics of raw scores per reward, None if not known. normalise: whether to apply them.
    vocab_size: token ids must be below this.
    """

    model: Any
    tokenizer: Any
    template: str
    max_length: int
    reward_names: tuple[str, ...]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    normalise: bool
    vocab_size: int

    @property
    def pad_token_id(self) -> int:
        """The id that the model's pooling takes for padding."""
        return self.model.config.get_text_config().pad_token_id


def read_checkpoint(
    source: str,
    *,
    revision: str | None = None,
    template: str | None = None,
    max_length: int | None = None,
    normalise: bool | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Checkpoint:
    """Load a folder or hub id; `template`, `max_length` and `normalise` win over `reward_model.json`.

    Raises:
        ConversionError: missing, not a classifier, incomplete weights, NaN, no tokenizer, no pad token, or
            settings that contradict the model.
    """
    told = _read_reward_model_file(Path(source) / REWARD_MODEL_FILE)
    tokenizer = _load_tokenizer(source, revision, trust_remote_code)
    model = _load_classifier(source, revision, trust_remote_code).to(device).eval()
    reward_names = _reward_names(source, told.reward_names, model.config)
    vocab_size = _check_vocabulary(source, model, tokenizer)
    template = template or told.template or default_template(tokenizer)
    check_template(template, tokenizer)
    return Checkpoint(
        model=model,
        tokenizer=tokenizer,
        template=template,
        max_length=_max_length(source, max_length or told.max_length, model.config, tokenizer),
        reward_names=reward_names,
        mean=_per_reward("mean", told.mean, reward_names),
        std=_per_reward("std", told.std, reward_names),
        normalise=told.normalise if normalise is None else normalise,
        vocab_size=vocab_size,
    )


def check_template(template: str, tokenizer: Any) -> None:
    """Raise ConversionError unless the template is a format string with {text} once and nothing unknown."""
    if mistake := template_mistake(template):
        raise ConversionError(mistake)
    if "\0" in template.format(text="", eos="\0") and not tokenizer.eos_token:
        raise ConversionError(f"template {template!r} uses {{eos}} but the tokenizer has no eos token")


def _read_reward_model_file(path: Path) -> RewardModelFile:
    if not path.is_file():
        return RewardModelFile()
    try:
        told = load(RewardModelFile, _json_object(path))
    except ConfigError as error:
        raise ConversionError(f"{path}: {error}") from error
    if told.pooling != "hf":
        raise ConversionError(f"{path}: pooling {told.pooling!r} cannot be served; only 'hf' can")
    return told


def _json_object(path: Path) -> dict[str, Any]:
    try:
        return TypeAdapter(dict[str, Any]).validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ConversionError(f"{path} is not a readable JSON object: {error}") from error


def _load_tokenizer(source: str, revision: str | None, trust_remote_code: bool) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # transformers raises many kinds for the same thing
        raise ConversionError(
            f"{source} has no tokenizer that can be loaded ({_first_line(error)}); "
            "save the one that the model was trained with beside it (tokenizer.save_pretrained)"
        ) from error
    # Where the files are missing, transformers makes up a tokenizer with nothing but special tokens.
    if not set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids):
        raise ConversionError(
            f"{source} has no tokenizer files; save the tokenizer that the model was trained with beside it "
            "(tokenizer.save_pretrained)"
        )
    return tokenizer


def _load_classifier(source: str, revision: str | None, trust_remote_code: bool) -> Any:
    if (Path(source) / ADAPTER_FILE).is_file():
        raise ConversionError(
            f"{source} holds an adapter without its model: train with `model.merge_adapter=true`, or merge it"
        )
    where = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source, **where)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            source, config=config, dtype=torch.float32, output_loading_info=True, **where
        )
    except Exception as error:  # transformers raises many kinds for the same thing
        raise ConversionError(
            f"{source} cannot be loaded as a sequence classifier: {_first_line(error)}; "
            "the converter takes what AutoModelForSequenceClassification.from_pretrained loads"
        ) from error
    absent = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if absent:
        raise ConversionError(
            f"{source} is not a complete sequence classifier: {_some(absent)} missing or of another shape, "
            "and would be random; train a reward model first, or give the checkpoint that has the head"
        )
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ConversionError(f"{source}: weight {name} holds NaN or infinity; the training diverged")
    if model.config.get_text_config().pad_token_id is None:
        raise ConversionError(
            f"{source}: config.json has no pad_token_id, so samples cannot be batched; "
            "set it to the pad token that the model was trained with"
        )
    return model


def _reward_names(source: str, told: tuple[str, ...] | None, config: Any) -> tuple[str, ...]:
    outputs = config.num_labels
    if told is None:
        labels = tuple(str(config.id2label[index]) for index in range(outputs))
        told = ("reward",) if outputs == 1 else labels
    if len(told) != outputs:
        raise ConversionError(
            f"{source}: the head has {outputs} outputs (num_labels) but {REWARD_MODEL_FILE} names "
            f"{len(told)}: {', '.join(told)}"
        )
    if len(set(told)) != outputs or any(not name or "," in name for name in told):
        raise ConversionError(
            f"{source}: reward names {list(told)} must differ, not be empty and hold no comma"
        )
    return told


def _check_vocabulary(source: str, model: Any, tokenizer: Any) -> int:
    rows = model.get_input_embeddings().num_embeddings
    pad = model.config.get_text_config().pad_token_id
    highest = max(tokenizer.get_vocab().values())
    for what, token in (("pad_token_id", pad), ("the tokenizer's highest id", highest)):
        if not 0 <= token < rows:
            raise ConversionError(f"{source}: {what} is {token}, but the model embeds ids 0..{rows - 1} only")
    return rows


def _max_length(source: str, told: int | None, config: Any, tokenizer: Any) -> int:
    window = getattr(config.get_text_config(), "max_position_embeddings", None)
    limits = [limit for limit in (window, tokenizer.model_max_length) if limit and limit < _NO_LIMIT]
    if told is None and not limits:
        raise ConversionError(
            f"{source}: neither model nor tokenizer says how long a sample may be; give --max-length"
        )
    length = told if told is not None else min(limits)
    if length < 1 or (window and length > window):
        raise ConversionError(f"{source}: max_length is {length}, the model's window is {window} tokens")
    return length


def _per_reward(
    what: str, told: float | tuple[float, ...] | None, reward_names: tuple[str, ...]
) -> tuple[float, ...] | None:
    if told is None:
        return None
    values = told if isinstance(told, tuple) else (told,)
    if len(values) != len(reward_names):
        raise ConversionError(
            f"{REWARD_MODEL_FILE}: {what} has {len(values)} values for {len(reward_names)} rewards"
        )
    if what == "std" and min(values) <= 0:
        raise ConversionError(f"{REWARD_MODEL_FILE}: std is {list(values)}, it must be above 0")
    return values


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _some(names: list[str], shown: int = 4) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
