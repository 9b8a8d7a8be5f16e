"""Triton's `config.pbtxt` from a `RewardModelSpec` and back, by the protobuf messages of tritonclient."""

from __future__ import annotations

import json
from typing import Any, Literal, cast, get_args

from conch.errors import ServingError
from conch.triton.contract import (
    MASK_INPUT,
    MEMBER_REWARDS,
    MEMBERS_USED,
    OUTPUT,
    STEP_ENDS,
    STEP_REWARDS,
    TEXT_INPUT,
    TOKEN_INPUT,
    VARIANCE,
    Engine,
    Granularity,
    Reads,
    RewardModelSpec,
    TokenizerSpec,
    VarianceKind,
    ensemble_parts,
)

Kind = Literal["cpu", "gpu"]

_TOKEN_DTYPES = ("INT32", "INT64")
# onnxruntime on a GPU: without it, every new length doubles what its arena holds and never gives back.
_ENGINE_PARAMETERS = {"onnxruntime": {"arena_extend_strategy": "1"}}
_SCORE_DTYPES = ("FP16", "FP32", "FP64")


def to_pbtxt(
    spec: RewardModelSpec | TokenizerSpec, *, kind: Kind = "gpu", gpu: int = 0, embedded: bool = False
) -> str:
    """Return the text of `config.pbtxt`.

    kind, gpu: device of the instances: the CPU, or the visible GPU of that number. An ensemble that only
        sends samples to its members stays on the CPU.
    embedded: write for servers that have no back end but python.
    """
    from google.protobuf import text_format

    if isinstance(spec, TokenizerSpec):
        return text_format.MessageToString(_tokenizer_config(spec))
    if spec.engine == "ensemble":
        return text_format.MessageToString(_ensemble_config(spec))
    pb = _messages()
    engine = "python" if embedded else spec.engine
    config: Any = pb.ModelConfig(name=spec.name, backend=engine, max_batch_size=spec.max_batch_size)
    _add_tensors(config, spec, engine)
    config.version_policy.latest.num_versions = 1
    # A short delay and nothing else: queue limits and priorities make the server stall requests for 500 ms.
    config.dynamic_batching.max_queue_delay_microseconds = spec.max_queue_delay_us
    on_gpu = kind == "gpu" and not spec.asks_members
    group = config.instance_group.add(count=spec.instances)
    group.kind = pb.ModelInstanceGroup.KIND_GPU if on_gpu else pb.ModelInstanceGroup.KIND_CPU
    if on_gpu:
        group.gpus.append(gpu)
    _add_parameters(config, spec, engine)
    return text_format.MessageToString(config)


def _tokenizer_config(spec: TokenizerSpec) -> Any:
    config: Any = _messages().ModelConfig(
        name=spec.name, backend="python", max_batch_size=spec.max_batch_size
    )
    config.version_policy.latest.num_versions = 1
    config.dynamic_batching.max_queue_delay_microseconds = 0  # the model behind waits to fill its batches
    config.instance_group.add(count=1).kind = _messages().ModelInstanceGroup.KIND_CPU
    config.input.add(name=TEXT_INPUT, dims=[1], data_type=_type_number("BYTES"))
    for name in (TOKEN_INPUT, MASK_INPUT):
        config.output.add(name=name, dims=[-1], data_type=_type_number("INT64"))
    return config


def _ensemble_config(spec: RewardModelSpec) -> Any:
    config: Any = _messages().ModelConfig(
        name=spec.name, platform="ensemble", max_batch_size=spec.max_batch_size
    )
    config.version_policy.latest.num_versions = 1
    _add_tensors(config, spec, "ensemble")
    tokenizer, model = ensemble_parts(spec.name)
    first = config.ensemble_scheduling.step.add(model_name=tokenizer, model_version=-1)
    second = config.ensemble_scheduling.step.add(model_name=model, model_version=-1)
    first.input_map[TEXT_INPUT] = TEXT_INPUT
    for name in (TOKEN_INPUT, MASK_INPUT):
        first.output_map[name] = name
        second.input_map[name] = name
    second.output_map[OUTPUT] = OUTPUT
    _add_parameters(config, spec, "ensemble")
    return config


def _add_parameters(config: Any, spec: RewardModelSpec, engine: Engine) -> None:
    parameters = {
        "form": spec.form,
        "reward_names": ",".join(spec.reward_names),
        "max_length": str(spec.max_length),
        "content_sha256": spec.content_sha256,
        "engine": spec.engine,
        **_ENGINE_PARAMETERS.get(engine, {}),
        **({"members": ",".join(spec.members), "variance": spec.variance} if spec.members else {}),
        **({"holds_members": "true"} if spec.holds_members else {}),
        **({"granularity": spec.granularity} if spec.is_dense else {}),
        **({"reads": spec.reads} if spec.reads != "texts" else {}),
        **({"special_tokens": json.dumps(spec.special_tokens)} if spec.special_tokens else {}),
    }
    for key, value in parameters.items():
        config.parameters[key].string_value = value


def from_pbtxt(text: str) -> RewardModelSpec:
    """Read the spec from the text of a `config.pbtxt`.

    Raises:
        ServingError: the text is no model configuration, or not that of a reward model.
    """
    from google.protobuf import text_format

    pb = _messages()
    config: Any = pb.ModelConfig()
    try:
        text_format.Parse(text, config)
    except text_format.ParseError as error:
        raise ServingError(f"not a Triton model configuration: {error}") from error
    return spec_from_model_config(config)


def spec_from_model_config(config: Any) -> RewardModelSpec:
    """Read the spec from a `ModelConfig` message, of a file or of a running server, also of other tools.

    Raises:
        ServingError: the model is neither of text form nor of token form; lists its tensors.
    """
    inputs = {tensor.name: tensor for tensor in config.input}
    outputs = {tensor.name: tensor for tensor in config.output}
    parameters = {key: parameter.string_value for key, parameter in config.parameters.items()}
    members = tuple(parameters["members"].split(",")) if "members" in parameters else ()
    granularity = _granularity(config.name, parameters.get("granularity", "sample"))
    if not _has_outputs(outputs, _extra_outputs(len(members), granularity)) or set(inputs) not in (
        {TEXT_INPUT},
        {TOKEN_INPUT},
        {TOKEN_INPUT, MASK_INPUT},
    ):
        raise ServingError(_neither_form(config, "other tensors"))
    if config.max_batch_size < 1:
        raise ServingError(_neither_form(config, "max_batch_size 0, so a request has no rows"))
    is_text = TEXT_INPUT in inputs
    input_dtype = _dtype(inputs[TEXT_INPUT if is_text else TOKEN_INPUT])
    output_dtype = _dtype(outputs[OUTPUT])
    mask_dtype = _dtype(inputs[MASK_INPUT]) if MASK_INPUT in inputs else input_dtype
    if input_dtype not in (("BYTES",) if is_text else _TOKEN_DTYPES) or mask_dtype != input_dtype:
        raise ServingError(_neither_form(config, "an input type other than those"))
    if output_dtype not in _SCORE_DTYPES:
        raise ServingError(_neither_form(config, f"rewards of type {output_dtype}"))
    return RewardModelSpec(
        name=config.name,
        form="text" if is_text else "token",
        max_batch_size=config.max_batch_size,
        reward_names=_reward_names(
            config.name, parameters.get("reward_names", ""), list(outputs[OUTPUT].dims)
        ),
        max_length=_max_length(config.name, parameters.get("max_length", "0")),
        max_queue_delay_us=config.dynamic_batching.max_queue_delay_microseconds,
        instances=max(1, sum(group.count for group in config.instance_group)),
        takes_attention_mask=is_text or MASK_INPUT in inputs,
        input_dtype=input_dtype,
        output_dtype=output_dtype,
        content_sha256=parameters.get("content_sha256", ""),
        engine=_engine(config.name, parameters.get("engine", "python")),
        members=members,
        variance=_variance(config.name, parameters.get("variance", "population")),
        holds_members=parameters.get("holds_members") == "true",
        granularity=granularity,
        reads=_reads(config.name, parameters.get("reads", "texts")),
        special_tokens=_special_tokens(config.name, parameters.get("special_tokens", "[]")),
    )


def _messages() -> Any:
    """Import Triton's protobuf messages late, since they bring gRPC; they are untyped, built at run time."""
    from tritonclient.grpc import model_config_pb2

    return model_config_pb2


def _add_tensors(config: Any, spec: RewardModelSpec, engine: Engine) -> None:
    is_text = spec.form == "text"
    names = [TEXT_INPUT] if is_text else [TOKEN_INPUT, *([MASK_INPUT] if spec.takes_attention_mask else [])]
    for name in names:
        # Without ragged batching only requests of exactly equal length are ever put into one batch. The C++
        # back ends would get ragged rows joined end to end, so there clients must pad to like lengths.
        ragged = engine == "python" and not is_text
        tensor = config.input.add(name=name, dims=[1] if is_text else [-1], allow_ragged_batch=ragged)
        tensor.data_type = _type_number(spec.input_dtype)
    output = config.output.add(name=OUTPUT, dims=[len(spec.reward_names)])
    output.data_type = _type_number(spec.output_dtype)
    for name, (dtype, width) in _extra_outputs(len(spec.members), spec.granularity).items():
        config.output.add(name=name, dims=[width], data_type=_type_number(dtype))


def _extra_outputs(members: int, granularity: Granularity) -> dict[str, tuple[str, int]]:
    """Return output -> (type, width), of the outputs beside `rewards`."""
    outputs: dict[str, tuple[str, int]] = {}
    if members:
        outputs |= {MEMBER_REWARDS: ("FP32", members), VARIANCE: ("FP32", 1), MEMBERS_USED: ("INT32", 1)}
    if granularity != "sample":
        outputs |= {STEP_REWARDS: ("FP32", -1), STEP_ENDS: ("INT32", -1)}
    return outputs


def _has_outputs(outputs: dict[str, Any], extra: dict[str, tuple[str, int]]) -> bool:
    return set(outputs) == {OUTPUT, *extra} and all(
        (_dtype(outputs[name]), list(outputs[name].dims)) == (dtype, [width])
        for name, (dtype, width) in extra.items()
    )


def _type_number(dtype: str) -> int:
    return _messages().DataType.Value("TYPE_STRING" if dtype == "BYTES" else f"TYPE_{dtype}")


def _dtype(tensor: Any) -> str:
    name = _messages().DataType.Name(tensor.data_type).removeprefix("TYPE_")
    return "BYTES" if name == "STRING" else name


def _reward_names(model: str, listed: str, dims: list[int]) -> tuple[str, ...]:
    width = dims[-1] if len(dims) == 1 else 0
    names = tuple(listed.split(",")) if listed else ()
    if width == 0 or (names and width not in (-1, len(names))):
        raise ServingError(
            f"model {model}: `rewards` has dims {dims}, which does not fit reward names {list(names)}"
        )
    if names:
        return names
    return ("reward",) if width in (-1, 1) else tuple(f"reward_{column}" for column in range(width))


def _engine(model: str, listed: str) -> Engine:
    if listed not in get_args(Engine):
        raise ServingError(f"model {model}: parameter engine is {listed!r}, none of {get_args(Engine)}")
    return cast(Engine, listed)


def _granularity(model: str, listed: str) -> Granularity:
    if listed not in get_args(Granularity):
        raise ServingError(
            f"model {model}: parameter granularity is {listed!r}, none of {get_args(Granularity)}"
        )
    return cast(Granularity, listed)


def _variance(model: str, listed: str) -> VarianceKind:
    if listed not in get_args(VarianceKind):
        raise ServingError(
            f"model {model}: parameter variance is {listed!r}, none of {get_args(VarianceKind)}"
        )
    return cast(VarianceKind, listed)


def _reads(model: str, listed: str) -> Reads:
    if listed not in get_args(Reads):
        raise ServingError(f"model {model}: parameter reads is {listed!r}, none of {get_args(Reads)}")
    return cast(Reads, listed)


def _special_tokens(model: str, listed: str) -> tuple[str, ...]:
    try:
        tokens = json.loads(listed)
    except ValueError:
        tokens = None
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise ServingError(f"model {model}: parameter special_tokens is {listed!r}, no JSON list of strings")
    return tuple(tokens)


def _max_length(model: str, listed: str) -> int:
    if not listed.isdecimal():
        raise ServingError(f"model {model}: parameter max_length is {listed!r}, not a number of tokens")
    return int(listed)


def _neither_form(config: Any, reason: str) -> str:
    def listed(tensors: Any) -> str:
        return ", ".join(f"{t.name} {_dtype(t)} {list(t.dims)}" for t in tensors) or "none"

    return (
        f"model {config.name!r} is not a reward model of text form (text BYTES -> rewards FP32) "
        "or token form (input_ids INT32 or INT64, perhaps attention_mask of the same type -> rewards): "
        f"it has {reason}; inputs {listed(config.input)}; outputs {listed(config.output)}"
    )
