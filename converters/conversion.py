"""What a conversion is asked for and what comes out of it. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from conch.config import Dtype
from conch.converters.parity import ParityReport
from conch.errors import ConversionError
from conch.serving.spec import Form, RewardModelSpec
from conch.serving.store import is_valid_name


@dataclass(frozen=True, slots=True)
class Options:
    """The arguments of `to_triton`, which documents them, with the name filled in.

    Raises:
        ConversionError: the name cannot be a model's, the batch size is below 1, or the folder is missing.
    """

    checkpoint: str
    name: str
    model_store: Path
    form: Form
    revision: str | None
    max_length: int | None
    template: str | None
    max_batch_size: int
    normalise: bool | None
    dtype: Dtype
    device: str
    trust_remote_code: bool

    def __post_init__(self) -> None:
        if not is_valid_name(self.name):
            raise ConversionError(
                f"model name {self.name!r} cannot be a folder of the store: "
                "give --name with letters, digits, dots, dashes and underscores only"
            )
        if self.max_batch_size < 1:
            raise ConversionError(f"max_batch_size is {self.max_batch_size}; it must be at least 1")
        looks_like_path = self.checkpoint.startswith((".", "/", "~")) or self.checkpoint.count("/") > 1
        if looks_like_path and not Path(self.checkpoint).is_dir():
            raise ConversionError(f"checkpoint folder {self.checkpoint} does not exist")


@dataclass(frozen=True, slots=True)
class Conversion:
    """A published model.

    path: the version folder.
    """

    path: Path
    spec: RewardModelSpec
    parity: ParityReport


def default_name(checkpoint: str) -> str:
    """The last part of a folder or hub id."""
    return Path(checkpoint).resolve().name if Path(checkpoint).is_dir() else checkpoint.rsplit("/", 1)[-1]
