"""The trained modules of PPO, GRPO and RFT: a language model, with a value head on its trunk for PPO.

Legend: B sequences, T tokens (prompt padded left, response padded right), R response positions (the last R of
T), V vocabulary, D hidden size. Position r of an output always speaks of response token r and is read at the
token before it: the state in which that token was chosen.

Every forward pass takes `conch.models.forward.ForwardInputs`. Outputs are [B, R, ...] for padded rows, and
[1, K, ...] for packed ones, with the K response tokens of all samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from conch.errors import ConfigError, ModelError
from conch.models.adapter import base_of, has_adapter, merge_in_place
from conch.models.attention import attention_inputs, model_positions, takes_positions, trial_precision
from conch.models.forward import ForwardInputs
from conch.models.loading import decoder_layers
from conch.models.shared_trunk import ReplayedBlock, Trunk, name_of
from conch.ops import at_least_float32, head_dtype, position_ids

HEADS_FILE = "heads.safetensors"
"""File of value heads and Q heads beside the Hugging Face weights; `from_pretrained` ignores it."""


@dataclass(frozen=True)
class PolicyOutput:
    """Outputs at the response positions.

    A plain dataclass on purpose: under mixed precision accelerate widens a module's outputs to float32 in any
    other container (seen with 1.15.0), which for logits is a copy of [B, R, V] that nobody needs.

    logits: of each response token given all tokens before it, in the precision that they were computed in.
    values: float32 at least; None for a policy without a value head.
    """

    logits: Float[Tensor, "B R V"]
    values: Float[Tensor, "B R"] | None = None


class ValueHead(nn.Module):
    """Two-layer perceptron whose last layer starts at zero, so that every first value is exactly 0."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(hidden_size, 2 * hidden_size)
        self.out = nn.Linear(2 * hidden_size, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, states: Float[Tensor, "B R D"]) -> Float[Tensor, "B R"]:
        """A value for each state, in float32 at least."""
        values = self.out(torch.relu(self.hidden(states.to(self.hidden.weight.dtype)))).squeeze(-1)
        return at_least_float32(values)


class ValueBranch(nn.Module):
    """Copies of the top blocks, and of the modules between them and the head, for the value function alone.

    The blocks below are the language model's own, run once for both: where they are trained, the value loss
    trains them, too. The branch has no parameter of the language model, and no adapter.

    num_layers: top blocks that are copied.

    Raises:
        ConfigError: from the constructor: the model has fewer blocks.
    """

    def __init__(self, lm: PreTrainedModel, num_layers: int) -> None:
        super().__init__()
        layers = decoder_layers(lm)
        if num_layers > len(layers):
            raise ConfigError(
                f"`ppo.num_value_layers_unfrozen` is {num_layers}; the model has {len(layers)} layers"
            )
        self._trunk = trunk = Trunk(lm, num_layers)
        head, embeddings = _head(lm), _embeddings_outside(lm, layers)
        below = [*trunk.modules, head, *embeddings.values()]
        self.top = trunk.copy_top([p for module in below for p in module.parameters()])
        for name, module in embeddings.items():
            self.top.set_submodule(name, ReplayedBlock(module))
        self.top.set_submodule(name_of(lm, head), nn.Identity())
        if has_adapter(self.top):
            merge_in_place(self.top)
        self._freeze_unused(lm)

    def recording(self) -> AbstractContextManager[None]:
        """Record the language model's forward pass, to be run inside; `forward` continues from it."""
        return self._trunk.recording()

    def forward(self, inputs: ForwardInputs) -> Float[Tensor, "N R D"]:
        """Hidden states at the positions where response tokens were chosen. Run it once after `recording`."""
        assert self._trunk.is_recorded, "no forward pass was recorded for this batch"
        _, states = response_logits_and_states(self.top, inputs)
        self._trunk.forget()
        return states

    def _freeze_unused(self, lm: PreTrainedModel) -> None:
        """Freeze parameters that get no gradient, for which DDP would wait; a backward pass finds them.

        They are copies of small layers between embeddings and blocks, which some architectures have.
        """
        parameters = list(self.top.requires_grad_(True).parameters())
        ids = torch.zeros(1, 2, dtype=torch.long, device=lm.device)
        inputs = ForwardInputs(ids, torch.ones_like(ids, dtype=torch.bool), 1)
        was_training = lm.training
        lm.eval()
        self.top.eval()
        with torch.enable_grad(), trial_precision(lm):
            with self.recording():
                response_logits(lm, inputs)
            states = self(inputs)
            gradients = torch.autograd.grad(states.sum(), parameters, allow_unused=True)
        lm.train(was_training)
        self.top.train(was_training)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)


class Policy(nn.Module):
    """The one trained module of an algorithm without values.

    It wraps a language model because DDP and DeepSpeed act in the forward pass of the module that they wrap.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, inputs: ForwardInputs) -> PolicyOutput:
        """Logits of the response positions."""
        return PolicyOutput(response_logits(self.lm, inputs))


class PolicyWithValue(nn.Module):
    """The one trained module of PPO: language model and value head on a shared trunk.

    num_value_layers: top blocks of the value function alone, see `ValueBranch`; 0 shares all blocks.
    """

    def __init__(self, lm: PreTrainedModel, *, num_value_layers: int = 0) -> None:
        super().__init__()
        self.lm = lm
        self.value_branch = ValueBranch(lm, num_value_layers) if num_value_layers else None
        self.value_head = ValueHead(_head_width(lm)).to(head_dtype(lm.dtype))

    def forward(self, inputs: ForwardInputs) -> PolicyOutput:
        """Logits and values of the response positions."""
        if self.value_branch is None:
            logits, states = response_logits_and_states(self.lm, inputs)
        else:
            with self.value_branch.recording():
                logits = response_logits(self.lm, inputs)
            states = self.value_branch(inputs)
        return PolicyOutput(logits, self.value_head(states))

    def head_tensors(self) -> dict[str, Tensor]:
        """Weights beside the language model's, for `heads.safetensors`."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("lm.")}


def response_logits(lm: PreTrainedModel, inputs: ForwardInputs) -> Float[Tensor, "N R V"]:
    """Logits that chose each response token; the head runs on those positions only.

    The encoder of an encoder-decoder reads the prompt, its decoder the response.
    """
    input_ids, attention_mask, positions, position_ids = inputs
    if isinstance(positions, Tensor):
        return _packed_logits_and_states(lm, input_ids, attention_mask, positions, position_ids)[0]
    assert attention_mask is not None, "padded rows have a mask"
    if lm.config.is_encoder_decoder:
        arguments, columns = _encoder_decoder_arguments(lm, input_ids, attention_mask, positions)
        return lm(**arguments, use_cache=False).logits[:, columns]
    return _decoder_logits_and_states(lm, input_ids, attention_mask, positions)[0]


def response_logits_and_states(
    lm: PreTrainedModel, inputs: ForwardInputs
) -> tuple[Float[Tensor, "N R V"], Float[Tensor, "N R D"]]:
    """Logits as of `response_logits`, and the hidden states that they were computed from."""
    input_ids, attention_mask, positions, position_ids = inputs
    if isinstance(positions, Tensor):
        return _packed_logits_and_states(lm, input_ids, attention_mask, positions, position_ids)
    assert attention_mask is not None, "padded rows have a mask"
    if not lm.config.is_encoder_decoder:
        return _decoder_logits_and_states(lm, input_ids, attention_mask, positions)
    arguments, columns = _encoder_decoder_arguments(lm, input_ids, attention_mask, positions)
    with captured_head_input(lm) as captured:
        logits = lm(**arguments, use_cache=False).logits
    return logits[:, columns], captured[0][:, columns]


def _packed_logits_and_states(
    lm: PreTrainedModel,
    input_ids: Int[Tensor, "B T"],
    attention_mask: Bool[Tensor, "B 1 T T"] | None,
    positions: Int[Tensor, " K"],
    position_ids: Int[Tensor, "B T"] | None,
) -> tuple[Float[Tensor, "1 K V"], Float[Tensor, "1 K D"]]:
    assert position_ids is not None, "packed rows have positions"
    attention = attention_inputs(lm, attention_mask, position_ids)
    places = model_positions(lm, position_ids)
    with captured_head_input(lm, positions) as captured:
        output = lm(input_ids=input_ids, position_ids=places, use_cache=False, **attention)
    return output.logits, captured[0]


def _decoder_logits_and_states(
    lm: PreTrainedModel,
    input_ids: Int[Tensor, "B T"],
    attention_mask: Bool[Tensor, "B T"],
    num_response: int,
) -> tuple[Float[Tensor, "B R V"], Float[Tensor, "B R D"]]:
    """Logits and states of padded rows, read flush left: no model sees padding before a sample, whether it
    knows the mask, takes positions, or (RWKV) remembers all columns that it has read."""
    num_prompt = input_ids.shape[1] - num_response
    first = attention_mask.long().argmax(dim=1, keepdim=True)
    rows = torch.arange(len(input_ids), device=input_ids.device).unsqueeze(1)
    columns = torch.arange(num_response, device=input_ids.device) + num_prompt - first - 1
    places = rows * input_ids.shape[1] + columns.clamp(min=0)
    ids, mask = flush_left(input_ids, attention_mask)
    arguments = {"input_ids": ids, "attention_mask": mask.long()}
    # Models with relative positions take no `position_ids`: they see the padding in the mask.
    if takes_positions(lm):
        arguments["position_ids"] = model_positions(lm, position_ids(mask))
    with captured_head_input(lm, places.flatten()) as captured:
        logits = lm(**arguments, use_cache=False).logits
    shape = (len(input_ids), num_response, -1)
    return logits.view(shape), captured[0].view(shape)


def _encoder_decoder_arguments(
    lm: PreTrainedModel,
    input_ids: Int[Tensor, "B T"],
    attention_mask: Bool[Tensor, "B T"],
    num_response: int,
) -> tuple[dict[str, Any], slice]:
    """Arguments of `lm` for a `prompt | response` batch, and the columns of its output to read.

    The encoder reads prompts flush left: BART and its kin count positions from the first column.
    """
    prompt, prompt_mask = flush_left(input_ids[:, :-num_response], attention_mask[:, :-num_response])
    response, is_real = input_ids[:, -num_response:], attention_mask[:, -num_response:].long()
    prefix = decoder_start(lm, len(input_ids))
    arguments = {
        "input_ids": prompt,
        "attention_mask": prompt_mask.long(),
        "decoder_input_ids": torch.cat([prefix, response[:, :-1]], dim=1),
        "decoder_attention_mask": torch.cat([torch.ones_like(prefix), is_real[:, :-1]], dim=1),
    }
    return arguments, slice(prefix.shape[1] - 1, None)


def flush_left(
    input_ids: Int[Tensor, "B T"], attention_mask: Bool[Tensor, "B T"]
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Rows and their mask with the padding before the first real token moved behind the last."""
    first = attention_mask.long().argmax(dim=1, keepdim=True)
    order = (torch.arange(input_ids.shape[1], device=input_ids.device) + first) % input_ids.shape[1]
    return input_ids.gather(1, order), attention_mask.gather(1, order)


def decoder_start(lm: PreTrainedModel, num_rows: int) -> Int[Tensor, "B S"]:
    """What the decoder of an encoder-decoder reads before a response, which no policy chooses: its start
    token, and the token that its configuration forces behind that (mBART's and NLLB's language to write)."""
    forced = getattr(lm.generation_config, "forced_bos_token_id", None)
    ids = [int(lm.config.decoder_start_token_id), *([] if forced is None else [int(forced)])]
    return torch.tensor(ids, device=lm.device).expand(num_rows, -1)


@contextmanager
def plain_generation(lm: PreTrainedModel) -> Iterator[None]:
    """Hide the checkpoint's own sampling settings (a repetition penalty, say), from which `lm.generate` would
    take whatever is not set explicitly."""
    checkpoint_config = lm.generation_config
    lm.generation_config = GenerationConfig(
        decoder_start_token_id=getattr(lm.config, "decoder_start_token_id", None)
    )
    try:
        yield
    finally:
        lm.generation_config = checkpoint_config


@contextmanager
def captured_head_input(
    lm: PreTrainedModel, positions: Int[Tensor, " K"] | None = None
) -> Iterator[list[Tensor]]:
    """Collect the inputs of the language-model head: the trunk's last hidden states, final norm included.

    `output_hidden_states` would keep the states of all layers instead of one.

    positions: indices into the positions of all rows; the head then reads these states alone, [1, K, D].
    """
    captured: list[Tensor] = []

    def capture(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        states = args[0] if positions is None else args[0].flatten(0, 1)[positions].unsqueeze(0)
        captured.append(states)
        return (states, *args[1:])

    handle = _head(lm).register_forward_pre_hook(capture)
    try:
        yield captured
    finally:
        handle.remove()


def _head(lm: PreTrainedModel) -> nn.Module:
    head = lm.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise ModelError(f"{type(lm).__name__} has no language-model head to read hidden states from")
    if isinstance(base_of(head), nn.Embedding):
        raise ModelError(
            f"{type(lm).__name__} has its decoder's embeddings for a head, whose hidden states cannot be "
            "read: take another architecture"
        )
    return head


def _head_width(lm: PreTrainedModel) -> int:
    """Size of the states that the head reads; some architectures have blocks of another width."""
    return int(_head(lm).weight.shape[1])  # pyright: ignore[reportArgumentType, reportCallIssue, reportAttributeAccessIssue, reportIndexIssue]


def _embeddings_outside(lm: PreTrainedModel, layers: nn.ModuleList) -> dict[str, nn.Module]:
    """Embeddings of tokens and positions by name; those inside a block, or of an encoder, are left out."""
    outside: dict[str, nn.Module] = {}
    excluded = [layers, lm.get_encoder()] if lm.config.is_encoder_decoder else [layers]
    prefixes = tuple(f"{name_of(lm, module)}." for module in excluded)
    for name, module in lm.named_modules(remove_duplicate=False):
        is_inside = name.startswith((*prefixes, *(f"{outer}." for outer in outside)))
        if not is_inside and isinstance(base_of(module), nn.Embedding):
            outside[name] = module
    return outside
