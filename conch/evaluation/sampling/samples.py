"""Completions that best-of-n keeps: `<folder>/samples/part_000000.jsonl`, records of evaluations.

A part is written once with its completions, and again with further scores, always as a whole. `about.json`
says of which policy, prompts and settings they are: others are refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conch.atomic_files import replace_text
from conch.config import GenerationConfig
from conch.errors import ConfigError
from conch.evaluation.records import EvaluatedSample, EvaluationRecord
from conch.types import Completion, Prompt, Rollout

_FOLDER = "samples"
_ABOUT = "about.json"
_NAME = re.compile(r"part_(\d+)\.jsonl")
_NOT_SAMPLING = "chunk_size"


@dataclass(frozen=True)
class Part:
    """Completions to sample and to write together.

    number: of its file; never used twice.
    prompts: index of the prompt of each completion; those of a prompt stand together.
    """

    number: int
    prompts: tuple[int, ...]


class SampleFolder:
    """Parts of one policy's completions of one list of prompts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / _FOLDER

    def open(self, about: Mapping[str, Any]) -> None:
        """Make the folder, or see that it holds samples of the same.

        about: see `about_samples`.

        Raises:
            ConfigError: it holds others, or cannot be read or made.
        """
        path = self._folder / _ABOUT
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                if self.paths():
                    raise ConfigError(f"{self._folder} holds samples and no {_ABOUT}: take another folder")
                replace_text(path, json.dumps(about, indent=1, ensure_ascii=False) + "\n")
                return
            there = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read or written: {error}; take another folder") from error
        for key, value in about.items():
            if key != "model" and there.get(key) != value:
                raise ConfigError(
                    f"{self._folder} holds samples of {_DIFFERENCES[key]}: set `best_of_n.output_dir` to "
                    "another folder"
                )

    def paths(self) -> list[Path]:
        """Files of the parts, in order."""
        named = {path: _NAME.fullmatch(path.name) for path in self._folder.iterdir()}
        return sorted(path for path, match in named.items() if match)

    def path(self, number: int) -> Path:
        """File of a part."""
        return self._folder / f"part_{number:06d}.jsonl"

    def missing_parts(
        self, records: Sequence[EvaluationRecord], num_prompts: int, num_samples: int, size: int
    ) -> list[Part]:
        """What has to be sampled so that each prompt has `num_samples` completions.

        records: of the parts that there are.
        size: completions of a part, at most.
        """
        have = Counter(sample.prompt for record in records for sample in record.samples)
        missing = [prompt for prompt in range(num_prompts) for _ in range(max(0, num_samples - have[prompt]))]
        numbers = [int(match[1]) for path in self.paths() if (match := _NAME.fullmatch(path.name))]
        first = max(numbers, default=-1) + 1
        cuts = range(0, len(missing), size)
        return [
            Part(first + number, tuple(missing[start : start + size])) for number, start in enumerate(cuts)
        ]


_DIFFERENCES = {
    "policy": "another policy, or of the same with other weights",
    "prompts": "other prompts",
    "generation": "other settings of `generation`",
}


def about_samples(
    policy: str, model: str, prompts: Sequence[Prompt], generation: GenerationConfig
) -> dict[str, Any]:
    """What samples are of.

    policy: digest of the weights.
    model: its name, for people.
    """
    digest = hashlib.sha256(json.dumps([prompt.token_ids for prompt in prompts]).encode()).hexdigest()
    return {
        "model": model,
        "policy": policy,
        "prompts": digest,
        "generation": generation.model_dump(mode="json", exclude={_NOT_SAMPLING}),
    }


def record_of(rollouts: Sequence[Rollout], prompts: Sequence[int]) -> EvaluationRecord:
    """Fresh completions as a record without scores.

    prompts: index of each one's prompt.
    """
    samples = tuple(
        EvaluatedSample(
            prompt=index,
            input=_input(rollout.prompt),
            output=rollout.completion.text,
            num_tokens=len(rollout.completion.token_ids),
            scores={},
        )
        for rollout, index in zip(rollouts, prompts, strict=True)
    )
    return EvaluationRecord(0, samples)


def _input(prompt: Prompt) -> str | list[Mapping[str, Any]]:
    return prompt.text if prompt.dialogue is None else list(prompt.dialogue.messages)


def rollouts_of(samples: Sequence[EvaluatedSample], prompts: Sequence[Prompt]) -> list[Rollout]:
    """Kept completions as a reward source takes them: texts, without token ids."""
    return [
        Rollout(prompts[sample.prompt], Completion(sample.output, (), (), "eos"), policy_version=0)
        for sample in samples
    ]
