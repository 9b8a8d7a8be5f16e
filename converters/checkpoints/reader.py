"""Read a reward-model checkpoint of any kind; refuse, with the reason, what cannot be served faithfully."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from conch.converters.checkpoints.architectures import Network, read_network
from conch.converters.checkpoints.files import (
    RewardModelFile,
    base_model_of,
    find_source,
    read_reward_model_file,
)
from conch.converters.checkpoints.heads import Head
from conch.converters.checkpoints.kinds import Kind, recognise
from conch.converters.checkpoints.rules import scoring_rules
from conch.converters.checkpoints.tokenizer import PAIR, closes_pairs, load_tokenizer
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
    decisions: what was decided about how it scores -> value and where it comes from.
    kind: what it is; None only where tests build one by hand.
    output: of the kind `custom`, see `Manifest.output`.
    undecided: options of which nothing says the value; `parity/readings.py` finds out whether that matters.
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
    decisions: dict[str, str] = field(default_factory=dict)
    kind: Kind | None = None
    output: str | None = None
    undecided: tuple[str, ...] = ()
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
    kind = recognise(source, requested)
    network = read_network(source, requested, kind, tokenizer)
    cast(nn.Module, network.model).to(requested.device)
    rules, decisions = scoring_rules(source, requested, from_file, tokenizer, network)
    return RewardCheckpoint(
        source=source.name,
        model=network.model,
        head=network.head,
        tokenizer=tokenizer,
        rules=rules,
        base_model=network.base_model,
        sha256=network.sha256,
        decisions=decisions,
        kind=network.kind,
        output=network.output,
        undecided=_undecided(requested, from_file, network, rules, tokenizer),
        longest_compared=longest_compared(network.model, rules.max_length),
    )


def _undecided(
    requested: ReadOptions, from_file: RewardModelFile, network: Network, rules: ScoringRules, tokenizer: Any
) -> tuple[str, ...]:
    """List the options that nobody gave, and of which the checkpoint's files do not say the value."""
    open_options, kind, outputs = [], network.kind, len(network.labels)
    if len(kind.head) == 2 and kind.activation is None:
        open_options.append("head_activation")
    said = requested.pooling or requested.pooling_token or from_file.pooling or rules.closing_token_id
    if kind.name == "head" and said is None:
        open_options.append("pooling")
    if rules.pooling == "steps" and outputs == 1 and rules.separator_id is not None:
        open_options += [] if requested.function_to_apply else ["function_to_apply"]
    is_ours = from_file.template is not None
    says_template = is_ours or requested.template or requested.chat_template or tokenizer.chat_template
    if rules.pooling == "hf" and outputs == 1 and not says_template and closes_pairs(tokenizer):
        open_options.append("template")
    if (
        rules.reads == "dialogues"
        and rules.template != PAIR
        and requested.add_special_tokens is None
        and not is_ours
    ):
        open_options.append("add_special_tokens")
    return tuple(open_options)


def checkpoint_sha256(name: str, requested: ReadOptions) -> str:
    """Return the `sha256` that `read_checkpoint` would give, at disk speed, without loading the model."""
    source = find_source(name, requested.revision)
    if not source.is_adapter:
        return source.sha256()
    return source.sha256() + find_source(base_model_of(source, requested.base_model)).sha256()
