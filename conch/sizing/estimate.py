"""How much memory of each GPU a run takes, counted without its weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from conch.config import ModelConfig
from conch.errors import ModelError, first_line
from conch.models.freezing import freeze_layers
from conch.models.loading import decoder_layers, disable_dropout, fuse_activations
from conch.models.policy import ValueHead, captured_head_input
from conch.ops import logprobs_of_labels
from conch.sizing.options import Setup

GIB = 2**30
LEFT_FREE = 0.1
"""Share of a GPU's memory that is kept for what is not counted."""
BUCKET = 500_000_000
"""Elements of DeepSpeed's buffer for gradients under way: its default `reduce_bucket_size`."""
LIVE = 1_000_000_000
"""Parameters that ZeRO-3 keeps whole at once, at most: its default `stage3_max_live_parameters`."""


@dataclass(frozen=True)
class Sizes:
    """Bytes on one GPU, and on the host for each of them. parameters, trained: of the whole model,
    numbers."""

    parameters: int
    trained: int
    weights: int
    gradients: int
    optimizer: int
    buffers: int
    reference: int
    activations: int
    gathered_weights: int
    kv_cache: int
    sampling: int
    host: int

    @property
    def update(self) -> int:
        """At the end of a forward pass, gradients of an earlier micro-batch kept."""
        lasting = self.weights + self.optimizer + self.reference
        return lasting + self.gradients + self.buffers + self.activations

    @property
    def rollout(self) -> int:
        """While sampling: no gradients, but all weights."""
        lasting = self.weights + self.optimizer + self.reference
        return lasting + self.gathered_weights + self.kv_cache + self.sampling

    @property
    def peak(self) -> int:
        """The larger of the two."""
        return max(self.update, self.rollout)


def sizes(config: PretrainedConfig, setup: Setup) -> Sizes:
    """Memory of PPO with `setup`, or without a reference, of a trainer that has the language model alone.

    Optimizer, ZeRO: Rajbhandari et al. 2020 (arXiv:1910.02054), sections 3.1 and 5: with Adam in mixed
    precision 2 bytes a parameter for weights, 2 for gradients, K = 12 for the float32 copy and two moments;
    stage 2 divides gradients and K by the number of GPUs, stage 3 the weights as well. In float32, and
    under DDP, weights and gradients have 4 bytes, and Adam's two moments 8 (Kingma & Ba 2015, algorithm 1).

    Raises:
        ConfigError, ModelError: more layers than there are, or a model that cannot be counted.
    """
    lm = _meta_lm(config, setup)
    trunk_copy = _top_block_weights(lm, setup) if setup.reference_kind == "trunk" else 0
    head = ValueHead(int(lm.get_output_embeddings().weight.shape[1])).to("meta")  # pyright: ignore
    module = nn.ModuleList([lm] if setup.reference_kind == "none" else [lm, head])
    count = sum(p.numel() for p in module.parameters())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    width, ranks = setup.bytes_per_weight, setup.gpus
    sharded = setup.zero_stage == 3
    optimizer = trained * (8 if width == 4 else 12) // (ranks if setup.zero_stage else 1)
    shard = count * width // (ranks if sharded else 1)
    reference = {"full": sum(p.numel() for p in lm.parameters()) * width, "trunk": trunk_copy * width}
    on_host = setup.offload and sharded
    return Sizes(
        parameters=count,
        trained=trained,
        weights=0 if on_host else shard,
        gradients=trained * width // (ranks if setup.zero_stage else 1),
        optimizer=0 if setup.offload else optimizer,
        buffers=_buffers(setup, trained),
        reference=reference.get(setup.reference_kind, 0),
        activations=activation_bytes(lm, None if setup.reference_kind == "none" else head, setup),
        gathered_weights=count * width if sharded else 0,
        kv_cache=kv_cache_bytes(config, setup),
        # LogprobRecorder's float32 log-probs, and what generate sorts and samples them with
        sampling=3 * setup.generation_rows * config.vocab_size * 4,
        host=(optimizer if setup.offload else 0) + (shard if on_host else 0),
    )


def kv_cache_bytes(config: PretrainedConfig, setup: Setup) -> int:
    """2 (keys and values) x layers x KV heads x head width x tokens x rows x bytes: Pope et al. 2022
    (arXiv:2211.05102), section 3.3, with the KV heads of grouped-query attention."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    tokens = setup.generation_rows * (setup.prompt_length + setup.response_length)
    precision = 4 if setup.precision == "float32" else 2
    return 2 * text.num_hidden_layers * heads * width * tokens * precision


def activation_bytes(lm: PreTrainedModel, head: nn.Module | None, setup: Setup) -> int:
    """What autograd keeps of one forward pass, by the tensors it keeps, and the gradient of the logits.

    Korthikanti et al. 2022 (arXiv:2205.05198), section 4, count the same by hand for one architecture:
    sbh(34 + 5as/h) bytes a layer. Here attention is a fused kernel (Dao et al. 2022, arXiv:2205.14135),
    which keeps its inputs, its output and a number per row instead of 5as/h. With checkpointing stay each
    block's input and, while it is computed again, one block (Chen et al. 2016, arXiv:1604.06174). Under DDP
    in bf16 or fp16 this is an upper bound: counted in float32, of which autocast halves a part.
    """
    kept = _KeptBytes(lm)
    with kept.counting(), torch.device("meta"):
        loss, num_logits = _loss_on_meta(lm, head, setup)
    del loss
    blocks = sum(kept.of_block.values())
    if setup.gradient_checkpointing:
        tokens = setup.rows * (setup.prompt_length + setup.response_length)
        inputs = tokens * lm.config.hidden_size * setup.bytes_per_weight
        blocks = len(kept.of_block) * inputs + max(kept.of_block.values())
    return kept.outside + blocks + num_logits * 4


def advice(config: PretrainedConfig, setup: Setup) -> list[tuple[str, Sizes]]:
    """Settings that lower the peak, each tried alone, the most helpful first."""
    changed = {
        "model.gradient_checkpointing=true": {"gradient_checkpointing": True},
        f"train.gradient_accumulation_steps doubled ({setup.rows // 2} rows a pass)": {
            "rows": max(1, setup.rows // 2)
        },
        f"generation.chunk_size={setup.generation_rows // 2}": {
            "generation_rows": max(1, setup.generation_rows // 2)
        },
        "configs/accelerate/zero2-bf16.yaml": {"zero_stage": 2} if setup.zero_stage == 0 else {},
        "configs/accelerate/zero3.yaml": {"zero_stage": 3},
        "configs/accelerate/zero3-offload.yaml": {"zero_stage": 3, "offload": True},
        "twice as many GPUs": {"gpus": 2 * setup.gpus},
        "model.num_layers_unfrozen=2": {"num_layers_unfrozen": 2, "reference": None},
        "model.peft_config={r: 16}": {"lora_rank": 16, "num_layers_unfrozen": -1, "reference": None},
    }
    if setup.reference_kind == "none":
        changed = {name: {**change, "reference": "none"} for name, change in changed.items() if change}
    tried = [(name, dataclasses.replace(setup, **change)) for name, change in changed.items()]
    now = sizes(config, setup).peak
    found = [(name, sizes(config, other)) for name, other in tried if other != setup]
    return sorted((one for one in found if one[1].peak < now), key=lambda one: one[1].peak)


def fits(estimate: Sizes, gpu_memory: float) -> bool:
    """Whether a run fits one GPU with `LEFT_FREE` to spare.

    gpu_memory: of one GPU, in GiB.
    """
    return estimate.peak <= (1 - LEFT_FREE) * gpu_memory * GIB


# ----------------------------------------------------------------------------------------- on the meta device


def read_config(path: str) -> PretrainedConfig:
    """Read a model's configuration.

    path: folder, config.json, or name on the hub.

    Raises:
        ModelError: there is none, or it is no decoder.
    """
    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as error:  # of any type, from OSError to a validation error of the config's class
        reason = first_line(error)
        raise ModelError(f"`--model` {path} has no config.json that can be read: {reason}") from error
    if config.is_encoder_decoder:
        raise ModelError(f"`--model` {path} is an encoder-decoder: only decoders can be counted")
    return config


def _meta_lm(config: PretrainedConfig, setup: Setup) -> PreTrainedModel:
    dtype = torch.float32 if setup.bytes_per_weight == 4 else torch.bfloat16
    with torch.device("meta"):
        try:
            lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
        except ValueError as error:
            raise ModelError(f"a {config.model_type} is no language model that can be counted") from error
        peft = None if setup.lora_rank is None else {"r": setup.lora_rank}
        chosen = ModelConfig(
            path="-",
            num_layers_unfrozen=setup.num_layers_unfrozen,
            peft_config=peft,
            merge_adapter=True,  # nothing is saved here that would need its base
        )
        disable_dropout(lm)
        fuse_activations(lm)
        freeze_layers(lm, chosen)
    return lm.train()


def _top_block_weights(lm: PreTrainedModel, setup: Setup) -> int:
    layers = decoder_layers(lm)
    return sum(p.numel() for layer in layers[-setup.num_layers_unfrozen :] for p in layer.parameters())


def _buffers(setup: Setup, trained: int) -> int:
    """Gradients under way between GPUs; of ZeRO-3 also the layers that are whole just now."""
    if setup.zero_stage == 0:
        return trained * setup.bytes_per_weight if setup.gpus > 1 else 0  # DDP's own copy, as buckets
    live = min(LIVE, trained) if setup.zero_stage == 3 else 0
    return (BUCKET + live) * setup.bytes_per_weight


def _loss_on_meta(lm: PreTrainedModel, head: nn.Module | None, setup: Setup) -> tuple[Tensor, int]:
    """A loss as a trainer's, and how many logits it has."""
    length, kept = setup.prompt_length + setup.response_length, slice(-setup.response_length - 1, -1)
    ids = torch.zeros(setup.rows, length, dtype=torch.long)
    # One for each pair of tokens: a mask of rows transformers would ask for its values, and there are none.
    mask = torch.zeros(setup.rows, 1, length, length, dtype=lm.dtype)
    positions = torch.zeros(setup.rows, length, dtype=torch.long)
    with captured_head_input(lm) as captured:
        output = lm(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=setup.response_length + 1,
        )
    logits = output.logits[:, kept]
    loss = logprobs_of_labels(logits, ids[:, -setup.response_length :]).sum()
    if head is not None:
        loss = loss + head.to(lm.dtype)(captured[0][:, kept]).sum()
    return loss, logits.numel()


class _KeptBytes:
    """Sizes of the tensors that autograd keeps, weights apart, inside of each block and outside of all."""

    def __init__(self, lm: PreTrainedModel) -> None:
        self.outside = 0
        self.of_block: dict[int, int] = {}
        self._block: int | None = None
        self._blocks = decoder_layers(lm)
        self._seen = {parameter.untyped_storage()._cdata for parameter in lm.parameters()}
        self._alive: list[Any] = []

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Inside, a forward pass is counted."""
        handles = [
            handle for number, block in enumerate(self._blocks) for handle in self._watch(number, block)
        ]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._note, lambda kept: kept), _FusedAttention():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, number: int, block: nn.Module) -> list[Any]:
        self.of_block[number] = 0

        def enter(*_: Any) -> None:
            self._block = number

        def leave(*_: Any) -> None:
            self._block = None

        return [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]

    def _note(self, kept: Tensor) -> Tensor:
        storage = kept.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._alive.append(storage)  # else another tensor might get its number
            if self._block is None:
                self.outside += storage.nbytes()
            else:
                self.of_block[self._block] += storage.nbytes()
        return kept


class _FusedAttention(TorchFunctionMode):
    """Inside, attention keeps what a fused kernel keeps. On the meta device torch would take the kernel that
    keeps all weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            return _Attention.apply(given["query"], given["key"], given["value"])
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    """Has the shapes of attention, and no values."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        normalisers = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, normalisers)
        return out


# ----------------------------------------------------------------------------------------------- command line


def table(estimate: Sizes, setup: Setup) -> str:
    """Rows of GiB: what lasts, then the two moments that may be the peak."""
    rows = {
        f"weights ({estimate.parameters:,}, of which {estimate.trained:,} are trained)": estimate.weights,
        "optimizer": estimate.optimizer,
        f"reference ({setup.reference_kind})": estimate.reference,
        "update: gradients": estimate.gradients,
        "update: communication buffers": estimate.buffers,
        f"update: activations of {setup.rows} rows": estimate.activations,
        "rollout: gathered weights": estimate.gathered_weights,
        f"rollout: KV cache of {setup.generation_rows} rows": estimate.kv_cache,
        "rollout: logits": estimate.sampling,
        "peak of an update": estimate.update,
        "peak of a rollout": estimate.rollout,
        "host memory, each GPU": estimate.host,
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {size / GIB:9.2f} GiB" for name, size in rows.items())


def verdict(config: PretrainedConfig, setup: Setup, estimate: Sizes) -> str:
    """One line where it fits, else what to change."""
    assert setup.gpu_memory is not None
    room = f"{estimate.peak / GIB:.1f} of {setup.gpu_memory:g} GiB, {LEFT_FREE:.0%} of which stay free"
    if fits(estimate, setup.gpu_memory):
        return f"fits: {room}"
    lines = [f"does not fit: {room}. Any one of these changes the peak to:"]
    for name, other in advice(config, setup):
        fit = "fits" if fits(other, setup.gpu_memory) else "not enough alone"
        lines.append(f"  {other.peak / GIB:9.1f} GiB  {name} ({fit})")
    return "\n".join(lines)


def report(model: str, setup: Setup, *, as_json: bool) -> None:
    """Print the estimate for a model, as a table with advice or as JSON in bytes."""
    config = read_config(model)
    estimate = sizes(config, setup)
    if as_json:
        peaks = {"update_peak": estimate.update, "rollout_peak": estimate.rollout, "peak": estimate.peak}
        room = {} if setup.gpu_memory is None else {"fits": fits(estimate, setup.gpu_memory)}
        print(
            json.dumps(
                {**dataclasses.asdict(setup), **dataclasses.asdict(estimate), **peaks, **room}, indent=2
            )
        )
        return
    print(table(estimate, setup))
    if setup.gpu_memory is not None:
        print(verdict(config, setup, estimate))
