"""What an actor builds its rollout server from. It travels as bytes: the actor may be on another machine."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
import transformers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import GenerationConfig as HFGenerationConfig
from transformers.initialization import no_init_weights

from conch.config import RolloutConfig, TokenizerConfig, VLLMSettings
from conch.errors import ModelError
from conch.models.adapter import derived_tensors
from conch.models.loading import disable_dropout, fuse_activations, load_tokenizer
from conch.rollouts.hf.server import TransformersSampler
from conch.rollouts.protocol import LoraCapacity
from conch.rollouts.server import RolloutServer
from conch.rollouts.server_config import ServerConfig
from conch.rollouts.vllm.build import write_config

SLOTS = 32
"""Completions that transformers samples at once where `rollout.max_num_seqs` is left out: each takes room for
the longest."""

_NO_FILES = Path("/nonexistent")
"""Folder that handed weights lie in: none."""


@dataclass(frozen=True)
class Blueprint:
    """A model without weights, its tokenizer, and how it samples.

    engine: what samples.
    files: of model's configuration and tokenizer, by their names.
    derived: tensors that no checkpoint holds, as a safetensors file.
    dtype: of the weights, as torch calls it.
    attention: implementation, as transformers calls it; None for its default.
    trust_remote_code: runs code that the model's configuration names.
    threads: of torch.
    max_model_len: longest prompt and completion together, in tokens; None takes the model's window.
    slots: completions sampled at once.
    deadline_s: longest time in which weights may be loaded.
    vllm: settings of vLLM, as plain values.
    lora: adapters that vLLM is to take; None for none.
    """

    engine: Literal["transformers", "vllm"]
    files: dict[str, bytes]
    derived: bytes
    dtype: str
    attention: str | None
    trust_remote_code: bool
    threads: int
    max_model_len: int | None
    slots: int
    deadline_s: float
    vllm: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] | None = None


def blueprint_of(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RolloutConfig,
    dtype: torch.dtype,
    lora: LoraCapacity | None,
) -> Blueprint:
    """The blueprint of samplers for this policy. Reads no weight.

    dtype: of the samplers' weights.
    lora: capacity that vLLM needs for the policy's adapter to go by itself; None where it is merged.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_config(lm, name)
        if lm.generation_config is not None:
            # As it is: transformers refuses to save what it finds inconsistent.
            text = lm.generation_config.to_json_string(use_diff=False)
            (folder / "generation_config.json").write_text(text, encoding="utf-8")
        tokenizer.save_pretrained(name)
        files = {
            str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()
        }
    return Blueprint(
        engine=config.ray.engine,
        files=files,
        derived=b"" if config.ray.engine == "vllm" else _derived(lm),
        dtype=str(dtype).removeprefix("torch."),
        attention=getattr(lm.config, "_attn_implementation", None),
        trust_remote_code=type(lm).__module__.startswith("transformers_modules."),
        threads=max(1, int(config.ray.num_cpus)),
        max_model_len=config.max_model_len,
        slots=config.max_num_seqs if "max_num_seqs" in config.model_fields_set else SLOTS,
        deadline_s=config.deadline_s,
        vllm=config.model_dump(include=set(VLLMSettings.model_fields), exclude_unset=True),
        lora=None if lora is None else lora.model_dump(),
    )


def _derived(lm: PreTrainedModel) -> bytes:
    """Tables of numbers that the model has computed from its configuration: rotary ones, scales.

    A model that is built in half precision may compute them in it, one that was loaded has not.
    """
    tables = {name: each for name, each in derived_tensors(lm).items() if each.is_floating_point()}
    return safetensors.torch.save({name: each.detach().cpu().clone() for name, each in tables.items()})


async def build_server(blueprint: Blueprint, folder: Path) -> RolloutServer:
    """The server, whose model has no weights yet.

    folder: empty; is given the files of the blueprint.

    Raises:
        ConchError: the model cannot be served.
    """
    for name, content in blueprint.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    build = _vllm_server if blueprint.engine == "vllm" else _transformers_server
    return await build(blueprint, str(folder))


async def _vllm_server(blueprint: Blueprint, folder: str) -> RolloutServer:
    from conch.rollouts.vllm.server import build_engine, prepare_process, sampler_over

    prepare_process()
    tokenizer = load_tokenizer(TokenizerConfig(), folder)
    lora = {} if blueprint.lora is None else blueprint.lora
    config = ServerConfig(
        engine="vllm",
        model=folder,
        dtype=blueprint.dtype,  # pyright: ignore[reportArgumentType]  a validator reads it
        deadline_s=blueprint.deadline_s,
        trust_remote_code=blueprint.trust_remote_code,
        max_lora_rank=lora.get("rank", 0),
        lora_target_modules=lora.get("modules", ()),
        **blueprint.vllm,
    )
    engine = await asyncio.to_thread(build_engine, config)
    return RolloutServer(await sampler_over(engine, config, tokenizer), tokenizer, _NO_FILES)


async def _transformers_server(blueprint: Blueprint, folder: str) -> RolloutServer:
    return await asyncio.to_thread(_load_transformers, blueprint, folder)


def _load_transformers(blueprint: Blueprint, folder: str) -> RolloutServer:
    torch.set_num_threads(blueprint.threads)
    tokenizer = load_tokenizer(TokenizerConfig(), folder)
    lm = _empty_lm(blueprint, folder)
    lm.to("cuda" if torch.cuda.is_available() else "cpu")  # pyright: ignore[reportArgumentType]
    sampler = TransformersSampler(
        lm,
        tokenizer,
        max_model_len=blueprint.max_model_len,
        slots=blueprint.slots,
        deadline_s=blueprint.deadline_s,
    )
    return RolloutServer(sampler, tokenizer, _NO_FILES)


def _empty_lm(blueprint: Blueprint, folder: str) -> PreTrainedModel:
    """The model, with weights that are still to come."""
    trust = {"trust_remote_code": blueprint.trust_remote_code}
    config = AutoConfig.from_pretrained(folder, **trust)
    settings: dict[str, Any] = {"dtype": getattr(torch, blueprint.dtype)}
    if blueprint.attention is not None:
        settings["attn_implementation"] = blueprint.attention
    [name] = json.loads(blueprint.files["config.json"])["architectures"]
    with no_init_weights():
        own_class = getattr(transformers, name, None)
        if own_class is not None:
            lm = own_class._from_config(config, **settings)
        else:
            auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            lm = auto.from_config(config, **trust, **settings)
    lm.tie_weights()  # which goes with the initialisation that was left out
    _put_derived(lm, safetensors.torch.load(blueprint.derived))
    if "generation_config.json" in blueprint.files:
        lm.generation_config = HFGenerationConfig.from_pretrained(folder)
    disable_dropout(lm)
    fuse_activations(lm)
    return lm


def _put_derived(lm: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    own = derived_tensors(lm)
    for name, tensor in tensors.items():
        if name not in own or own[name].shape != tensor.shape:
            raise ModelError(
                f"a {type(lm).__name__} that is built from the policy's configuration has no {name} like the "
                "policy's: set `rollout.engine=hf`"
            )
        own[name].copy_(tensor)
