"""Load the network of a checkpoint as its kind says: `kinds.py` tells the kinds apart. Each reader makes one
`Network`.

Networks are loaded in the precision they are stored in, and refused unless complete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from conch.converters.checkpoints.files import HARMLESS, Source, base_model_of, find_source, some, tensors_in
from conch.converters.checkpoints.heads import Head, LinearLayer
from conch.converters.checkpoints.kinds import Kind
from conch.converters.checkpoints.normalizers import Statistics, statistics_of
from conch.converters.options import ReadOptions
from conch.converters.triton_models.network import allow_older_code
from conch.errors import ConversionError, ModelError, first_line
from conch.models.adapter import merge_saved_adapter
from conch.models.folders import ADAPTER_FILE
from conch.store.manifest import Pooling

_ADAPTER_PREFIX = "base_model.model."
_LAST_LAYERS = ("score", "classifier", "out_proj")


@dataclass(frozen=True, slots=True)
class Network:
    """The model inside a checkpoint.

    model: a classifier, or the trunk of a head.
    head: makes scores of the trunk's last states; None where only the model's own class can.
    pooling: the rule that the checkpoint was trained with.
    labels: one name per output.
    kind: what the checkpoint is.
    base_model: the checkpoint that this one builds on; None where it stands alone.
    sha256: hash of all weights.
    statistics: mean and std that the checkpoint itself has.
    output: of `custom` kinds, see `Manifest.output`.
    """

    model: PreTrainedModel
    head: Head | None
    pooling: Pooling
    labels: tuple[str, ...]
    kind: Kind
    base_model: str | None = None
    sha256: str = ""
    statistics: Statistics | None = None
    output: str | None = None


def read_network(source: Source, requested: ReadOptions, kind: Kind, tokenizer: Any) -> Network:
    """Load the network of a checkpoint of any kind, on the CPU, in evaluation mode.

    Raises:
        ConversionError: the checkpoint is incomplete, not finite, or does not fit its base model.
    """
    if kind.name == "adapter":
        return _read_adapter(source, requested, kind)
    if kind.name == "custom":
        return _read_custom(source, kind, tokenizer)
    if requested.score_tokens:
        return _read_language_model(source, requested, kind, tokenizer)
    if kind.head:
        return _read_head(source, kind)
    return _read_classifier(source, requested, kind)


def final_layer(model: PreTrainedModel) -> nn.Linear | None:
    """Return the layer of a classifier whose outputs are its scores, if the layer has a bias as well."""
    layers = [
        module
        for name, module in model.named_modules()
        if name in ("classifier", "classifier.out_proj") and isinstance(module, nn.Linear)
    ]
    fits = len(layers) == 1 and layers[0].bias is not None
    return layers[0] if fits and layers[0].out_features == model.config.num_labels else None


# ------------------------------------------------------------------------------------------------ classifiers


def _read_classifier(source: Source, requested: ReadOptions, kind: Kind) -> Network:
    auto_class = (
        AutoModelForTokenClassification if kind.name == "process" else AutoModelForSequenceClassification
    )
    config = _config_of(source, requested.trust_remote_code)
    if kind.outputs is not None and config.num_labels != kind.outputs and not _names_labels(kind):
        config.num_labels = kind.outputs  # a language model's configuration, beside a head
    loaded = {"trust_remote_code": requested.trust_remote_code}
    if source.is_file:  # the one that was given, not those that transformers finds beside it
        loaded = {"state_dict": source.tensors()}
    model, info = _from_pretrained(
        auto_class._model_mapping[type(config)] if source.is_file else auto_class,
        None if source.is_file else source.folder,
        f"{source.name} cannot be loaded with {auto_class.__name__}.from_pretrained",
        config=config,
        dtype=source.stored_dtype(),
        **loaded,
    )
    _refuse_tensors(source.name, info, expected=f"complete {auto_class.__name__}")
    _refuse_not_finite(source.name, model.state_dict())
    return _classifier(model.eval(), kind, sha256=source.sha256())


def _names_labels(kind: Kind) -> bool:
    return any(key in kind.config for key in ("num_labels", "id2label", "label2id"))


def _classifier(model: Any, kind: Kind, *, sha256: str, base_model: str | None = None) -> Network:
    head, is_process = _linear_head(model), kind.name == "process"
    if is_process and head is None:
        raise ConversionError(
            f"{type(model).__name__}: its head is more than a linear layer, so steps cannot be scored by it"
        )
    labels = [str(model.config.id2label[index]) for index in range(model.config.num_labels)]
    return Network(
        model,
        head,
        "steps" if is_process else "hf",
        _output_names(labels),
        kind,
        base_model,
        sha256,
        statistics_of(kind.config, {}),
    )


def _linear_head(model: Any) -> Head | None:
    """Return the head of a classifier, if the head is one linear layer right on the trunk's states."""
    own = [child for name, child in model.named_children() if name != model.base_model_prefix]
    layers = [child for child in own if next(child.parameters(), None) is not None]
    pooler = getattr(model.base_model, "pooler", None)
    if len(layers) != 1 or not isinstance(layers[0], nn.Linear) or pooler is not None:
        return None
    return Head((LinearLayer(layers[0].weight, layers[0].bias),))


def _output_names(labels: list[str]) -> tuple[str, ...]:
    """Return one name per output: the labels, or `reward` where there is one output."""
    return ("reward",) if len(labels) == 1 else tuple(labels)


# ------------------------------------------------------------------------------ heads found by their tensors


def _read_head(source: Source, kind: Kind) -> Network:
    tensors = source.tensors()
    head = Head(
        tuple(LinearLayer(tensors[f"{name}.weight"], tensors.get(f"{name}.bias")) for name in kind.head),
        kind.activation,
    )
    in_head = tuple(f"{name}." for name in kind.head)
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(in_head)}
    base = kind.base or source
    model = _trunk_from(source, rest, _config_of_kind(source, kind), base, kind)
    _refuse_not_finite(source.name, {name: tensors[name] for name in tensors if name.startswith(in_head)})
    _refuse_not_finite(source.name, model.state_dict())
    labels = _output_names([f"reward_{index}" for index in range(head.outputs)])
    return Network(
        model.eval(),
        head,
        kind.pooling,
        labels,
        kind,
        kind.base.name if kind.base else None,
        source.sha256(),
        statistics_of(kind.config, tensors),
    )


def _config_of_kind(source: Source, kind: Kind) -> Any:
    """Return the configuration of the trunk, by the type that the kind says."""
    if source.config().get("model_type") == kind.model_type:
        return _config_of(source)
    if kind.base is not None and kind.base.config().get("model_type") == kind.model_type:
        return _config_of(kind.base)
    settings = {key: value for key, value in kind.config.items() if key not in ("model_type", "auto_map")}
    return CONFIG_MAPPING[kind.model_type].from_dict(settings)


def _trunk_from(source: Source, tensors: dict[str, Tensor], config: Any, base: Source, kind: Kind) -> Any:
    """Build the trunk of the checkpoint's weights.

    tensors: all but the head's; their names begin with the trunk's name in the checkpoint, or with none.
    """
    model_class: Any = MODEL_MAPPING[type(config)]
    with init_empty_weights():
        expected = set(model_class(config).state_dict())
    prefix = _prefix(tensors, expected, (kind.root, f"{model_class.base_model_prefix}.", "transformer."))
    trunk = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    others = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    trunk |= {name: tensor for name, tensor in others.items() if not _is_known(name, tensor, trunk, config)}
    trunk = {name: tensor for name, tensor in trunk.items() if not HARMLESS.search(name)}
    dtypes = {tensor.dtype for tensor in trunk.values() if tensor.is_floating_point()}
    model, info = _from_pretrained(
        model_class,
        None,
        f"{source.name} does not load as the trunk of {base.name}",
        config=config,
        state_dict=trunk,
        dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32,
    )
    remedy = "" if kind.base is None else f"; is {base.name} the --base_model that it was trained from?"
    _refuse_tensors(source.name, info, expected=f"complete trunk of {base.name}", remedy=remedy)
    return model


def _prefix(names: Mapping[str, Any], expected: set[str], candidates: tuple[str, ...]) -> str:
    """Return what must be taken off the names so that most of them are the trunk's."""
    dotted = {"", *candidates}
    for candidate in candidates:  # of `model.decoder.` the trunk's own names may begin with `decoder.`
        parts = candidate.split(".")[:-1]
        dotted |= {"".join(f"{part}." for part in parts[:count]) for count in range(len(parts))}
    fitting = {
        prefix: sum(name.startswith(prefix) and name.removeprefix(prefix) in expected for name in names)
        for prefix in sorted(dotted)
    }
    return max(fitting, key=lambda prefix: (fitting[prefix], -len(prefix)))


def _is_known(name: str, tensor: Tensor, trunk: Mapping[str, Tensor], config: Any) -> bool:
    """Whether a tensor outside the trunk does without: a language model's head, statistics, a second copy."""
    if HARMLESS.search(name) or ".normalizer." in f".{name}":
        return True
    if tensor.shape[:1] == (config.get_text_config().vocab_size,):
        return True
    endings = (name.split(".", count)[-1] for count in range(1, name.count(".") + 1))
    return any(ending in trunk and torch.equal(trunk[ending], tensor) for ending in endings)


# ------------------------------------------------------------------------------------------ logits of tokens


def _read_language_model(source: Source, requested: ReadOptions, kind: Kind, tokenizer: Any) -> Network:
    """Take rows of a language model's head as the head; refuse models that do more to their logits."""
    config = _config_of_kind(source, kind)
    model, info = _from_pretrained(
        MODEL_FOR_CAUSAL_LM_MAPPING[type(config)],
        None if source.is_file else source.folder,
        f"{source.name} cannot be loaded as a language model",
        config=config,
        **({"state_dict": source.tensors()} if source.is_file else {}),
        dtype=source.stored_dtype(),
    )
    _refuse_tensors(source.name, info, expected="complete language model")
    _refuse_not_finite(source.name, model.state_dict())
    ids = [_score_token(source, tokenizer, token) for token in requested.score_tokens]
    rows: Any = model.eval().get_output_embeddings()
    if max(ids) >= len(rows.weight):
        raise ConversionError(
            f"{source.name}: {max(ids)} of --score_tokens is no row of its head, which has {len(rows.weight)}"
        )
    bias = getattr(rows, "bias", None)
    layer = LinearLayer(
        rows.weight[ids].detach().clone(), None if bias is None else bias[ids].detach().clone()
    )
    _check_logits_are_linear(source, model, layer, ids)
    labels = tuple(requested.score_tokens) if len(ids) > 1 else ("reward",)
    return Network(
        model.base_model,
        Head((layer,)),
        kind.pooling,
        labels,
        kind,
        sha256=source.sha256(),
        statistics=statistics_of(kind.config, {}),
    )


# What some classes do to their logits behind the head: Gemma-2, Cohere, Granite.
_BEHIND_THE_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def _score_token(source: Source, tokenizer: Any, token: str) -> int:
    if token.startswith("id:") and token[3:].isdecimal():
        return int(token[3:])
    piece = tokenizer.get_vocab().get(token)
    ids = list(tokenizer(token, add_special_tokens=False).input_ids)
    if piece is not None and len(ids) == 1 and ids != [piece]:
        # Sentencepiece: "+" by itself is "▁+", and "+" only inside a word.
        raise ConversionError(
            f"{source.name}: {token!r} of --score_tokens may mean {piece} ({token!r} in the vocabulary) or "
            f"{ids[0]} ({tokenizer.convert_ids_to_tokens(ids[0])!r}, which the text is by itself): give the "
            "number as id:N, or the longer of the two"
        )
    ids = ids if piece is None else [piece]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise ConversionError(
            f"{source.name}: {token!r} of --score_tokens is no single token that the tokenizer knows "
            f"({ids}): give the text of one, or its number as id:N"
        )
    return int(ids[0])


@torch.inference_mode()
def _check_logits_are_linear(source: Source, model: Any, layer: LinearLayer, ids: list[int]) -> None:
    """Raise ConversionError where the class does more to its logits than the head, a soft cap for example."""
    row = torch.arange(3, 3 + min(5, model.config.get_text_config().vocab_size - 3))[None]
    logits = model(input_ids=row).logits[0, :, ids].float()
    states = model.base_model(input_ids=row).last_hidden_state[0].float()
    linear = nn.functional.linear(
        states, layer.weight.float(), None if layer.bias is None else layer.bias.float()
    )
    settings = model.config.get_text_config()
    capped = any(getattr(settings, name, None) not in (None, 1, 1.0) for name in _BEHIND_THE_HEAD)
    if capped or not torch.allclose(logits, linear, atol=1e-2, rtol=1e-2):
        raise ConversionError(
            f"{source.name}: {type(model).__name__} makes more of its logits than its head gives (a soft "
            "cap, a scale), so its rows alone would score otherwise"
        )


# ----------------------------------------------------------------------------- classes of a checkpoint's own


def _read_custom(source: Source, kind: Kind, tokenizer: Any) -> Network:
    if source.is_file:
        raise ConversionError(f"{source.name}: a class of its own is loaded from its folder: give that")
    auto_class: Any = getattr(transformers, str(kind.auto_class))
    allow_older_code(source.folder)
    model, info = _from_pretrained(
        auto_class,
        source.folder,
        f"{source.name} cannot be loaded with {kind.auto_class}.from_pretrained(trust_remote_code=True)",
        dtype=source.stored_dtype(),
        trust_remote_code=True,
    )
    _refuse_tensors(source.name, info, expected=f"complete {type(model).__name__}")
    _refuse_not_finite(source.name, model.state_dict())
    output, outputs = find_output(source, model.eval(), tokenizer)
    labels = [str(label) for label in getattr(model.config, "id2label", {}).values()]
    if len(labels) != outputs:
        labels = [f"reward_{index}" for index in range(outputs)]
    return Network(model, None, "hf", _output_names(labels), kind, sha256=source.sha256(), output=output)


@torch.inference_mode()
def find_output(source: Source, model: Any, tokenizer: Any) -> tuple[str, int]:
    """Ask a class for the scores of one sample; return where they stand in the reply, and how many there are.

    Raises:
        ConversionError: the class fails, or returns nothing that is one row of scores.
    """
    messages = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "It is 4."}]
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    else:
        ids = list(tokenizer(" ".join(message["content"] for message in messages)).input_ids)
    closing = getattr(model.config, "reward_token_id", None)
    row = torch.tensor([[*ids, closing] if closing is not None else ids])
    try:
        reply = model(input_ids=row, attention_mask=torch.ones_like(row))
    except Exception as error:  # code of others raises what it likes
        raise ConversionError(
            f"{source.name}: its own class {type(model).__name__} fails on a dialogue of {row.shape[1]} "
            f"tokens: {first_line(error)}"
        ) from error
    for name, value in _parts_of(reply):
        shape = tuple(value.shape)
        if shape in ((), (1,)) or (len(shape) == 2 and shape[0] == 1 and shape[1] != row.shape[1]):
            return name, shape[1] if len(shape) == 2 else 1
    shapes = ", ".join(f"{name or 'a tensor'} {list(value.shape)}" for name, value in _parts_of(reply))
    raise ConversionError(
        f"{source.name}: {type(model).__name__} returns nothing that is one row of scores for a sample "
        f"({shapes}); without --trust_remote_code a head of linear layers is read by its tensors"
    )


_OUTPUTS = ("logits", "score", "scores", "end_scores", "rewards", "reward", "value")


def _parts_of(reply: Any) -> list[tuple[str, Tensor]]:
    """Return the tensors of a reply that may be scores, the likeliest first."""
    if isinstance(reply, Tensor):
        return [("", reply)]
    if isinstance(reply, (tuple, list)):
        return [(str(index), value) for index, value in enumerate(reply) if isinstance(value, Tensor)]
    found = [
        (name, reply.get(name) if isinstance(reply, dict) else getattr(reply, name, None))
        for name in _OUTPUTS
    ]
    return [(name, value) for name, value in found if isinstance(value, Tensor)]


# --------------------------------------------------------------------------------------------------- adapters


def _read_adapter(source: Source, requested: ReadOptions, kind: Kind) -> Network:
    """Merge an adapter in float32; in half precision the sum of base and adapter would be rounded again."""
    base = find_source(base_model_of(source, requested.base_model))
    settings = json.loads((source.folder / ADAPTER_FILE).read_text(encoding="utf-8"))
    if settings.get("task_type") not in ("SEQ_CLS", "TOKEN_CLS"):
        raise ConversionError(
            f"{source.name} is an adapter for {settings.get('task_type')}, which gives no scores; "
            "an adapter of a reward model says SEQ_CLS or TOKEN_CLS"
            + (
                f"; merge it into {base.name}, and put {source.heads[0].name} beside that"
                if source.heads
                else ""
            )
        )
    is_process_reward = settings["task_type"] == "TOKEN_CLS"
    auto_class = AutoModelForTokenClassification if is_process_reward else AutoModelForSequenceClassification
    model = _base_with_head(auto_class, source, base, requested.trust_remote_code)
    try:
        merged = merge_saved_adapter(model, str(source.folder))
    except ModelError as error:
        raise ConversionError(str(error)) from error
    _refuse_not_finite(source.name, merged.state_dict())
    kind = replace(kind, name="process" if is_process_reward else "classifier", config=base.config())
    return _classifier(merged.eval(), kind, sha256=source.sha256() + base.sha256(), base_model=base.name)


def _base_with_head(auto_class: Any, source: Source, base: Source, trust_remote_code: bool) -> Any:
    """Load the base as a classifier; where the base has no head, the adapter must bring one."""
    saved = {
        name.removeprefix(_ADAPTER_PREFIX): tensor
        for path in source.weights
        for name, tensor in tensors_in(path).items()
        if name.startswith(_ADAPTER_PREFIX) and "lora_" not in name
    }
    config = _config_of(base, trust_remote_code)
    outputs = {tensor.shape[0] for name, tensor in saved.items() if name.split(".")[-2] in _LAST_LAYERS}
    if len(outputs) == 1:
        config.num_labels = outputs.pop()
    model, info = _from_pretrained(
        auto_class,
        base.folder,
        f"{base.name}, the base model of {source.name}, cannot be loaded",
        config=config,
        dtype=torch.float32,
        trust_remote_code=trust_remote_code,
    )
    without_saved = {
        "missing_keys": {name for name in info["missing_keys"] if name not in saved},
        "mismatched_keys": {entry for entry in info["mismatched_keys"] if entry[0] not in saved},
        "unexpected_keys": info["unexpected_keys"],
    }
    _refuse_tensors(f"{source.name} on {base.name}", without_saved, expected="complete classifier")
    return model


# ---------------------------------------------------------------------------------------------- all the kinds


def _config_of(source: Source, trust_remote_code: bool = False) -> Any:
    try:
        return AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds for the same thing
        raise ConversionError(
            f"{source.name} cannot be loaded, it has no configuration that transformers knows "
            f"({first_line(error)}); give a classifier's folder, or --base_model for a value head's weights"
        ) from error


def _from_pretrained(
    model_class: Any, folder: Path | None, failure: str, **settings: Any
) -> tuple[Any, dict[str, Any]]:
    """Load a model, and the report on its tensors that `_refuse_tensors` reads.

    failure: begins the message of the ConversionError that is raised where transformers fails.
    settings: further arguments of `from_pretrained`.
    """
    try:
        return model_class.from_pretrained(
            folder,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused by name, in `_refuse_tensors`
            **settings,
        )
    except Exception as error:  # transformers raises many kinds for the same thing
        raise ConversionError(f"{failure}: {first_line(error)}") from error


def _refuse_tensors(name: str, info: dict[str, Any], *, expected: str, remedy: str = "") -> None:
    """Raise ConversionError, naming the tensors, unless the weights are just those of the model.

    info: the report of `from_pretrained` with `output_loading_info`.
    expected: what the weights should be, for the message.
    """
    misshapen = sorted(
        f"{key} is {list(shape)} instead of {list(expected_shape)}"
        for key, shape, expected_shape in info["mismatched_keys"]
    )
    unknown = [key for key in info["unexpected_keys"] if not HARMLESS.search(key)]
    if misshapen:
        raise ConversionError(
            f"{name} is no {expected}: tensors of another shape: {some(misshapen)}"
            f"{remedy or '; config.json and weights are of different models'}"
        )
    if info["missing_keys"]:
        raise ConversionError(
            f"{name} is no {expected}: {some(info['missing_keys'])} missing, and would be random; "
            "train a reward model first, or give the checkpoint that has the head"
        )
    if unknown:
        raise ConversionError(
            f"{name} is no {expected}: it has tensors that the model does not know, {some(unknown)}; "
            f"scores without them would be another model's{remedy}"
        )


def _refuse_not_finite(name: str, tensors: dict[str, Tensor]) -> None:
    """Raise ConversionError, naming the first tensor that holds NaN or infinity."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ConversionError(f"{name}: weight {key} holds NaN or infinity; the training diverged")
