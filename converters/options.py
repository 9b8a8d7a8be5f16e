"""The settings of a conversion and of an ensemble, each listed once, and what comes out. No torch here.

The functions `to_triton` and `to_ensemble` take these fields as keywords, the commands as `--options`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import model_validator

from conch.cli import Option
from conch.config import EnsembleObjective, EnsembleVariance, OnMemberFailure, Section
from conch.converters.parity.report import ParityReport
from conch.errors import ConversionError, missing_path
from conch.store.manifest import (
    AddSpecialTokens,
    Aggregate,
    Backend,
    HeadActivation,
    Pooling,
    ScoreFunction,
    ServedDtype,
)
from conch.store.store import is_valid_name
from conch.triton.config_pbtxt import Kind
from conch.triton.contract import Form, Granularity, RewardModelSpec

Normalise = Literal["fold", "parameters", "none"]
"""What becomes of a reward's mean and std: written into the head's weights, applied by the server after the
model, or only recorded."""


DIALOGUE_TEMPLATES = ("chat", "chat{eos}", "pair")
"""Templates of models that read dialogues."""


class ReadOptions(Section):
    """How to read a checkpoint; None takes what the checkpoint, or the kind of it, says."""

    base_model: str | None = None
    """Model that a value head or an adapter builds on, folder or hub id."""

    revision: str | None = None
    """Hub revision of the checkpoint."""

    recipe: str | None = None
    """Facts about a public model that its files do not hold; `list` lists them, `none` takes none. By default
    the one of the checkpoint's hub id. An option that is given as well wins over the recipe's."""

    template: str | None = None
    """Format string over {text}, the client's sample, or {prompt}{output}, and {eos}; or `chat`: clients send
    dialogues, which the tokenizer's chat template renders (`chat{eos}`: with an eos at the end); or `pair`:
    clients send dialogues, and the model reads the prompt and the answer as a pair of sentences."""

    chat_template: str | None = None
    """Chat template to serve with in place of the tokenizer's: Jinja, or a file of it. Means --template
    chat."""

    template_date: str | None = None
    """The day that a chat template shows which writes today's, YYYY-MM-DD; by default that of the conversion.
    It is fixed, or scores would change with it."""

    add_special_tokens: AddSpecialTokens | None = None
    """Special tokens that the tokenizer adds to the templated sample: `once`, its own, but none twice in a
    row at the ends; `always`, even if the template wrote the same; `never`. By default once for texts; for
    dialogues none but those of the chat template."""

    closing_token: str | None = None
    """Text of the token that must close each sample: appended where it is not the last one, kept by a cut."""

    pad_token: str | None = None
    """Text of the pad token, where config.json names none; by default the tokenizer's."""

    max_length: int | None = None
    """Tokens a sample may have, special tokens included; by default the model's window."""

    truncation_side: Literal["left", "right"] | None = None
    """Where text that is too long loses tokens."""

    pooling: Pooling | None = None
    """Which tokens' states become the score."""

    pooling_token: str | None = None
    """Text of the token whose last occurrence is read. Means --pooling token."""

    head_activation: HeadActivation | None = None
    """What stands between the two linear layers of a head, where neither config nor code of the checkpoint
    says."""

    score_tokens: Annotated[tuple[str, ...], Option(("--score-tokens",))] = ()
    """Language models that score by the logits of tokens: their texts, or `id:387`. The rows of the language
    model's head become the outputs."""

    function_to_apply: ScoreFunction | None = None
    """What is applied to the outputs: of process rewards and --score-tokens of several outputs `softmax` by
    default, else `none`."""

    rewards: Annotated[tuple[str, ...], Option(("--reward",))] = ()
    """Names or numbers of the outputs to serve; by default all."""

    normalise: Normalise | None = None
    """What becomes of `mean` and `std`: `fold` writes them into the head's weights, with `parameters` the
    server applies them, `none` only records them."""

    step_separator: str | None = None
    """Process rewards: text that ends a step, one token or several; the score is read at the last."""

    step_delimiter: str | None = None
    """Process rewards of dialogues: what divides the steps of a client's answer, for example a blank line;
    each becomes the separator, and one closes the answer. By default clients write separators themselves."""

    steps_apart: bool = False
    """Process rewards: encode each step and each separator by itself, not the text as a whole."""

    aggregate: Aggregate | None = None
    """Process rewards: how the scores of steps become one; by default `min`."""

    granularity: Granularity = "sample"
    """What gets a score of its own beside the sample: each step of a process reward, or every token. With
    `token` a process reward has no separator, and aggregates over tokens."""

    device: str = "cpu"
    """Where scores are compared, `cpu` or `cuda`."""

    trust_remote_code: bool = False
    """Run code that comes with the checkpoint, here and in the server."""


class ConversionOptions(ReadOptions):
    """Settings of a conversion.

    Raises:
        ConversionError: the name cannot be a model's, a number is out of range, the base model's folder is
            missing, or settings contradict each other.
    """

    name: str | None = None
    """Model in the store; by default the checkpoint's last name."""

    model_store: str | Path = "model_store"
    """The store's folder; made where it is missing."""

    form: Form = "text"
    """What clients send: text, which the server tokenises, or token ids."""

    backend: Backend = "python"
    """What the version is written for, see docs/backends.md."""

    dtype: ServedDtype = "float32"
    """Precision of the served weights; the comparison is always with float32."""

    max_batch_size: int = 64
    """Most rows in a request."""

    max_queue_delay_us: int = 1000
    """Microseconds that the server may wait for a fuller batch; a lone caller pays them on every request."""

    batch_invariant: bool = False
    """Score each row by itself: on one machine the same to the last bit in any batch, for runs that must
    repeat. Slower. Python back end only."""

    instances: int = 1
    """Copies of the model that a server runs side by side; each takes its memory."""

    instance_kind: Kind = "gpu"
    """Where config.pbtxt puts the model. The bundled server has a configuration of its own, on the CPU."""

    gpu: int = 0
    """Number of the card, of those that the server sees."""

    keep: int | None = None
    """Old versions that stay in the store; by default all."""

    force: bool = False
    """Take the name even if it is in use by a model of other weights."""

    dry_run: bool = False
    """Do everything, the comparison too, but publish nothing."""

    @model_validator(mode="after")
    def _check(self) -> ConversionOptions:
        if self.name is not None:
            check_name(self.name)
        if self.max_batch_size < 1:
            raise ConversionError(f"max_batch_size is {self.max_batch_size}; it must be at least 1")
        if self.max_queue_delay_us < 0:
            raise ConversionError(f"max_queue_delay_us is {self.max_queue_delay_us}; it must be 0 or more")
        if self.instances < 1:
            raise ConversionError(f"instances is {self.instances}; it must be at least 1")
        if self.keep is not None and self.keep < 0:
            raise ConversionError(f"keep is {self.keep}; it must be 0 or more old versions")
        if self.gpu < 0:
            raise ConversionError(f"gpu is {self.gpu}; cards are numbered from 0")
        if self.template in DIALOGUE_TEMPLATES and self.form == "token":
            raise ConversionError("the chat template makes tokens of messages: it needs --form text")
        if self.base_model is not None:
            check_exists("base model", self.base_model)
        if self.backend != "python":
            self._check_graph()
        return self

    def _check_graph(self) -> None:
        """Raise ConversionError for settings that no graph can serve."""
        if self.batch_invariant:
            raise ConversionError(f"batch_invariant needs the python back end, not {self.backend}")
        if self.form == "text" and self.backend == "torchscript":
            raise ConversionError(
                "--backend torchscript serves token ids: add --form token, or take --backend onnx or python"
            )
        if self.template in DIALOGUE_TEMPLATES:
            raise ConversionError(f"--backend {self.backend} has no chat template: take --backend python")
        if self.dtype not in ("float32", "float16"):
            raise ConversionError(
                f"--backend {self.backend} takes --dtype float32 or float16, not {self.dtype}; "
                "use --backend python for it"
            )
        if self.granularity != "sample":
            raise ConversionError(
                f"--backend {self.backend} gives one score a sample: --granularity "
                f"{self.granularity} needs --backend python"
            )
        if self.trust_remote_code:
            raise ConversionError(
                f"--backend {self.backend} holds no Python: it takes no --trust_remote_code"
            )
        traced_for = "gpu" if self.device.startswith("cuda") else "cpu"
        if self.backend == "torchscript" and self.instance_kind != traced_for:
            raise ConversionError(
                f"TorchScript runs where it was traced, which is --device {self.device}: "
                f"add --instance_kind {traced_for}, or trace on the other device"
            )


class EnsembleOptions(Section):
    """Settings of an ensemble.

    Raises:
        ConversionError: the name or the weight is wrong.
    """

    name: str
    """The ensemble's name in the store."""

    objective: EnsembleObjective
    """How the members' scores become one: their mean; wco, the lowest; or uwo, mean - uwo_weight *
    variance."""

    uwo_weight: float = 0.1
    """Weight of the variance of the members' scores; used by uwo alone."""

    variance: EnsembleVariance = "population"
    """Variance of k scores, for uwo and the output `variance`: population divides by k, sample by k - 1; that
    of a single score is 0."""

    on_member_failure: OnMemberFailure = "fail"
    """What becomes of a sample that a member gave no score: fail refuses the sample and names the member,
    renormalise combines the other scores and says how many in `members_used`."""

    stacked: bool = False
    """Put the members' weights into one model, which reads a sample once and scores short batches by all
    members in one pass. They must share architecture, tokenizer, template and limits."""

    instance_kind: Kind = "gpu"
    """With stacked: where config.pbtxt puts the model. The bundled server has a configuration of its own, on
    the CPU."""

    gpu: int = 0
    """With stacked: number of the card, of those that the server sees."""

    model_store: str | Path = "model_store"
    """The store's folder."""

    device: str = "cpu"
    """Where the members score the golden samples, `cpu` or `cuda`."""

    @model_validator(mode="after")
    def _check(self) -> EnsembleOptions:
        check_name(self.name)
        if not (math.isfinite(self.uwo_weight) and self.uwo_weight >= 0):
            raise ConversionError(f"uwo_weight is {self.uwo_weight}; it must be a number of at least 0")
        return self


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


def check_exists(description: str, path: str) -> None:
    """Raise ConversionError if a name can only mean a folder or file of this machine, and there is none."""
    is_path = path.startswith((".", "/", "~")) or path.count("/") > 1  # else it may be a hub id
    if is_path and not Path(path).expanduser().exists():
        near = missing_path(Path(path).expanduser())
        near = near if near.startswith("; did you mean") else ""
        raise ConversionError(f"{description} folder {path} does not exist{near}")


def default_name(checkpoint: str) -> str:
    """Return the last part of a folder or hub id; for a file, of its folder."""
    path = Path(checkpoint)
    if path.is_file():
        return path.resolve().parent.name
    return path.resolve().name if path.is_dir() else checkpoint.rsplit("/", 1)[-1]
