"""Files of a version beside the weights: `manifest.json`, also that of an ensemble, and `golden.json`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from conch.config import EnsembleObjective, EnsembleVariance, OnMemberFailure, Section, full_dtype
from conch.triton.contract import Form, Granularity, Reads

MANIFEST = "manifest.json"
GOLDEN = "golden.json"

ServedDtype = Annotated[Literal["float32", "float16", "bfloat16", "int8"], BeforeValidator(full_dtype)]
"""Precision of served weights. int8: of linear layers, by channel; what is beside them stays float32."""

Backend = Literal["python", "onnx", "torchscript"]
"""Triton back end, or program, that a version is written for."""

Pooling = Literal["hf", "last_token", "first_eos", "cls", "mean", "token", "steps"]
"""Which tokens' states become the score. `hf`: what the checkpoint's own class does. `last_token`: the last
one that is no padding. `first_eos`: the first eos, the last token where there is none. `cls`: the first
token. `mean`: all of them. `token`: the last that is `pooling_token_id`, the last token where there is none.
`steps`: the ends of a text's steps, for process rewards."""

HeadActivation = Literal["relu", "gelu", "silu", "tanh", "selu"]
"""What stands between the two linear layers of a head; `gelu` is the exact one."""

ScoreFunction = Literal["none", "softmax", "sigmoid"]
"""What is applied to the head's outputs; as `function_to_apply` of transformers' text classification
pipeline."""

AddSpecialTokens = Literal["once", "always", "never"]
"""Which special tokens the tokenizer adds to the templated sample: `once`, its own, but no bos twice in a row
at the beginning and no eos at the end; `always`, its own, even if the template wrote the same; `never`,
none."""

Aggregate = Literal["min", "mean", "last", "prod"]
"""Rule that combines the scores of a text's steps into one."""

_CHUNK_BYTES = 1 << 20


class ParitySummary(Section):
    """Distance of the served scores from the original's; the whole table is in `parity.txt`."""

    max_error: float
    """Largest difference of a score, divided by max(1, |score|)."""

    max_difference: float | None = None
    """Largest difference of a score."""

    mean_difference: float | None = None
    """Mean difference of a score."""

    tolerance: float
    """Largest difference allowed."""

    samples: int
    """Scores compared."""


class ScoringRules(Section):
    """How a reward model makes scores of samples: which tokens it reads, and what becomes of its outputs."""

    template: str
    """Python format string over {text} and {eos} that makes the model's input from a sample; or `chat`: a
    sample is a dialogue as JSON, rendered by the tokenizer's chat template; or `chat{eos}`: without the white
    space that the rendering has behind its last special token, and with one eos at its end."""

    reads: Reads = "texts"
    """What a sample is in the text form."""

    contents: dict[str, Literal["text", "parts"]] = Field(default_factory=dict)
    """Of dialogues: role -> the only form of content that the chat template reads of it, a string or a list
    of parts. Contents of other roles stay as they are sent."""

    arguments: Literal["dict", "json"] | None = None
    """Of dialogues: the only form of tool calls' arguments that the chat template reads; None leaves them as
    they are sent."""

    truncation_side: Literal["left", "right"] | None = None
    """Side on which a text that is too long loses tokens; None takes the tokenizer's."""

    max_length: int = Field(ge=1)
    """Tokens a sample may have, special tokens included."""

    pooling: Pooling = "hf"
    """Which tokens' states become the score."""

    pooling_token_id: int | None = None
    """Token whose last occurrence is read; of pooling `token`."""

    add_special_tokens: AddSpecialTokens | None = None
    """Which special tokens the tokenizer adds; None means `once` for texts and `never` for dialogues."""

    closing_token_id: int | None = None
    """Token that closes each sample of the text form: appended where the sample does not end in it, and kept
    by a cut; None closes none."""

    head_activation: HeadActivation | None = None
    """Between the two linear layers of the head; None where the head has one."""

    function_to_apply: ScoreFunction = "none"
    """Applied to the head's outputs before `columns` are chosen; softmax is over the outputs."""

    columns: tuple[int, ...] | None = None
    """Numbers of the head's outputs that are served; None serves all."""

    reward_names: tuple[str, ...]
    """One name per score."""

    separator_id: int | None = None
    """Last token of the separator that ends a step; of pooling `steps`."""

    separator_ids: tuple[int, ...] = ()
    """All tokens of a separator of several: a step ends at the last of them where they stand in a row; empty
    where `separator_id` is the whole separator."""

    step_separator: str | None = None
    """The separator's text; of pooling `steps`."""

    step_delimiter: str | None = None
    """What divides the steps of a client's answer: each becomes the separator, and one closes the answer;
    None where clients write separators themselves. Of dialogues."""

    steps_apart: bool = False
    """Whether each step, and each separator, is encoded by itself, not the text as a whole."""

    aggregate: Aggregate | None = None
    """How the scores of steps become one; of pooling `steps`."""

    granularity: Granularity = "sample"
    """`step`, `token`: steps or tokens get scores of their own as well, see `conch.triton.contract`."""

    normalise: bool
    """Whether `model.py` computes (raw - mean) / std."""

    folded: bool = False
    """Whether the head's weights compute (raw - mean) / std already."""

    mean: tuple[float, ...] | None = None
    """Mean of raw scores on reference samples, per reward; None if never measured."""

    std: tuple[float, ...] | None = None
    """Standard deviation of raw scores on reference samples, per reward; None if never measured."""

    pad_token_id: int
    """Fills short rows of a batch, on the right; of pooling `hf`, what the model's own pooling takes for
    padding."""

    eos_token_id: int | None = None
    """What {eos} stands for."""

    vocab_size: int
    """Token ids must be below this."""


class Manifest(ScoringRules):
    """Where a served model comes from and how it scores. `model.py` reads its settings from here."""

    format: Literal[1] = 1
    """Version of this file's layout."""

    name: str
    """Model the version belongs to."""

    form: Form
    """`text` or `token`."""

    backend: Backend = "python"
    """Back end that the version is written for."""

    source: str
    """Checkpoint folder's name, or hub id."""

    source_sha256: str = ""
    """Hash of the checkpoint's weights, by which a later conversion knows its own; "" if not known."""

    base_model: str | None = None
    """Model that the checkpoint builds on, for value heads and adapters: folder's name or hub id."""

    revision: str | None = None
    """Hub revision that was converted."""

    created_at: str
    """Time of the conversion, UTC, ISO 8601."""

    layout: Literal["classifier", "trunk", "custom"] = "classifier"
    """`classifier`: a transformers sequence classifier, whose class pools. `trunk`: a model without head, and
    the head in `head.safetensors`; `model.py` pools. `custom`: a class that came with the checkpoint, which
    pools; its scores are `output` of what it returns."""

    auto_class: str | None = None
    """Class of transformers that loads a `custom` network, for example `AutoModel`."""

    output: str | None = None
    """Of a `custom` network: name or number of what it returns that holds the scores; "" for a bare
    tensor."""

    recipe: str | None = None
    """Facts about a public model that the conversion was told to use: name and version of the table."""

    decisions: dict[str, str] = Field(default_factory=dict)
    """What the conversion decided, and why: head, pooling, template, ... -> the value and where it comes
    from."""

    batch_invariant: bool = False
    """Whether each row goes through the model by itself, unpadded: its score is then the same to the last bit
    whichever rows share its request or batch."""

    dtype: ServedDtype
    """Precision of the served weights."""

    trust_remote_code: bool = False
    """Whether the model runs code that came with the checkpoint."""

    special_tokens: tuple[str, ...] = ()
    """The tokenizer's special tokens, without those that are reserved; of the text form."""

    tools: dict[str, str]
    """Versions of python and of the libraries that converted the model."""

    parity: ParitySummary | None = None
    """Result of the parity check; None only while that check runs."""

    files: dict[str, str] = Field(default_factory=dict)
    """Path below the version folder -> sha256, for every other file."""


class GoldenSample(Section):
    """One sample whose score is known: `text` in the text form, `input_ids` in the token form."""

    text: str | None = None
    """The client's sample."""

    input_ids: tuple[int, ...] | None = None
    """Token ids, without padding."""

    scores: tuple[float, ...]
    """Scores of the original model, one per reward, normalised if the server normalises."""

    step_scores: tuple[float, ...] | None = None
    """Scores of steps or tokens, where the model gives these; None elsewhere."""

    step_ends: tuple[int, ...] | None = None
    """End of each step or token: characters of `text`, or tokens, before it."""

    def request(self) -> dict[str, Any]:
        """Return the sample as a request of one row: `texts`, or `input_ids` and `attention_mask`."""
        if self.text is not None:
            return {"texts": [self.text]}
        assert self.input_ids is not None
        return {"input_ids": [list(self.input_ids)], "attention_mask": [[1] * len(self.input_ids)]}


class Golden(Section):
    """Samples that a server must score right before it counts as ready."""

    tolerance: float = Field(gt=0)
    """Largest difference allowed, divided by max(1, |score|)."""

    samples: tuple[GoldenSample, ...] = Field(min_length=1)
    """The samples."""


def sha256_of(path: Path) -> str:
    """Return the hexadecimal sha256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


class EnsembleMember(Section):
    """One model of the store whose score goes into the combined reward."""

    name: str
    """Model in the same store."""

    reward: str
    """Which of its rewards is used."""

    column: int = Field(ge=0)
    """Column of that reward in the model's `rewards`."""

    columns: int = Field(ge=1)
    """Number of rewards that the model returns."""

    version: int
    """Version of the model at the ensemble's creation."""

    content_sha256: str
    """Hash of that version's manifest."""


class EnsembleManifest(Section):
    """Members of an ensemble and the rule that combines their scores; the ensemble's `model.py` reads it."""

    format: Literal[1] = 1
    """Version of this file's layout."""

    name: str
    """Model the version belongs to."""

    form: Form
    """`text` or `token`, the same for all members."""

    reads: Reads = "texts"
    """What a sample is in the text form, the same for all members."""

    created_at: str
    """Time of writing, UTC, ISO 8601."""

    members: tuple[EnsembleMember, ...] = Field(min_length=2)
    """The members, in the order of the columns of `member_rewards`."""

    objective: EnsembleObjective
    """`mean`: mean of the scores. `wco`: the lowest. `uwo`: mean - uwo_weight * variance."""

    uwo_weight: float = Field(ge=0, allow_inf_nan=False)
    """Weight of the variance; used by `uwo` alone."""

    variance: EnsembleVariance = "population"
    """Whether the variance of k scores is divided by k or by k - 1; versions of before the choice have k."""

    on_member_failure: OnMemberFailure
    """A sample without one member's score: `fail` refuses it, `renormalise` combines the scores there are."""

    reward_names: tuple[str]
    """Name of the combined reward."""

    max_length: int = Field(ge=1)
    """The lowest limit of the members, in tokens."""

    holds_members: bool = False
    """Whether the version has its members' weights itself, in folders `members/0` and so on, in their order;
    else it asks models of these names."""

    in_one_pass: bool = False
    """Of a version that holds its members: whether short batches go through all members in one pass."""

    why_apart: str = ""
    """Why the members run one after another always; "" where they do not."""

    tools: dict[str, str]
    """Versions of python and numpy."""

    parity: ParitySummary | None = None
    """Result of the comparison with the formula; None only while it runs."""

    files: dict[str, str] = Field(default_factory=dict)
    """Path below the version folder -> sha256, for every other file."""
