"""A language model with a value head on its trunk.

Legend: B sequences, T tokens (prompt padded left, response padded right), R response positions (the last R of
T), V vocabulary, D hidden size. Position r of an output always speaks of response token r and is read at the
token before it: the state in which that token was chosen.

Every forward pass takes `conch.models.forward.ForwardInputs`. Outputs are [B, R, ...] for padded rows, and
[1, K, ...] for packed ones, with the K response tokens of all samples.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from conch.errors import ConfigError, ModelError
from conch.models.adapter import base_of, has_adapter, merge_in_place
from conch.models.attention import attention_inputs, trial_precision
from conch.models.forward import ForwardInputs
from conch.models.loading import decoder_layers
from conch.models.shared_trunk import ReplayedBlock, Trunk, name_of
from conch.ops import at_least_float32, head_dtype, position_ids

HEADS_FILE = "heads.safetensors"
"""Value heads and the like, beside the Hugging Face weights; `from_pretrained` does not look at it."""


@dataclass(frozen=True)
class PolicyOutput:
    """logits: [B, R, V], of each response token given all before it. values: [B, R], at least float32."""

    logits: Float[Tensor, "B R V"]
    values: Float[Tensor, "B R"]


class ValueHead(nn.Module):
    """Two-layer perceptron whose last layer starts at zero, so that every first value is exactly 0."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(hidden_size, 2 * hidden_size)
        self.out = nn.Linear(2 * hidden_size, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, states: Float[Tensor, "B R D"]) -> Float[Tensor, "B R"]:
        """One value per state, in float32 at least."""
        values = self.out(torch.relu(self.hidden(states.to(self.hidden.weight.dtype)))).squeeze(-1)
        return at_least_float32(values)


class ValueBranch(nn.Module):
    """Copies of the top blocks, and of what stands between them and the head, for the value function alone.

    What lies below is the language model's own, run once for both: where it is trained, the value loss trains
    it, too. No parameter is shared with the language model, and an adapter there has no part here.

    Raises:
        ConfigError: the model has fewer blocks than that.
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
        self._train_what_is_read(lm)

    def recording(self) -> AbstractContextManager[None]:
        """Run the language model's forward pass inside; `forward` goes on from it."""
        return self._trunk.recording()

    def forward(self, inputs: ForwardInputs) -> Float[Tensor, "N R D"]:
        """States of the positions that choose the last tokens."""
        assert self._trunk.is_recorded, "no forward pass was recorded for this batch"
        _, states = response_logits_and_states(self.top, inputs)
        self._trunk.forget()
        return states

    def _train_what_is_read(self, lm: PreTrainedModel) -> None:
        """Some architectures have small layers between embeddings and blocks. Their copies here feed nothing,
        and DDP would wait for their gradients: they are found by trying, and frozen."""
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
    """A language model as the one trained module of an algorithm without values: DDP and DeepSpeed act in the
    forward pass of what they wrap."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, inputs: ForwardInputs) -> Float[Tensor, "N R V"]:
        """See `response_logits`."""
        return response_logits(self.lm, inputs)


class PolicyWithValue(nn.Module):
    """The one trained module of PPO: language model and value head on a shared trunk.

    num_value_layers: top blocks that the value function has for itself, see `ValueBranch`; 0 shares them all.
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
        """All but the language model, for `heads.safetensors`."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("lm.")}


def response_logits(lm: PreTrainedModel, inputs: ForwardInputs) -> Float[Tensor, "N R V"]:
    """Logits that chose each response token; the head runs on those positions only.

    The encoder of an encoder-decoder reads the prompt, its decoder the response.
    """
    if isinstance(inputs.positions, Tensor):
        return _packed_logits_and_states(lm, *inputs)[0]
    arguments, columns = _padded_arguments(lm, inputs.input_ids, inputs.attention_mask, inputs.positions)
    return lm(**arguments, use_cache=False).logits[:, columns]


def response_logits_and_states(
    lm: PreTrainedModel, inputs: ForwardInputs
) -> tuple[Float[Tensor, "N R V"], Float[Tensor, "N R D"]]:
    """As `response_logits`, with the hidden states that these logits were computed from."""
    if isinstance(inputs.positions, Tensor):
        return _packed_logits_and_states(lm, *inputs)
    arguments, columns = _padded_arguments(lm, inputs.input_ids, inputs.attention_mask, inputs.positions)
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
    with captured_head_input(lm, positions) as captured:
        output = lm(input_ids=input_ids, position_ids=position_ids, use_cache=False, **attention)
    return output.logits, captured[0]


def _padded_arguments(
    lm: PreTrainedModel,
    input_ids: Int[Tensor, "B T"],
    attention_mask: Bool[Tensor, "B T"] | None,
    num_response: int,
) -> tuple[dict[str, Any], slice]:
    """Arguments of `lm` for a `prompt | response` batch, and the columns of its output to read.

    Only this function tells decoders and encoder-decoders apart.
    """
    assert attention_mask is not None, "padded rows have a mask"
    if not lm.config.is_encoder_decoder:
        arguments = {"input_ids": input_ids, "attention_mask": attention_mask.long()}
        # Models with relative positions take no `position_ids`: they see the padding in the mask.
        optional = {"position_ids": position_ids(attention_mask), "logits_to_keep": num_response + 1}
        known = inspect.signature(lm.forward).parameters
        arguments |= {name: value for name, value in optional.items() if name in known}
        return arguments, slice(-num_response - 1, -1)
    response, is_real = input_ids[:, -num_response:], attention_mask[:, -num_response:].long()
    start = torch.full_like(response[:, :1], int(lm.config.decoder_start_token_id))
    arguments = {
        "input_ids": input_ids[:, :-num_response],
        "attention_mask": attention_mask[:, :-num_response].long(),
        "decoder_input_ids": torch.cat([start, response[:, :-1]], dim=1),
        "decoder_attention_mask": torch.cat([torch.ones_like(start), is_real[:, :-1]], dim=1),
    }
    return arguments, slice(None)


@contextmanager
def captured_head_input(
    lm: PreTrainedModel, positions: Int[Tensor, " K"] | None = None
) -> Iterator[list[Tensor]]:
    """Collect what the language-model head reads: the trunk's last hidden states, final norm included.

    Reading them here instead of through `output_hidden_states` keeps one layer's states instead of all.

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
    return head


def _head_width(lm: PreTrainedModel) -> int:
    """Size of the states that the head reads, which is not everywhere that of the blocks."""
    return int(_head(lm).weight.shape[1])  # pyright: ignore[reportArgumentType, reportCallIssue, reportAttributeAccessIssue, reportIndexIssue]


def _embeddings_outside(lm: PreTrainedModel, layers: nn.ModuleList) -> dict[str, nn.Module]:
    """Where a decoder looks tokens and positions up, by name; a block may have embeddings of its own."""
    found: dict[str, nn.Module] = {}
    inside = tuple(f"{name}." for name in (name_of(lm, layers), *_encoder_name(lm)))
    for name, module in lm.named_modules(remove_duplicate=False):
        within = name.startswith((*inside, *(f"{outer}." for outer in found)))
        if not within and isinstance(base_of(module), nn.Embedding):
            found[name] = module
    return found


def _encoder_name(lm: PreTrainedModel) -> list[str]:
    return [name_of(lm, lm.get_encoder())] if lm.config.is_encoder_decoder else []
