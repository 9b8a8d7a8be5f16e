"""The laboratory's world: texts of ten letters, and a hidden preference over them.

The preference (gold) is a small transformer of random weights that nothing trains: its output at the last
letter of a text. The language that texts are drawn from prefers what gold likes, as people's language is made
of what people like to read: letters are as frequent as their rank in gold's liking says, by Zipf's law.
Demonstrations are the best of four such texts by gold, as the answers that people write for SFT are better
than chance. So a thousand pairs of texts say much about the first letters and little about each of the many
last ones, most of which gold does not like.

Legend: B texts, T letters, D width, H heads, V letters of the alphabet.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from transformers import PreTrainedTokenizerFast

from examples.letters import tokenizer_of

LETTERS = string.ascii_letters + string.digits[:8]
TEXT_LENGTH = 10
NUM_PROMPTS = 8
ZIPF = 1.3
"""Frequency of the letter that gold likes k-th best, before normalisation: 1 / k^ZIPF."""
GOLD_SEED = 1234
"""Of the preference's weights: fixed, whatever the seed of a run."""

_WIDTH, _HEADS, _LAYERS = 32, 4, 2
_STD = 0.35
_BEST_OF = 4
_NUM_UNIFORM = 20_000


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.qkv, self.out = nn.Linear(_WIDTH, 3 * _WIDTH), nn.Linear(_WIDTH, _WIDTH)
        self.up, self.down = nn.Linear(_WIDTH, 4 * _WIDTH), nn.Linear(4 * _WIDTH, _WIDTH)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        qkv = self.qkv(self.before_attention(x)).unflatten(2, (3, _HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(*qkv, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.before_mlp(x))))


class HiddenPreference(nn.Module):
    """A transformer of random weights as a function of texts: matrices are N(0, 0.35^2), biases 0.

    seed: of the weights.
    """

    def __init__(self, seed: int = GOLD_SEED) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(len(LETTERS), _WIDTH), nn.Embedding(TEXT_LENGTH, _WIDTH)
        self.blocks = nn.Sequential(*(_Block() for _ in range(_LAYERS)))
        self.norm, self.head = nn.LayerNorm(_WIDTH), nn.Linear(_WIDTH, 1)
        drawn = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=_STD, generator=drawn)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        self.eval().requires_grad_(False)

    def forward(self, letters: Int[Tensor, "B T"]) -> Float[Tensor, " B"]:
        places = torch.arange(letters.shape[1])
        outputs = self.head(self.norm(self.blocks(self.letters(letters) + self.places(places))))
        return outputs[:, -1, 0]

    def scores(self, texts: Sequence[str]) -> list[float]:
        """Gold scores of texts of 1 to 10 letters; of an empty one 0."""
        scores = [0.0] * len(texts)
        rows_of: dict[int, list[int]] = {}
        for row, text in enumerate(texts):
            rows_of.setdefault(len(text), []).append(row)
        rows_of.pop(0, None)
        for rows in rows_of.values():
            ids = torch.tensor([[LETTERS.index(letter) for letter in texts[row]] for row in rows])
            for row, score in zip(rows, self(ids).tolist(), strict=True):
                scores[row] = score
        return scores


@cache
def preference(seed: int = GOLD_SEED) -> HiddenPreference:
    """The preference of these weights, made once a process."""
    return HiddenPreference(seed)


def gold(samples: Sequence[str], **_: Any) -> list[float]:
    """The hidden preference as a reward function: `evaluation.gold=...:gold`, to watch and never to train."""
    return preference().scores(samples)


@cache
def letters_by_liking(seed: int = GOLD_SEED) -> str:
    """All letters, from the one whose texts gold likes best: by its mean over texts of uniform letters, each
    counted as often as it has the letter."""
    drawn = torch.Generator().manual_seed(seed)
    texts = torch.randint(len(LETTERS), (_NUM_UNIFORM, TEXT_LENGTH), generator=drawn)
    scores = preference(seed)(texts)
    liking = [float((scores * counts).sum() / counts.sum()) for counts in _counts(texts)]
    return "".join(LETTERS[letter] for letter in np.argsort(liking)[::-1])


def _counts(texts: Int[Tensor, "B T"]) -> list[Float[Tensor, " B"]]:
    """How often each letter stands in each text."""
    return [(texts == letter).sum(dim=1).float() for letter in range(len(LETTERS))]


@cache
def letter_frequencies(seed: int = GOLD_SEED) -> dict[str, float]:
    """All letters, from the one that gold likes best, each with its share of the language."""
    shares = 1 / np.arange(1, len(LETTERS) + 1) ** ZIPF
    return dict(zip(letters_by_liking(seed), (shares / shares.sum()).tolist(), strict=True))


def random_texts(number: int, rng: np.random.Generator) -> list[str]:
    """Texts of ten letters, each drawn by its frequency in the language."""
    frequencies = letter_frequencies()
    drawn = rng.choice(len(frequencies), size=(number, TEXT_LENGTH), p=list(frequencies.values()))
    letters = list(frequencies)
    return ["".join(letters[place] for place in row) for row in drawn]


def prompts() -> list[str]:
    """The first letters that a policy goes on from: the eight that gold likes best."""
    return list(letters_by_liking()[:NUM_PROMPTS])


def demonstrations(number: int, rng: np.random.Generator) -> list[str]:
    """Texts for SFT: of each four random ones the best by gold."""
    texts = np.array(random_texts(number * _BEST_OF, rng)).reshape(number, _BEST_OF)
    best = np.reshape(gold(texts.ravel().tolist()), texts.shape).argmax(axis=1)
    return texts[np.arange(number), best].tolist()


def labelled_pairs(texts: Sequence[str], noise: float, rng: np.random.Generator) -> list[dict[str, str]]:
    """Preference pairs of neighbours in `texts`, labelled by gold and then turned round at random.

    noise: share of the labels that are wrong.
    """
    scores = gold(texts)
    rows: list[dict[str, str]] = []
    for first in range(0, len(texts) - 1, 2):
        better, worse = sorted((first, first + 1), key=lambda row: -scores[row])
        if rng.random() < noise:
            better, worse = worse, better
        rows.append({"chosen": texts[better], "rejected": texts[worse]})
    return rows


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter, and `<pad>`, `<eos>`."""
    return tokenizer_of(LETTERS, max_length=16)
