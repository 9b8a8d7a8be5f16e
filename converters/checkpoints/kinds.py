"""What kind of reward model a checkpoint is: by its configuration, the names and shapes of tensors, its code.

No torch and no transformers here, so that `--explain` answers at once. What is decided here is carried out,
and held against the real classes, in `architectures.py`.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from conch.converters.checkpoints.files import HARMLESS, Source, TensorInfo, find_source, some
from conch.converters.checkpoints.own_code import activation_in_code
from conch.converters.options import ReadOptions
from conch.errors import ConversionError
from conch.store.manifest import HeadActivation, Pooling

KindName = Literal["classifier", "process", "head", "tokens", "custom", "adapter"]
"""`classifier`: a sequence classifier of transformers. `process`: a score at the end of every step. `head`:
linear layers on a known trunk, found by their tensors. `tokens`: a language model that scores by the logits
of tokens. `custom`: a class that came with the checkpoint. `adapter`: merged into what it was trained on."""

Described = Mapping[str, TensorInfo]
"""Names of a checkpoint's tensors -> what they are."""

_LAYER = re.compile(r"^(?P<root>.*?)(layers?|h|blocks?)\.\d+\.")
_EMBEDDING = re.compile(
    r"^(?P<root>.*?)(embed_tokens|word_embeddings|tok_embeddings|embed_in|embed_positions|wte|wpe|embeddings)\."
)
_NORMALIZER = re.compile(r"(^|\.)normalizer\.(mean|var|count)$")
_AUTO_CLASSES = ("AutoModelForSequenceClassification", "AutoModelForTokenClassification", "AutoModel")
_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")
_OF_THE_REWARD = (
    *("architectures", "auto_map", "num_labels", "id2label", "label2id", "reward_token_id"),
    *("mean", "std", "normalize_reward", "do_normalize", "score_type", "normalize_function"),
)
_NATIVE_HEADS = ("score", "classifier")
_PROCESS = ("ForTokenClassification", "ProcessReward")


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of checkpoint, and what its files say of it.

    config: `config.json` of the network; of the base model where the checkpoint has none.
    model_type: by which transformers knows the trunk; "" where only the checkpoint's own class does.
    head: names of the head's linear layers, in order; () where the network's own class has the head.
    outputs: of the head; None where only the class tells.
    activation: between two layers; None where there is one layer, or nothing says.
    pooling: by default.
    closing_token_id: that config.json names as the place of the score; None where it names none.
    auto_class: of `custom`.
    base: what a checkpoint without configuration, or with an unknown one, was built on.
    root: what the names of the trunk's tensors begin with.
    scores_tokens: whether the outputs are logits of tokens.
    decisions: what was found -> value and where it comes from.
    """

    name: KindName
    config: dict[str, Any] = field(default_factory=dict)
    model_type: str = ""
    head: tuple[str, ...] = ()
    outputs: int | None = None
    activation: HeadActivation | None = None
    pooling: Pooling = "hf"
    closing_token_id: int | None = None
    auto_class: str | None = None
    base: Source | None = None
    root: str = ""
    scores_tokens: bool = False
    decisions: dict[str, str] = field(default_factory=dict)


def recognise(source: Source, requested: ReadOptions) -> Kind:
    """Find out what a checkpoint is.

    Raises:
        ConversionError: it is no reward model that scores one answer, or something must be said first.
    """
    if source.is_adapter:
        _refuse_options(source, requested, ("head_activation", "score_tokens"), "an adapter")
        return Kind("adapter", decisions={"kind": "adapter (adapter_config.json)"})
    config, base = source.config(), None
    _refuse_pairwise(source, config)
    if requested.base_model is not None:
        base = find_source(requested.base_model, weights=False)
        config = _with_base(config, base.config())
    if not config:
        raise ConversionError(
            f"{source.name} has no configuration that transformers knows: there is no config.json; give a "
            "model's folder, or say with --base_model which model it was trained from"
        )
    described = {name: info for name, info in source.described().items() if not _NORMALIZER.search(name)}
    found = _Evidence(source, requested, config, known_type(config, described), described, base)
    if requested.score_tokens:
        _refuse_options(source, requested, ("head_activation",), "a model that scores by logits of tokens")
        return _language_model(found)
    auto_class = _auto_class(config)
    if auto_class and requested.trust_remote_code and not found.is_process:
        _refuse_options(source, requested, ("head_activation",), "a class of its own")
        return _custom(found, auto_class)
    root = trunk_root(described)
    layers, others = head_layers(described, root, config)
    is_native = _is_native(found.architecture, found.model_type) and not _is_foreign(found, layers)
    if is_native or (not found.architecture and _has_native_head(layers, others)):
        _refuse_options(source, requested, ("head_activation",), found.architecture or "a classifier")
        return _native(found, layers)
    if found.model_type and layers:
        return _head(found, layers, root)
    raise ConversionError(_why_not(found, others, auto_class, root))


@dataclass(frozen=True, slots=True)
class _Evidence:
    """What a checkpoint's files and the options say; fields as of `Kind`."""

    source: Source
    requested: ReadOptions
    config: dict[str, Any]
    model_type: str
    described: Described
    base: Source | None

    @property
    def architecture(self) -> str:
        return architecture_of(self.config)

    @property
    def is_process(self) -> bool:
        said = self.requested.step_separator is not None or self.requested.pooling == "steps"
        return said or any(mark in self.architecture for mark in _PROCESS)


def architecture_of(config: Mapping[str, Any]) -> str:
    """Return the class that a configuration names first, "" where it names none."""
    return str((config.get("architectures") or [""])[0])


def known_type(config: Mapping[str, Any], described: Described) -> str:
    """Return the model type by which transformers knows the trunk; "" where it knows none.

    An unknown type that begins with a known one means that: `gpt_neox_reward_model` is `gpt_neox`.
    """
    given = str(config.get("model_type") or "")
    parts = given.split("_")
    for end in range(len(parts), 0, -1):
        for found in ("_".join(parts[:end]), "-".join(parts[:end])):
            if found in _model_types():
                return found if found == given or _fits(found, described) else ""
    return ""


def trunk_root(described: Described) -> str:
    """Return what the names of the trunk's tensors have in common: `model.`, `gpt_neox.`, or "".

    Of a state dict that holds the trunk under two names, one of them.
    """
    roots = [match["root"] for name in filter(_is_in_trunk, described) if (match := _LAYER.match(name))]
    roots += [match["root"] for name in described if (match := _EMBEDDING.match(name))]
    if not roots:
        return ""
    most = max(set(roots), key=lambda root: (roots.count(root), root)).split(".")[:-1]
    alike = [parts for root in roots if (parts := root.split(".")[:-1])[:1] == most[:1]]
    common = 0
    while common < len(most) and all(parts[common : common + 1] == [most[common]] for parts in alike):
        common += 1
    return "".join(f"{part}." for part in most[:common])


def head_layers(
    described: Described, root: str, config: Mapping[str, Any]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Find the head among the tensors outside the trunk.

    Returns:
        the names of its one or two linear layers, in order, () where they are no chain of such; and the names
        of all tensors outside the trunk.
    """
    settings, width = text_config(config), _width(config)
    trunk_parts = _trunk_parts(root, described)
    outside = {
        name: info
        for name, info in described.items()
        if not (root and name.startswith(root))
        and name.partition(".")[0] not in trunk_parts
        and not HARMLESS.search(name)
        and not _is_lm_head(info, settings.get("vocab_size"), width)
    }
    shapes = {name[: -len(".weight")]: outside[name].shape for name in outside if name.endswith(".weight")}
    known = {f"{layer}.{part}" for layer in shapes for part in ("weight", "bias")}
    is_linear = not set(outside) - known and all(len(shape) == 2 for shape in shapes.values())
    if is_linear and 1 <= len(shapes) <= 2:
        for names in (sorted(shapes), sorted(shapes, reverse=True)):
            incoming = [width, *(shapes[name][0] for name in names[:-1])]
            is_chain = [shapes[name][1] for name in names] == incoming
            if is_chain and (len(names) == 1 or shapes[names[-1]][0] < shapes[names[-1]][1]):
                return tuple(names), tuple(outside)
    return (), tuple(outside)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a configuration that describes the text model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) and "hidden_size" not in config else config


def _width(config: Mapping[str, Any]) -> int:
    """Return the width of the trunk's states; 0 where the configuration does not say."""
    settings = text_config(config)
    return next((int(settings[key]) for key in _WIDTHS if settings.get(key)), 0)


# ------------------------------------------------------------------------------------------------ the kinds


def _native(found: _Evidence, layers: tuple[str, ...]) -> Kind:
    """A class of transformers; how many outputs it has is what its head's tensors say."""
    is_process = found.architecture.endswith("ForTokenClassification")
    what = found.architecture or f"sequence classifier of {found.model_type}"
    return Kind(
        "process" if is_process else "classifier",
        found.config,
        found.model_type,
        outputs=found.described[f"{layers[-1]}.weight"].shape[0] if layers else None,
        pooling="steps" if is_process else "hf",
        base=found.base,
        decisions={"kind": f"{what}, a class of transformers (config.json)"},
    )


def _head(found: _Evidence, layers: tuple[str, ...], root: str) -> Kind:
    source, config = found.source, found.config
    what = "process reward" if found.is_process else "reward"
    shapes = " -> ".join(f"{name} {list(found.described[f'{name}.weight'].shape)}" for name in layers)
    decisions = {
        "kind": f"{what} head on a trunk of the type {found.model_type} (names of tensors)",
        "head": f"{shapes} (names and shapes of tensors)",
    }
    activation, why = found.requested.head_activation, "--head_activation"
    if len(layers) == 1 and activation is not None:
        raise ConversionError(
            f"{source.name}: its head is one linear layer ({shapes}), so --head_activation has no place"
        )
    if len(layers) == 2:
        if activation is None:
            activation, why = activation_in_code(source.folder, layers[0].partition(".")[0])
        decisions["head activation"] = f"{activation or 'not known'} ({why})"
    if config.get("auto_map"):
        decisions["own class"] = "not run: its trunk and its head are known (--trust_remote_code runs it)"
    is_value_head = layers == ("v_head",) and not (source.folder / "config.json").is_file()
    return Kind(
        "process" if found.is_process else "head",
        config,
        found.model_type,
        head=layers,
        outputs=found.described[f"{layers[-1]}.weight"].shape[0],
        activation=activation,
        pooling="steps" if found.is_process else "first_eos" if is_value_head else "last_token",
        closing_token_id=config.get("reward_token_id"),
        base=found.base,
        root=root,
        decisions=decisions,
    )


def _language_model(found: _Evidence) -> Kind:
    if not found.model_type:
        raise ConversionError(
            f"{found.source.name}: --score_tokens reads rows of a language model's head, and transformers "
            f"knows no model of the type {found.config.get('model_type')!r}; give --base_model"
        )
    tokens = ", ".join(found.requested.score_tokens)
    return Kind(
        "process" if found.is_process else "tokens",
        found.config,
        found.model_type,
        outputs=len(found.requested.score_tokens),
        pooling="steps" if found.is_process else "last_token",
        base=found.base,
        scores_tokens=True,
        decisions={
            "kind": f"language model {found.architecture} that scores by logits (--score_tokens)",
            "head": f"rows of the language model's head for {tokens} (--score_tokens)",
        },
    )


def _custom(found: _Evidence, auto_class: str) -> Kind:
    return Kind(
        "custom",
        found.config,
        auto_class=auto_class,
        closing_token_id=found.config.get("reward_token_id"),
        decisions={
            "kind": f"own class {found.config['auto_map'][auto_class]} (auto_map, --trust_remote_code)",
            "head": "inside the own class",
            "pooling": "inside the own class",
        },
    )


# -------------------------------------------------------------------------------------------------- evidence


def _with_base(config: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Return the checkpoint's configuration where transformers knows its type, else the base model's.

    What a reward model says of itself stays: its class, its code.
    """
    if _modeling_file(str(config.get("model_type", ""))) is not None:
        return config
    return {**base, **{key: config[key] for key in _OF_THE_REWARD if key in config}}


def _refuse_options(source: Source, requested: ReadOptions, names: tuple[str, ...], what: str) -> None:
    for name in names:
        if getattr(requested, name):
            raise ConversionError(f"{source.name} is {what}, for which --{name} has no place: leave it out")


def _auto_class(config: Mapping[str, Any]) -> str | None:
    auto_map = config.get("auto_map")
    known = auto_map if isinstance(auto_map, dict) else {}
    return next((name for name in _AUTO_CLASSES if known.get(name)), None)


def _is_native(architecture: str, model_type: str) -> bool:
    if not architecture.endswith(("ForSequenceClassification", "ForTokenClassification")):
        return False
    file = _modeling_file(model_type)
    return file is not None and bool(re.search(rf"^class {re.escape(architecture)}\b", _text(file), re.M))


def _is_foreign(found: _Evidence, layers: tuple[str, ...]) -> bool:
    """Whether the head is another one than that of the class that config.json names.

    A decoder's class has one layer, `score`, without bias, in the model's own files.
    """
    file = _modeling_file(found.model_type)
    code = "" if file is None else _text(file)
    tops = {name.partition(".")[0] for name in layers}
    if not layers or ("self.classifier =" in code and "classifier" in tops):
        return False
    if found.architecture.endswith("ForTokenClassification"):
        return layers != ("score",)
    in_files = {f"{path.stem}.weight" for path in found.source.heads}
    return layers != ("score",) or "score.bias" in found.described or "score.weight" in in_files


def _has_native_head(layers: tuple[str, ...], others: tuple[str, ...]) -> bool:
    return any(name.partition(".")[0] in _NATIVE_HEADS for name in (*layers, *others))


@functools.cache
def _modeling_file(model_type: str) -> Path | None:
    """Where transformers has the classes of a model type, without importing it; None where it has none."""
    name = _model_types().get(model_type)
    file = _transformers() / "models" / str(name) / f"modeling_{name}.py"
    return file if file.is_file() else None


def _transformers() -> Path:
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.origin is not None  # a dependency
    return Path(spec.origin).parent


@functools.cache
def _model_types() -> dict[str, str]:
    """Model types that transformers knows -> folder of their classes: its own table, which needs no torch."""
    file = _transformers() / "models" / "auto" / "auto_mappings.py"
    spec = importlib.util.spec_from_file_location("transformers_auto_mappings", file)
    assert spec is not None and spec.loader is not None
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    folders: dict[str, str] = table.SPECIAL_MODEL_TYPE_TO_MODULE_NAME
    return {name: folders.get(name) or name.replace("-", "_") for name in table.CONFIG_MAPPING_NAMES}


@functools.cache
def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def _fits(model_type: str, described: Described) -> bool:
    """Whether the tensors' names begin with the prefix of a model of this type."""
    file = _modeling_file(model_type)
    prefixes = set(re.findall(r'base_model_prefix = "(\w+)"', _text(file))) if file else set()
    return any(part in prefixes for name in described for part in name.split(".")[:2])


def _trunk_parts(root: str, described: Described) -> set[str]:
    """Return the first parts of names, beside those that begin with `root`, that are the trunk's."""
    tops = {each.partition(".")[0] for each in described if _is_in_trunk(each)}
    if root:  # a second copy of the trunk, under another name, is no head either
        return tops - {root.partition(".")[0]}
    # A trunk without a name of its own: what stands beside its layers is a head where it has a matrix.
    matrices = {each.partition(".")[0] for each, info in described.items() if len(info.shape) == 2}
    return tops | {"pooler"} | ({each.partition(".")[0] for each in described} - matrices)


def _is_in_trunk(name: str) -> bool:
    """Whether a name is that of an embedding, or of a part inside a numbered layer, such as its attention."""
    layer = _LAYER.match(name)
    return bool(_EMBEDDING.match(name)) or (layer is not None and "." in name[layer.end() :])


def _is_lm_head(info: TensorInfo, vocabulary: int | None, width: int) -> bool:
    return bool(info.shape) and info.shape[0] == vocabulary and info.shape[1:] in ((width,), ())


def _refuse_pairwise(source: Source, config: Mapping[str, Any]) -> None:
    architecture = architecture_of(config)
    wanted = "it gives one answer no score, and a trainer needs a model that scores an answer by itself"
    if "PairRM" in architecture or _has_candidate_tokens(source.folder):
        raise ConversionError(
            f"{source.name} is pairwise: it says which of two answers to a prompt is better; {wanted}"
        )
    if config.get("is_encoder_decoder", config.get("model_type") == "t5") and not architecture.endswith(
        "ForSequenceClassification"
    ):
        raise ConversionError(
            f"{source.name} is an encoder-decoder that writes text ({architecture}), as pairwise models do "
            f"that name the better of two answers; {wanted}"
        )


def _has_candidate_tokens(folder: Path) -> bool:
    names = ("added_tokens.json", "tokenizer_config.json", "special_tokens_map.json")
    files = [folder / name for name in names if (folder / name).is_file()]
    return any("<|candidate1|>" in file.read_text(encoding="utf-8", errors="replace") for file in files)


def _why_not(found: _Evidence, others: tuple[str, ...], auto_class: str | None, root: str) -> str:
    """Say why a checkpoint cannot be served as it was given, and what to do."""
    name, architecture = found.source.name, found.architecture or "no architecture"
    own_class = f"its own class ({architecture}, auto_map in config.json): --trust_remote_code runs it"
    if not found.described:
        return f"{name} holds no weights: give the folder or file that has them"
    if not found.model_type and auto_class:
        return f"{name} needs {own_class}"
    if not found.model_type:
        return (
            f"{name} has no configuration that transformers knows: its model type is "
            f"{found.config.get('model_type')!r}; say with --base_model which model its trunk is (its "
            f"tensors begin with {root or some(found.described, 1)!r})"
        )
    if others and auto_class:
        return f"{name} has a head that is no chain of linear layers ({some(others)}) and needs {own_class}"
    width = _width(found.config)
    shapes = {each: found.described[each].shape for each in others}
    (only, *more) = sorted(each for each in shapes if each.endswith(".weight")) or [""]
    if only and not more and len(shapes[only]) == 2 and shapes[only][1] != width:
        return (
            f"{name}: {only} is {list(shapes[only])}, but the base model's states are {width} wide; give the "
            "--base_model that the checkpoint was trained from"
        )
    if others:
        return (
            f"{name}: its head is no chain of one or two linear layers on states of width {width} "
            f"({some(others)}), so only the code that trained it can run it, and the checkpoint brings none "
            "(auto_map in config.json); if its trunk is of another kind, give --base_model"
        )
    return (
        f"{name} is a language model ({architecture}) without a reward head: its head is missing, and would "
        "be random; train a reward model first, or give the checkpoint that has the head. If it scores by "
        "the logits of tokens, name them with --score_tokens (--recipe list shows some); if it writes which "
        "of two answers is better (pairwise), it gives one answer no score"
    )
