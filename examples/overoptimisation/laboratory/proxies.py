"""The laboratory's reward models as reward functions, and texts sampled from its starting policy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from conch.data.preferences import TextEncoder, collate_texts
from conch.trainers.reward_model import METADATA_FILE, scores_of
from examples.overoptimisation.laboratory.hidden_preference import TEXT_LENGTH, prompts

_ROWS = 1024


class Proxy:
    """A trained reward model.

    folder: what `RewardModelTrainer` saved. Scores have mean 0 and standard deviation 1 on the reference
        texts of its training, so that those of several members can be compared.
    """

    def __init__(self, folder: Path) -> None:
        saved = json.loads((folder / METADATA_FILE).read_text())
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self._encoder = TextEncoder(tokenizer, saved["template"], saved["max_length"])
        self._model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        self._pad = int(tokenizer.pad_token_id)
        self._mean, self._std = float(saved["mean"]), float(saved["std"])

    @torch.no_grad()
    def scores(self, samples: Sequence[str], **_: Any) -> list[float]:
        """A reward function, see docs/rewards.md."""
        scores: list[float] = []
        encoded = self._encoder.encode(list(samples))
        for start in range(0, len(encoded), _ROWS):
            texts = collate_texts(encoded[start : start + _ROWS], self._pad, "cpu")
            scores += ((scores_of(self._model, texts)[:, 0] - self._mean) / self._std).tolist()
        return scores


@torch.no_grad()
def sampled_texts(folder: Path, per_prompt: int, seed: int) -> list[str]:
    """Texts that a policy writes behind each prompt, `per_prompt` in a row.

    folder: of the policy.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    policy = AutoModelForCausalLM.from_pretrained(folder).eval()
    openings = [letter for letter in prompts() for _ in range(per_prompt)]
    torch.manual_seed(seed)
    texts: list[str] = []
    for start in range(0, len(openings), _ROWS):
        ids = torch.tensor(tokenizer(openings[start : start + _ROWS]).input_ids)
        written = policy.generate(  # pyright: ignore[reportAttributeAccessIssue]
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            max_new_tokens=TEXT_LENGTH - 1,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts += tokenizer.batch_decode(written, skip_special_tokens=True)
    return texts
