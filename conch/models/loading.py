"""Load models and tokenizers, and refuse those that cannot be used, with the reason."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import NewGELUActivation
from transformers.utils.logging import disable_progress_bar

from conch.config import ModelConfig, TokenizerConfig
from conch.errors import ConfigError, ModelError, first_line
from conch.log import get_logger
from conch.models.adapter import merge_saved_adapter
from conch.models.folders import adapter_base, model_folder
from conch.models.kernels import apply_kernels, check_architecture
from conch.models.padding import pad_token_hint, with_pad_token

_log = get_logger(__name__)

if not sys.stderr.isatty():
    disable_progress_bar()  # transformers draws one per checkpoint read or written, also into log files


_POSITIONS_BEHIND_PAD = frozenset(
    {
        *("camembert", "data2vec-text", "ibert", "jina_embeddings_v3", "layoutlmv3", "lilt", "longformer"),
        *("luke", "markuplm", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl"),
        "xmod",
    }
)
"""Model types that count positions from `pad_token_id + 1` on, as RoBERTa does."""


_ALIGNMENT = 64
"""Bytes; what torch allocates on the CPU begins at a multiple."""

_ORIGINALS = "_conch_dropout_of_configs"
"""Attribute of a model: configs, names and values that `disable_dropout` has set to 0."""


def load_lm(config: ModelConfig) -> PreTrainedModel:
    """Load a language model: a decoder, or an encoder-decoder where the model's config says so.

    A `path` that holds an adapter gives the adapter's base model with the adapter merged in.

    Raises:
        ModelError: the model is missing, unreadable or incomplete.
        ConfigError: `architecture` has an unknown model type or key, or the model supports no such kernels.
    """
    return _load(_lm_class, config)


def _lm_class(model_config: PretrainedConfig) -> Any:
    check_start_token(model_config)
    return AutoModelForSeq2SeqLM if model_config.is_encoder_decoder else AutoModelForCausalLM


def check_start_token(model_config: PretrainedConfig) -> None:
    """Refuse an encoder-decoder whose config does not name the token that its decoder reads first."""
    if model_config.is_encoder_decoder and getattr(model_config, "decoder_start_token_id", None) is None:
        raise ConfigError(
            f"the {model_config.model_type} has no `decoder_start_token_id`, which its decoder reads first: "
            "set it in `model.architecture` or in the model's config.json (T5 takes its pad token)"
        )


def load_sequence_classifier(config: ModelConfig, *, num_labels: int, pad_token_id: int) -> PreTrainedModel:
    """Load a reward model: a decoder or encoder with a linear head of `num_labels` outputs.

    A decoder's head is read at the last real token; it starts as N(0, 1/(d+1)) with zero bias (Stiennon et
    al. 2020, appendix B) unless the checkpoint has one.

    Raises:
        ModelError: the model is missing, unreadable or incomplete.
        ConfigError: `architecture` has an unknown model type or key, or the model supports no such kernels.
    """
    return _load(
        lambda _: AutoModelForSequenceClassification,
        config,
        new_head_allowed=True,
        num_labels=num_labels,
        pad_token_id=pad_token_id,
    )


def load_tokenizer(
    config: TokenizerConfig, model_path: str | None = None, *, reward_model: bool = False
) -> PreTrainedTokenizerBase:
    """Load a tokenizer that has an eos token and a pad token; see `with_pad_token` for which.

    model_path: where to look if `config` names no path.
    reward_model: of a reward model, which must not pad with eos.

    Raises:
        ConfigError: no path is known, or the pad token of `config` is not in the vocabulary.
        ModelError: there is no tokenizer, or it lacks a token.
    """
    path, setting = (config.path, "tokenizer.path") if config.path else (model_path, "model.path")
    if path is None:
        raise ConfigError("no tokenizer: give `tokenizer.path`, or `model.path` of a folder that has one")
    path = model_folder(path, setting)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    # A damaged tokenizer.json surfaces as a bare Exception of the tokenizers library.
    except Exception as error:
        raise ModelError(_cannot_load("tokenizer", path, error, setting)) from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        # transformers makes up such a tokenizer for a folder that holds a model alone.
        raise ModelError(f"{path!r} holds no tokenizer: give `tokenizer.path`")
    tokenizer = with_pad_token(tokenizer, config.pad_token, name=path, reward_model=reward_model)
    check_tokenizer(tokenizer, name=path)
    tokenizer.padding_side = "left"
    set_truncation_side(tokenizer, config.truncation_side)
    keep_legacy(tokenizer)
    return tokenizer


def set_truncation_side(tokenizer: PreTrainedTokenizerBase, side: str) -> None:
    """Cut on this side, now and once saved and loaded: a served reward model cuts as it was trained."""
    tokenizer.truncation_side = side
    tokenizer.init_kwargs["truncation_side"] = side  # this is what `save_pretrained` writes


def keep_legacy(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a Llama tokenizer be saved with its `legacy`, which transformers 5.23 leaves out.

    Loaded without it, the tokenizer puts no space behind special tokens: other ids for the same text.
    """
    legacy = getattr(tokenizer, "legacy", None)
    if legacy is not None:
        tokenizer.init_kwargs["legacy"] = legacy


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, *, name: str) -> None:
    """Refuse a tokenizer without eos or pad token.

    Raises:
        ModelError: a token is missing.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {name!r} has no eos token: a policy could never end a sample; "
            "set `eos_token` in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        raise ModelError(
            f"the tokenizer of {name!r} has no pad token, nor a token that no text contains: add one to "
            f"tokenizer and model, or name a rare one, {pad_token_hint()}"
        )


def context_window(model_config: PretrainedConfig) -> int | None:
    """Tokens that the model can attend over; None where positions are relative or the config names none."""
    if model_config.is_encoder_decoder and hasattr(model_config, "relative_attention_num_buckets"):
        return None  # T5 and its kin may name the length of their pretraining, which is no limit
    for key in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        value = getattr(model_config.get_text_config(), key, None)
        if isinstance(value, int) and value > 0:
            return value - first_position(model_config)
    return None


def vocabulary_size(model: PreTrainedModel) -> int:
    """Tokens that the model has embeddings for."""
    embeddings: Any = model.get_input_embeddings()
    # An adapter that trains a copy of them has wrapped them.
    embeddings = getattr(embeddings, "original_module", embeddings)
    assert isinstance(embeddings, nn.Embedding)
    return embeddings.num_embeddings


def first_position(model_config: PretrainedConfig) -> int:
    """Position id of a text's first token: 0, or 1 behind the pad token's id where RoBERTa set the custom."""
    if model_config.model_type not in _POSITIONS_BEHIND_PAD:
        return 0
    return int(model_config.pad_token_id) + 1


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks, of the decoder where there is an encoder, too.

    They are found as the one ModuleList with as many members as the config says, whatever its name.

    Raises:
        ModelError: there is no such list, or more than one.
    """
    decoder = model.get_decoder() if model.config.is_encoder_decoder else model
    config = decoder.config.get_text_config()
    # BART and its kin keep one config for both stacks, in which `num_hidden_layers` is the encoder's.
    count = getattr(config, "decoder_layers", config.num_hidden_layers)
    stacks: dict[str, nn.ModuleList] = {}
    for name, module in decoder.named_modules():
        # T5's blocks are made of lists themselves.
        is_inside = name.startswith(tuple(f"{outer}." for outer in stacks))
        if isinstance(module, nn.ModuleList) and len(module) == count > 0 and not is_inside:
            stacks[name] = module
    if len(stacks) != 1:
        raise ModelError(
            f"{type(model).__name__} has {len(stacks)} stacks of {count} layers, one is needed: "
            "use `model.num_layers_unfrozen=-1`"
        )
    return next(iter(stacks.values()))


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, of activations and of whole layers, and silence routers.

    Some architectures hold probabilities in modules, some in plain attributes (`attn_pdrop`, `layerdrop`),
    and some read their config in each forward pass. `original_dropout` brings back what configs held.
    """
    originals: list[tuple[Any, str, float]] = getattr(model, _ORIGINALS, [])
    setattr(model, _ORIGINALS, originals)
    for module in model.modules():
        _silence_routing(module)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        holders = [module, module.config] if isinstance(module, PreTrainedModel) else [module]
        for holder in holders:
            for name, value in list(vars(holder).items()):
                if "drop" in name and isinstance(value, float):
                    if holder is not module and value:
                        originals.append((holder, name, value))
                    setattr(holder, name, 0.0)


@contextmanager
def original_dropout(model: nn.Module) -> Iterator[None]:
    """Inside, the model's configs have the dropout that they came with: who trains the saved model further
    finds what its makers set."""
    originals: list[tuple[Any, str, float]] = getattr(model, _ORIGINALS, [])
    try:
        for config, name, value in originals:
            setattr(config, name, value)
        yield
    finally:
        for config, name, _ in originals:
            setattr(config, name, 0.0)


def _silence_routing(module: nn.Module) -> None:
    """Let experts be chosen in training mode as they are in evaluation mode, without noise.

    Some mixtures of experts multiply what a router reads by noise ("jitter": Mixtral, DBRX), some draw the
    experts (PhiMoE, NLLB). A router learns the same way in evaluation mode. A router's own attributes and the
    config stay as they are: what PhiMoE calls jitter there is a threshold, which evaluation mode reads, too.
    """
    if "Router" in type(module).__name__:
        if _as_in_evaluation not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_as_in_evaluation)
        return
    for name, value in list(vars(module).items()):
        if "jitter" in name and isinstance(value, float):
            setattr(module, name, 0.0)


def _as_in_evaluation(module: nn.Module, _args: Any) -> None:
    module.training = False


def fuse_activations(model: nn.Module) -> None:
    """Replace GPT-2's GELU by one kernel of the same formula.

    transformers computes it in eight operations, each of which keeps a tensor of a block's largest size for
    its gradient.
    """
    for name, module in list(model.named_modules()):
        if type(module) is NewGELUActivation:
            model.set_submodule(name, nn.GELU(approximate="tanh"))


def make_ready(model: PreTrainedModel, config: ModelConfig) -> None:
    """Set a model, loaded here or by the user, as it is trained and sampled: dropout, activations, memory."""
    if config.disable_dropout:
        disable_dropout(model)
    fuse_activations(model)
    align_weights(model)


def align_weights(model: nn.Module) -> None:
    """Have each weight on the CPU begin where torch would put a new tensor; equal views of memory stay that.

    transformers maps a file of safetensors into memory, where weights lie behind a head of any length, and
    MKL rounds products with one row, those of sampling, by where a matrix begins. So the same weights from
    two files, a model of the hub and a checkpoint of its run, would sample from other last bits.
    """
    if torch.cuda.is_available():  # weights go on to a GPU, and the mapped file takes no memory of a process
        return
    moved: dict[tuple[Any, ...], Tensor] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        # Quantised ones are classes of their own, which have no address; sparse ones neither.
        is_dense = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
        is_plain = is_dense and tensor.is_cpu
        if is_plain and tensor.data_ptr() % _ALIGNMENT:
            place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if place not in moved:
                moved[place] = tensor.detach().clone()
            tensor.data = moved[place]


def _load(
    class_of: Callable[[PretrainedConfig], Any],
    config: ModelConfig,
    *,
    new_head_allowed: bool = False,
    **overrides: Any,
) -> PreTrainedModel:
    if config.path is not None:
        config = config.model_copy(update={"path": model_folder(config.path, "model.path")})
    base = adapter_base(config.path) if config.path is not None else None
    if base is not None:
        base_config = config.model_copy(update={"path": base, "revision": None})
        model = _load(class_of, base_config, new_head_allowed=new_head_allowed, **overrides)
        return merge_saved_adapter(model, str(config.path))
    model_config = _model_config(config, overrides)
    if "pad_token_id" in overrides:  # a model of texts and images reads that of its text model
        model_config.get_text_config().pad_token_id = overrides["pad_token_id"]
    auto_class = class_of(model_config)
    check_architecture(config, auto_class, model_config)
    settings: dict[str, Any] = {"dtype": getattr(torch, config.dtype)}
    if config.attention is not None:
        settings["attn_implementation"] = config.attention
    if config.path is None:
        model, has_new_head = _from_config(auto_class, model_config, settings), True
    else:
        model, has_new_head = _from_pretrained(auto_class, config, model_config, settings, new_head_allowed)
    apply_kernels(model, config)
    if new_head_allowed and has_new_head:
        _init_reward_head(model)
        if config.path is not None:
            _log.info("%s has no head of its own: starting with a new one", config.path)
    make_ready(model, config)
    return model


def _model_config(config: ModelConfig, overrides: dict[str, Any]) -> PretrainedConfig:
    if config.architecture is not None:
        return _config_of_shape(config.architecture, overrides)
    path = str(config.path)
    try:
        return AutoConfig.from_pretrained(
            path, revision=config.revision, trust_remote_code=config.trust_remote_code, **overrides
        )
    # A config.json with a value of the wrong type raises an error that is neither ValueError nor TypeError.
    except Exception as error:
        raise ModelError(_cannot_load("model", path, error)) from error


def _config_of_shape(architecture: dict[str, Any], overrides: dict[str, Any]) -> PretrainedConfig:
    shape = dict(architecture)
    model_type = str(shape.pop("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise ConfigError(
            f"`model.architecture.model_type` = {model_type!r} is unknown to transformers"
            f"{_did_you_mean(model_type, list(CONFIG_MAPPING.keys()))}"
        )
    config_class = CONFIG_MAPPING[model_type]
    valid = {field.name for field in fields(config_class)} | set(config_class.attribute_map)  # pyright: ignore[reportArgumentType]
    if config_class.is_encoder_decoder:
        valid.add("decoder_start_token_id")  # all families read it, though some have no such field
    for key in shape:
        if key not in valid and not hasattr(config_class, key):
            raise ConfigError(
                f"`model.architecture.{key}` is no key of {model_type}{_did_you_mean(key, list(valid))}"
            )
    try:
        return AutoConfig.for_model(model_type, **{**shape, **overrides})
    except Exception as error:  # the wrong type of a value raises an error that is no TypeError
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(f"`model.architecture` is not valid: {reason}") from error


def _from_config(
    auto_class: Any, model_config: PretrainedConfig, settings: dict[str, Any]
) -> PreTrainedModel:
    try:
        return auto_class.from_config(model_config, **settings)
    except ValueError as error:
        raise ConfigError(
            f"`model.architecture` of type {model_config.model_type} makes no model for "
            f"{auto_class.__name__}: {_reason(error)}"
        ) from error


def _from_pretrained(
    auto_class: Any,
    config: ModelConfig,
    model_config: PretrainedConfig,
    settings: dict[str, Any],
    new_head_allowed: bool,
) -> tuple[PreTrainedModel, bool]:
    path = str(config.path)
    try:
        model, info = auto_class.from_pretrained(
            path,
            config=model_config,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            **settings,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with the tensors named
        )
    # Damaged weights surface as anything from SafetensorError to RuntimeError: all mean the same to the user.
    except Exception as error:
        raise ModelError(_cannot_load("model", path, error)) from error
    missing = sorted(info["missing_keys"])
    trunk = f"{model.base_model_prefix}."
    lost = (
        [key for key in missing if key.startswith(trunk) and ".pooler." not in key]
        if new_head_allowed
        else missing
    )
    lost += sorted(key for key, *_ in info["mismatched_keys"])
    if lost:
        raise ModelError(
            f"the weights at {path!r} are not those of {type(model).__name__}: {len(lost)} tensors are "
            f"missing or of another shape, {lost[0]} among them; does the folder hold the model it says?"
        )
    return model, bool(missing)


def _init_reward_head(model: PreTrainedModel) -> None:
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear):
        return  # encoder classifiers have heads of other kinds, which transformers has initialised
    nn.init.normal_(head.weight, std=1.0 / (head.in_features + 1) ** 0.5)
    if head.bias is not None:
        nn.init.zeros_(head.bias)


def _cannot_load(what: str, path: str, error: Exception, setting: str = "model.path") -> str:
    if Path(path).exists():
        return f"no {what} can be loaded from {path!r}: {_reason(error)}"
    return (
        f"there is no folder {path!r} to load a {what} from, and as a name on the model hub it does not "
        f"load either ({_reason(error)}); check `{setting}`"
    )


def _did_you_mean(name: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(name, valid, n=1)
    return f"; did you mean `{close[0]}`?" if close else ""


def _reason(error: Exception) -> str:
    """First line of an error; with the error's type where the text alone means little."""
    text = first_line(error).rstrip(".")
    return text if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {text}"
