"""The limit that served models are compared with: the same model in this process, with the best batching."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from benchmarks.measuring import on_core, timed
from conch.types import Completion, Prompt, Rollout

# Padded tokens in a batch of the limit; the fastest is taken.
BUDGETS = (512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True, slots=True)
class Work:
    """What is scored: texts, the ids that the text form makes of them, and the id that pads them."""

    texts: list[str]
    ids: list[list[int]]
    pad: int = 0

    def rollouts(self) -> list[Rollout]:
        """The same as a trainer has them."""
        nothing = Completion("", (), (), "length")
        return [
            Rollout(Prompt(text, tuple(ids)), nothing, 0)
            for text, ids in zip(self.texts, self.ids, strict=True)
        ]


class Limit:
    """The model in this process."""

    def __init__(self, checkpoint: Path, core: int) -> None:
        self._model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
        self.pad = self._tokenizer.pad_token_id
        self._core = core
        self.budget = 0

    def choose_budget(self, rows: Sequence[list[int]]) -> None:
        """Try all and keep the fastest."""
        times = {}
        for budget in BUDGETS:
            self.budget = budget
            times[budget] = min(timed(lambda: self.score_tokens(rows))[1] for _ in range(2))
        self.budget = min(times, key=times.__getitem__)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of the texts, each closed by eos; all at once, as a tokenizer is fastest."""
        closed = [text + self._tokenizer.eos_token for text in texts]
        return self._tokenizer(closed).input_ids

    def score_texts(self, texts: Sequence[str]) -> list[float]:
        """Tokenise and score."""
        with on_core(self._core):
            return self.score_tokens(self.encode(texts))

    @torch.inference_mode()
    def score_tokens(self, rows: Sequence[list[int]]) -> list[float]:
        """Score rows of ids."""
        scores = [0.0] * len(rows)
        with on_core(self._core):
            for batch in self._batches(rows):
                longest = len(rows[batch[-1]])
                ids = torch.full((len(batch), longest), self.pad)
                mask = torch.zeros_like(ids)
                for line, index in enumerate(batch):
                    ids[line, : len(rows[index])] = torch.tensor(rows[index])
                    mask[line, : len(rows[index])] = 1
                logits = self._model(input_ids=ids, attention_mask=mask).logits[:, 0].tolist()
                for index, score in zip(batch, logits, strict=True):
                    scores[index] = score
        return scores

    def _batches(self, rows: Sequence[list[int]]) -> Iterator[list[int]]:
        batch: list[int] = []
        for index in sorted(range(len(rows)), key=lambda index: len(rows[index])):
            if batch and (len(batch) + 1) * len(rows[index]) > self.budget:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch
