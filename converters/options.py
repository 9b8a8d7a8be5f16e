"""What a conversion, or an ensemble, is asked for and what comes out of it. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from conch.converters.parity.report import ParityReport
from conch.errors import ConversionError
from conch.store.manifest import Aggregate, Backend, Pooling, ServedDtype
from conch.store.store import is_valid_name
from conch.triton.contract import Form, Granularity, Objective, OnMemberFailure, RewardModelSpec

Normalise = Literal["fold", "parameters", "none"]
"""What becomes of a reward's mean and std: written into the head's weights, applied by the server after the
model, or only recorded."""

Side = Literal["left", "right"]


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How to read a checkpoint; None takes what the checkpoint, or the kind of it, says."""

    base_model: str | None = None
    """What a value head or an adapter builds on, folder or hub id."""

    revision: str | None = None
    """Of the checkpoint on the hub."""

    template: str | None = None
    """Format string over {text}, the client's sample, and {eos}; or `chat`, the tokenizer's chat template."""

    max_length: int | None = None
    """Tokens a sample may have, special tokens included."""

    truncation_side: Side | None = None
    """Where text that is too long loses tokens."""

    pooling: Pooling | None = None
    """Which tokens' states become the score."""

    rewards: tuple[str, ...] = ()
    """Names or numbers of the outputs that are served; empty serves all."""

    normalise: Normalise | None = None
    """What becomes of `mean` and `std`."""

    step_separator: str | None = None
    """Text of the token that ends a step; process rewards need it, others have none."""

    aggregate: Aggregate | None = None
    """How the scores of steps become one; None takes `min`. Process rewards only."""

    granularity: Granularity = "sample"
    """`step`: process rewards give each step's score as well. `token`: every token gets a score as well; a
    process reward then has no separator, and aggregates over tokens."""

    device: str = "cpu"
    """Where the comparison runs, `cpu` or `cuda`."""

    trust_remote_code: bool = False
    """Run code that comes with the checkpoint, here and in the server."""


@dataclass(frozen=True, slots=True)
class ConversionOptions:
    """A conversion.

    Raises:
        ConversionError: the name cannot be a model's, a number is out of range, or the folder is missing.
    """

    checkpoint: str
    """Folder, file of tensors, or hub id."""

    name: str
    """Of the model in the store."""

    model_store: Path
    """The store's folder; made where it is missing."""

    form: Form = "text"
    """`text`: the server tokenises. `token`: the client sends ids."""

    backend: Backend = "python"
    """What the version is written for."""

    dtype: ServedDtype = "float32"
    """Precision of the served weights; the comparison is always with float32."""

    max_batch_size: int = 64
    """Most rows in a request."""

    max_queue_delay_us: int = 1000
    """Microseconds that the server may wait to fill a batch; a lone caller pays them on every request."""

    batch_invariant: bool = False
    """Score each row by itself: on one machine the same to the last bit in any batch, for runs that must
    repeat. Slower. Python back end only."""

    instances: int = 1
    """Copies of the model that the server runs side by side; each takes its memory."""

    instance_kind: Literal["cpu", "gpu"] = "gpu"
    """Where `config.pbtxt` puts the model. The bundled server has a configuration of its own, on the CPU."""

    gpu: int = 0
    """Which of the cards that the server sees."""

    keep: int | None = None
    """Old versions that stay in the store; None keeps all."""

    force: bool = False
    """Take the name even if it is in use by a model of other weights."""

    dry_run: bool = False
    """Do everything, the comparison too, but publish nothing."""

    reading: ReadOptions = field(default_factory=ReadOptions)
    """How to read the checkpoint."""

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.max_batch_size < 1:
            raise ConversionError(f"max_batch_size is {self.max_batch_size}; it must be at least 1")
        if self.max_queue_delay_us < 0:
            raise ConversionError(f"max_queue_delay_us is {self.max_queue_delay_us}; it must be 0 or more")
        if self.batch_invariant and self.backend != "python":
            raise ConversionError(f"batch_invariant needs the python back end, not {self.backend}")
        if self.instances < 1:
            raise ConversionError(f"instances is {self.instances}; it must be at least 1")
        if self.keep is not None and self.keep < 0:
            raise ConversionError(f"keep is {self.keep}; it must be 0 or more old versions")
        if self.gpu < 0:
            raise ConversionError(f"gpu is {self.gpu}; cards are numbered from 0")
        if self.reading.template == "chat" and self.form == "token":
            raise ConversionError("the chat template makes tokens of text: it needs --form text")
        for what, path in (("checkpoint", self.checkpoint), ("base model", self.reading.base_model)):
            if path and looks_like_path(path) and not Path(path).expanduser().exists():
                raise ConversionError(f"{what} folder {path} does not exist")


@dataclass(frozen=True, slots=True)
class Conversion:
    """A published model.

    path: the version folder; None after a dry run, which publishes nothing.
    """

    path: Path | None
    spec: RewardModelSpec
    parity: ParityReport


def check_name(name: str) -> None:
    """Raise ConversionError unless a model of the store may be called so."""
    if not is_valid_name(name):
        raise ConversionError(
            f"model name {name!r} cannot be a folder of the store: "
            "give --name with letters, digits, dots, dashes and underscores only"
        )


def looks_like_path(name: str) -> bool:
    """Whether a name can only mean a folder or file of this machine, no hub id."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def default_name(checkpoint: str) -> str:
    """The last part of a folder or hub id; for a file, of its folder."""
    path = Path(checkpoint)
    if path.is_file():
        return path.resolve().parent.name
    return path.resolve().name if path.is_dir() else checkpoint.rsplit("/", 1)[-1]


@dataclass(frozen=True, slots=True)
class EnsembleOptions:
    """The arguments of `to_ensemble`, which documents them.

    Raises:
        ConversionError: the name or the weight is wrong.
    """

    name: str
    objective: Objective
    uwo_weight: float
    on_member_failure: OnMemberFailure

    def __post_init__(self) -> None:
        check_name(self.name)
        if not (math.isfinite(self.uwo_weight) and self.uwo_weight >= 0):
            raise ConversionError(f"uwo_weight is {self.uwo_weight}; it must be a number of at least 0")
