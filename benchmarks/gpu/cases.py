"""What the GPU suite computes with: shapes of known models with random weights, a tokenizer made for them,
and the prompts and lengths of one step.

Random weights do not end by themselves. So that a forced end costs no side anything, what is left of a
response is written in its tokens: a token's id, modulo one more than the longest response, is how many tokens
are still to come, the end included (see `CountDown`). Samplers read the last token alone.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    LogitsProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

Algorithm = Literal["sft", "ppo", "grpo"]
ALGORITHMS: tuple[Algorithm, ...] = ("sft", "grpo", "ppo")
SHAPES = ("125m", "1b")
PAD, EOS = 0, 1
BETA = 0.04
"""Weight of the KL in PPO and GRPO."""

_SPECIAL = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def speed_shape(name: str, *, small: bool) -> PretrainedConfig:
    """`125m`: GPT-2 small. `1b`: Llama 3.2 1B. small: the same architectures in no time."""
    if name == "125m":
        shape = {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 512} if small else {}
        return GPT2Config(**{"n_positions": 1024, **shape}, **_NO_DROPOUT, **_SPECIAL)
    widths = (64, 128, 2, 4, 2, 512) if small else (2048, 8192, 16, 32, 8, 128_256)
    return _llama(*widths)


def check_shape(family: str, *, small: bool, spread: float = 0.05) -> PretrainedConfig:
    """A shape for checks: 2 or 4 blocks. family: `gpt2` or `llama`.

    spread: standard deviation of the weights; more than models start with, so that what a model has read
        moves its distributions.
    """
    layers, width, vocab_size = (2, 64, 256) if small else (4, 512, 8192)
    if family == "gpt2":
        heads = max(2, width // 64)
        shape = {"n_layer": layers, "n_embd": width, "n_head": heads, "vocab_size": vocab_size}
        config: PretrainedConfig = GPT2Config(**{"n_positions": 1024, **shape}, **_NO_DROPOUT, **_SPECIAL)
    else:
        heads = max(2, width // 64)
        config = _llama(width, 2 * width, layers, heads, heads // 2, vocab_size)
    config.initializer_range = spread
    return config


def _llama(width: int, inner: int, layers: int, heads: int, kv_heads: int, vocab_size: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab_size,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        **_SPECIAL,
    )


def build(
    config: PretrainedConfig, device: str, dtype: torch.dtype = torch.float32, **settings: Any
) -> PreTrainedModel:
    """A model with random weights, the same every time, made where it will run.

    settings: of `from_config`, such as `attn_implementation`.
    """
    torch.manual_seed(0)
    with torch.device(device):
        # A copy: transformers writes dtype and attention into the config that it gets.
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), **settings)
    return model.to(device=device, dtype=dtype).eval()


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One token a word: `<pad>`, `<eos>`, `w2`, `w3`, ..."""
    vocabulary = {"<pad>": PAD, "<eos>": EOS, **{f"w{number}": number for number in range(2, vocab_size)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", model_max_length=1024
    )


def text_of(ids: Sequence[int]) -> str:
    """The text that these ids are tokenised from."""
    return " ".join(f"w{each}" for each in ids)


class CountDown(LogitsProcessor):
    """Lets a row go on with such tokens only as say that one token less is left, and end when none is.

    A row whose last token says that one is left, or none (padding behind an end), gets the end.

    longest: tokens of the longest response.
    """

    reads_history = False

    def __init__(self, longest: int) -> None:
        self._modulus = longest + 1
        self._left: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids [B, any]: the last column counts. scores [B, V]."""
        if self._left is None:
            self._left = torch.arange(scores.shape[1], device=scores.device) % self._modulus
            self._left[[PAD, EOS]] = -1  # no row goes on with these
        left = input_ids[:, -1:] % self._modulus - 1
        goes_on = (self._left == left) & (left > 0)
        is_end = torch.arange(scores.shape[1], device=scores.device) == EOS
        return scores.masked_fill(~(goes_on | (is_end & (left <= 0))), -torch.inf)


@dataclass(frozen=True)
class Work:
    """One step's rows; the same in every step and on every side.

    prompts: token ids; of SFT the whole samples less their end.
    lengths: tokens of each prompt's responses, ends included; of SFT 1, the end.
    group_size: responses to each prompt.
    longest: tokens of the longest response.
    micro_batches: of an update.
    """

    algorithm: Algorithm
    prompts: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]
    group_size: int
    longest: int
    micro_batches: int

    @property
    def rows(self) -> int:
        """Samples of a step."""
        return len(self.prompts) * self.group_size

    @property
    def tokens(self) -> int:
        """What tokens a second count: those that are sampled; of SFT all that are read."""
        if self.algorithm == "sft":
            return sum(len(prompt) + 1 for prompt in self.prompts)
        return self.group_size * sum(self.lengths)

    @property
    def texts(self) -> list[str]:
        """The prompts' texts."""
        return [text_of(prompt) for prompt in self.prompts]

    @property
    def capacity(self) -> int:
        """Tokens of a packed row of SFT."""
        return max(len(prompt) + 1 for prompt in self.prompts)


_FULL = {
    "sft": {"125m": (64, 1), "1b": (32, 1)},
    "grpo": {"125m": (16, 8), "1b": (8, 8)},
    "ppo": {"125m": (128, 1), "1b": (64, 1)},
}
"""Prompts (or samples) and group size."""
_SMALL = {"sft": (8, 1), "grpo": (2, 4), "ppo": (8, 1)}


def work_of(algorithm: Algorithm, shape: str, vocab_size: int, *, small: bool) -> Work:
    """Log-normal lengths: prompts of 128 tokens in the median and 256 at most, responses of 64 and 128; SFT
    samples of 256 and 1,000."""
    count, group_size = _SMALL[algorithm] if small else _FULL[algorithm][shape]
    draw = random.Random(0)
    longest = 12 if small else 128
    if algorithm == "sft":
        lengths = [1] * count
        prompts = [
            _ids(draw, _length(draw, *((16, 40) if small else (256, 999))), vocab_size) for _ in lengths
        ]
    else:
        lengths = [_length(draw, longest // 2, longest) for _ in range(count)]
        most = (10, 20) if small else (128, 256)
        prompts = [counted_prompt(draw, _length(draw, *most), n, longest, vocab_size) for n in lengths]
    return Work(algorithm, tuple(prompts), tuple(lengths), group_size, longest, micro_batches=2)


def _length(draw: random.Random, median: int, most: int) -> int:
    return min(most, max(2, round(draw.lognormvariate(0.0, 0.6) * median)))


def _ids(draw: random.Random, count: int, vocab_size: int) -> tuple[int, ...]:
    return tuple(draw.randrange(2, vocab_size) for _ in range(count))


def counted_prompt(
    draw: random.Random, count: int, length: int, longest: int, vocab_size: int
) -> tuple[int, ...]:
    """A prompt of `count` tokens, the last of which says that its response has `length`."""
    modulus = longest + 1
    last = length + modulus * draw.randint(1, (vocab_size - 1 - length) // modulus)
    return (*_ids(draw, count - 1, vocab_size), last)


# ------------------------------------------------------------------------------------------------- arithmetic


@dataclass(frozen=True)
class Arithmetic:
    """What one pass of a model takes.

    block_weights: weights of the blocks' matrix products. head_weights: of the head's.
    attention: blocks * heads * width of a head.
    """

    block_weights: int
    head_weights: int
    attention: int

    def forward(self, prompt: int, responses: Sequence[int]) -> float:
        """Operations (a multiplication and an addition are two) of one forward pass over a prompt, once, and
        the responses to it.

        The head counts where a response token is chosen; attention without what its mask hides; a response's
        last token is not read.
        """
        read = [length - 1 for length in responses]
        contexts = prompt * (prompt + 1) // 2 + sum(n * prompt + n * (n + 1) // 2 for n in read)
        weights = self.block_weights * (prompt + sum(read)) + self.head_weights * sum(responses)
        return 2.0 * weights + 4.0 * self.attention * contexts

    def step(self, work: Work) -> float:
        """Operations that a step needs, whatever a side computes beyond them (padding, a group's prompt more
        than once); a backward pass counts as two forward ones.

        SFT trains. GRPO samples, asks the reference and trains; PPO asks the policy for log-probs and values
        as well.
        """
        if work.algorithm == "sft":
            return 3 * sum(self.forward(1, [len(prompt)]) for prompt in work.prompts)
        rows = zip(work.prompts, work.lengths, strict=True)
        once = sum(self.forward(len(prompt), [length] * work.group_size) for prompt, length in rows)
        return (5 if work.algorithm == "grpo" else 6) * once


def arithmetic_of(config: PretrainedConfig) -> Arithmetic:
    """Of a decoder with this config, from its parameters' shapes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    head = model.get_output_embeddings()
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    tables.add(id(head.weight))
    blocks = sum(p.numel() for p in model.parameters() if p.ndim == 2 and id(p) not in tables)
    heads = int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return Arithmetic(blocks, head.weight.numel(), int(config.num_hidden_layers) * heads * width)
