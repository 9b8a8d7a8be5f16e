"""A language model with the heads of implicit language Q-learning, and its decoding.

Legend: B sequences, T tokens (prompt padded left, response padded right), R response positions (the last R of
T), N states, D hidden size, V vocabulary. Position r speaks of response token r and is read at the token
before it: the state in which that token was chosen.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from conch.config import ModelConfig
from conch.errors import ModelError
from conch.models.forward import ForwardInputs
from conch.models.loading import load_lm
from conch.models.policy import (
    HEADS_FILE,
    captured_head_input,
    decoder_start,
    flush_left,
    plain_generation,
    response_logits_and_states,
)
from conch.ops import at_least_float32, head_dtype

DECODING_FILE = "ilql.json"
"""File with the number of heads and the settings of decoding, beside the weights."""

_MASK = "logit_mask"
_NUM_HEADS = "num_q_heads"
_GENERATE_KEYS = ("max_new_tokens", "temperature", "top_k", "top_p", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class ILQLOutput:
    """Outputs at the response positions; all but the logits are float32 at least.

    logits: of each response token given all tokens before it.
    qs: of each Q head, the values of all tokens.
    target_q: minimum over the target heads of the response token's value, without gradient.
    values: of the states.
    """

    logits: Float[Tensor, "B R V"]
    qs: tuple[Float[Tensor, "B R V"], ...]
    target_q: Float[Tensor, "B R"]
    values: Float[Tensor, "B R"]


class Head(nn.Module):
    """Two-layer perceptron on hidden states whose last layer starts at zero."""

    def __init__(self, hidden_size: int, num_outputs: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(hidden_size, 2 * hidden_size)
        self.out = nn.Linear(2 * hidden_size, num_outputs)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, states: Float[Tensor, "*S D"]) -> Float[Tensor, "*S V"]:
        """Outputs of each state, in float32 at least."""
        return at_least_float32(self.out(torch.relu(self.hidden(states.to(self.hidden.weight.dtype)))))


class TargetHeads(nn.ModuleList):
    """Frozen copies of Q heads, float32 at least.

    They stay in float32 where the rest of a module is cast to half precision, in which their small steps
    towards the Q heads would round to nothing.
    """

    def __init__(self, heads: nn.ModuleList) -> None:
        super().__init__(copy.deepcopy(head) for head in heads)
        self.requires_grad_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TargetHeads:
        # torch's own hook for `.to()`, `.bfloat16()` and the like.
        return super()._apply(lambda tensor: at_least_float32(fn(tensor)), recurse)


class ILQLPolicy(nn.Module):
    """The one trained module of ILQL: language model, Q heads, their targets, and V head on a shared trunk.

    logit_mask: True at [i, j] forbids token j right after token i in decoding.
    decoding: default settings of `generate`.

    Raises:
        ModelError: from the constructor: `lm` has no language-model head, or `logit_mask` has another shape
            than [V, V] or lets nothing follow a token.
    """

    logit_mask: Tensor | None

    def __init__(
        self,
        lm: PreTrainedModel,
        *,
        num_q_heads: int = 2,
        logit_mask: Bool[Tensor, "V V"] | None = None,
        decoding: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        vocabulary, width = _head_shape(lm)
        self.lm = lm
        dtype = head_dtype(lm.dtype)
        self.q_heads = nn.ModuleList(Head(width, vocabulary) for _ in range(num_q_heads)).to(dtype)
        self.target_q_heads = TargetHeads(self.q_heads)
        self.value_head = Head(width, 1).to(dtype)
        self.decoding = dict(decoding or {})
        if logit_mask is not None:
            _check_mask(logit_mask, vocabulary)
        # Not trained: no part of a checkpoint's training state.
        self.register_buffer(_MASK, logit_mask, persistent=False)

    def forward(
        self, input_ids: Int[Tensor, "B T"], attention_mask: Bool[Tensor, "B T"], num_response: int
    ) -> ILQLOutput:
        """Everything that the losses need, in one pass: DDP allows one forward pass per backward pass.

        attention_mask: True at real tokens, False at padding on either side.
        """
        inputs = ForwardInputs(input_ids, attention_mask, num_response)
        logits, states = response_logits_and_states(self.lm, inputs)
        with torch.no_grad():
            response = input_ids[:, -num_response:].unsqueeze(-1)
            targets = [head(states).gather(-1, response).squeeze(-1) for head in self.target_q_heads]
        return ILQLOutput(
            logits,
            qs=tuple(head(states) for head in self.q_heads),
            target_q=torch.stack(targets).amin(dim=0),
            values=self.value_head(states).squeeze(-1),
        )

    @torch.no_grad()
    def sync_targets(self, alpha: float) -> None:
        """Move the target heads towards the Q heads: target <- (1 - alpha) target + alpha Q."""
        pairs = zip(self.target_q_heads.parameters(), self.q_heads.parameters(), strict=True)
        for target, online in pairs:
            target.lerp_(online.to(target.dtype), alpha)

    # ----------------------------------------------------------------------------------------------- decoding

    @torch.no_grad()
    def advantages(self, states: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """min over target heads of Q(s, a) - V(s) of every token, in float32."""
        min_q = torch.stack([head(states) for head in self.target_q_heads]).amin(dim=0)
        return min_q - self.value_head(states)

    @contextmanager
    def shaping(self, beta: float) -> Iterator[Sequence[LogitsProcessor]]:
        """Yield processors with which `lm.generate`, run inside, samples by log pi + beta * advantage."""
        with captured_head_input(self.lm) as captured:
            yield [AdvantageShaping(self, beta, captured)]

    def generate(
        self,
        input_ids: Int[Tensor, "B P"],
        attention_mask: Int[Tensor, "B P"] | None = None,
        *,
        beta: float | None = None,
        **settings: Any,
    ) -> Any:
        """Run `lm.generate` with the heads; returns its result, by default sequences [B, T].

        What the language model's checkpoint says of sampling does not count (`lm.generation_config`: a
        repetition penalty, say): training sampled without it.

        input_ids: prompts, padded left where they differ in length.
        beta: weight of the advantages; None takes the one saved with the model.
        settings: arguments of `lm.generate`, which override those saved with the model.

        Raises:
            ModelError: there is no beta, neither as an argument nor saved.
        """
        beta = self.decoding.get("beta") if beta is None else beta
        if beta is None:
            raise ModelError("no `beta` was saved with this model: pass `beta=`")
        saved = {name: self.decoding[name] for name in _GENERATE_KEYS if name in self.decoding}
        start = {}
        if self.lm.config.is_encoder_decoder:
            start["decoder_input_ids"] = decoder_start(self.lm, len(input_ids))
            if attention_mask is not None:
                input_ids, mask = flush_left(input_ids, attention_mask.bool())
                attention_mask = mask.to(attention_mask.dtype)
        with self.shaping(beta) as processors, plain_generation(self.lm):
            return self.lm.generate(  # pyright: ignore[reportCallIssue]  typed as a Tensor attribute
                input_ids,
                attention_mask=attention_mask,
                logits_processor=LogitsProcessorList(processors),
                **{"do_sample": True, "top_k": 0, **start, **saved, **settings},
            )

    # -------------------------------------------------------------------------------------------------- files

    def head_tensors(self) -> dict[str, Tensor]:
        """Weights beside the language model's, for `heads.safetensors`."""
        heads = {name: value for name, value in self.state_dict().items() if not name.startswith("lm.")}
        return heads if self.logit_mask is None else {**heads, _MASK: self.logit_mask}

    def settings(self) -> dict[str, Any]:
        """Contents of `ilql.json`."""
        return {_NUM_HEADS: len(self.q_heads), **self.decoding}

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ILQLPolicy:
        """Load the policy that `ILQLTrainer.save_pretrained` wrote, in evaluation mode.

        Raises:
            ModelError: the folder holds no model with ILQL heads, or heads of another model.
        """
        folder = Path(folder)
        lm = load_lm(ModelConfig(path=str(folder)))
        try:
            settings = json.loads((folder / DECODING_FILE).read_text())
            tensors = load_file(folder / HEADS_FILE)
        # safetensors reports a damaged file as its own error type
        except Exception as error:
            raise ModelError(
                f"{folder} holds no ILQL heads ({HEADS_FILE}, {DECODING_FILE}): give a folder that ILQL "
                f"training saved ({error})"
            ) from error
        num_q_heads, mask = settings.pop(_NUM_HEADS), tensors.pop(_MASK, None)
        policy = cls(lm, num_q_heads=num_q_heads, logit_mask=mask, decoding=settings)
        try:
            missing, unexpected = policy.load_state_dict(tensors, strict=False)
        except RuntimeError as error:
            raise ModelError(f"the heads in {folder} do not fit its language model: {error}") from error
        lost = [name for name in missing if not name.startswith("lm.")]
        if lost or unexpected:
            raise ModelError(f"the heads in {folder} are not whole: {[*lost, *unexpected][0]} does not fit")
        return policy.eval()


class AdvantageShaping(LogitsProcessor):
    """Turns the logits of a next token into log pi(a|s) + beta * (min target Q(s, a) - V(s)), less what the
    logit mask forbids (Snell et al. 2022, arXiv:2206.11871, section 4.3).

    captured: inputs of the language-model head, from `conch.models.policy.captured_head_input`; emptied by
        each call.
    """

    reads_history = False
    """Reads the last token only; see `conch.rollouts.hf.continuous_batching.Sampling`."""

    def __init__(self, policy: ILQLPolicy, beta: float, captured: list[Tensor]) -> None:
        self._policy = policy
        self._beta = beta
        self._captured = captured

    def __call__(self, input_ids: Int[Tensor, "B T"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        """Called once per token, right after the forward pass that gave `scores`."""
        states = self._captured[-1][:, -1]
        self._captured.clear()
        shaped = at_least_float32(scores).log_softmax(dim=-1) + self._beta * self._policy.advantages(states)
        if self._policy.logit_mask is None:
            return shaped
        return shaped.masked_fill(self._policy.logit_mask[input_ids[:, -1]], -torch.inf)


def _head_shape(lm: PreTrainedModel) -> tuple[int, int]:
    """Vocabulary and width of the language-model head."""
    weight = getattr(lm.get_output_embeddings(), "weight", None)
    if weight is None:
        raise ModelError(f"{type(lm).__name__} has no language-model head to put Q heads beside")
    return int(weight.shape[0]), int(weight.shape[1])


def _check_mask(mask: Tensor, vocabulary: int) -> None:
    if tuple(mask.shape) != (vocabulary, vocabulary):
        raise ModelError(
            f"`logit_mask` has the shape {list(mask.shape)}, the model knows {vocabulary} tokens: give "
            f"[{vocabulary}, {vocabulary}]"
        )
    stuck = mask.all(dim=1).nonzero().flatten().tolist()
    if stuck:
        raise ModelError(
            f"`logit_mask` lets nothing follow token {stuck[0]} ({len(stuck)} such tokens): allow eos"
        )
