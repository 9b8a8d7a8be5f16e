"""Read a reward-model checkpoint of any kind; refuse, with the reason, what cannot be served faithfully."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from conch.converters.checkpoints.architectures import read_network
from conch.converters.checkpoints.files import base_model_of, find_source, read_reward_model_file
from conch.converters.checkpoints.heads import Head
from conch.converters.checkpoints.rules import scoring_rules
from conch.converters.checkpoints.tokenizer import load_tokenizer
from conch.converters.options import ReadOptions
from conch.converters.parity.budget import WINDOW_COMPARED, longest_compared
from conch.store.manifest import ScoringRules


@dataclass(frozen=True, slots=True)
class RewardCheckpoint:
    """A reward model in the precision it is stored in, with what is needed to serve it.

    source: folder, file or hub id, as the user wrote it.
    model: classifier or trunk, see `Network`; may be mapped from disk.
    head: see `Network`.
    tokenizer: the checkpoint's own, else the base model's.
    rules: how the model's outputs become scores.
    base_model: folder or hub id of the model that a value head or an adapter builds on.
    sha256: hash of all weights, the base model's of an adapter among them.
    output: of a class that came with the checkpoint, see `Manifest.output`; None of others.
    longest_compared: tokens of the longest sample on which a served form is compared with the checkpoint;
        all that a sample may have, or as many as are affordable, see `parity/budget.py`.
    """

    source: str
    model: PreTrainedModel
    head: Head | None
    tokenizer: Any
    rules: ScoringRules
    base_model: str | None = None
    sha256: str = ""
    output: str | None = None
    longest_compared: int = WINDOW_COMPARED

    @property
    def trunk(self) -> PreTrainedModel:
        """The model below the head."""
        return cast(PreTrainedModel, self.model.base_model)


def read_checkpoint(name: str, requested: ReadOptions | None = None) -> RewardCheckpoint:
    """Load a folder, a file or a hub id; `requested` wins over `reward_model.json`.

    Raises:
        ConversionError: the checkpoint is missing, of no known kind or incomplete; it has NaN, no tokenizer
            or no pad token; or settings contradict the model.
    """
    requested = requested or ReadOptions()
    source = find_source(name, requested.revision)
    from_file = read_reward_model_file(source.folder)
    tokenizer = load_tokenizer(source, requested)
    network = read_network(source, requested.base_model, trust_remote_code=requested.trust_remote_code)
    cast(nn.Module, network.model).to(requested.device)
    rules = scoring_rules(source, requested, from_file, tokenizer, network)
    return RewardCheckpoint(
        source=source.name,
        model=network.model,
        head=network.head,
        tokenizer=tokenizer,
        rules=rules,
        base_model=network.base_model,
        sha256=network.sha256,
        longest_compared=longest_compared(network.model, rules.max_length),
    )


def checkpoint_sha256(name: str, requested: ReadOptions) -> str:
    """Return the `sha256` that `read_checkpoint` would give, at disk speed, without loading the model."""
    source = find_source(name, requested.revision)
    if not source.is_adapter:
        return source.sha256()
    return source.sha256() + find_source(base_model_of(source, requested.base_model)).sha256()
