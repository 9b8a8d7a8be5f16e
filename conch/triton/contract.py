"""The contract of a served reward model: the converter writes `config.pbtxt` from it, and the client reads it
back from the running server, so that nothing is configured twice.

Forms:
    text    input `text` BYTES [1]                                        -> output `rewards` FP32 [K]
    token   inputs `input_ids` INT64 [-1] (+ `attention_mask` INT64 [-1]) -> output `rewards` FP32 [K]
where a request's first dimension is its rows and K = len(reward_names). The token form may also declare INT32
ids and FP16 or FP64 rewards, as model repositories written by other tools do.

A model of text form `reads` texts, or dialogues. For a dialogue `text` is JSON, the list of messages or
    {"messages": [...], "tools": [...], "chat_template_kwargs": {...}}
of which the last two may be absent; the server renders it by the model's own chat template. A message is an
object with "role" and what the template reads of it.

An ensemble of M members has either form and, beside `rewards`, three outputs that a client may ask for:
    member_rewards FP32 [M]    every member's score, NaN where it gave none
    variance FP32 [1]          variance of the scores that there are; 0 for a single one
    members_used INT32 [1]     how many there are

A model of granularity `step` or `token` gives dense scores: one at the end of each step of a sample, or one
at each of its tokens. K is 1 then, `rewards` is still the score of the sample, and a client may ask for two
outputs more:
    step_rewards FP32 [-1]     a row's dense scores
    step_ends INT32 [-1]       where each of them belongs: how much of the sample, as the client sent it, lies
        before the end of that step or token. Text form: characters, that is Unicode code points, so that
        `text[:end]` is the text up to there. Token form: tokens without padding; `ids[end - 1]` is the last.
Both are as wide as the longest row of the request: shorter rows are filled up with NaN and -1. A row has at
least one dense score and its ends never fall; several tokens that make up one character end together. What a
template or a tokenizer adds to a text has none, nor has what was cut off because the sample was too long. A
text of which no token is left has one, at the end 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Form = Literal["text", "token"]
Engine = Literal["python", "onnxruntime", "pytorch", "ensemble"]
Granularity = Literal["sample", "step", "token"]
"""Parts of a sample that get scores of their own: none, steps or tokens."""
VarianceKind = Literal["population", "sample"]
"""What the squared deviations of k scores are divided by: k or k - 1."""
Reads = Literal["texts", "dialogues"]
"""What the input of a text-form model holds."""

TEXT_INPUT = "text"
TOKEN_INPUT = "input_ids"
MASK_INPUT = "attention_mask"
OUTPUT = "rewards"
MEMBER_REWARDS = "member_rewards"
VARIANCE = "variance"
MEMBERS_USED = "members_used"
STEP_REWARDS = "step_rewards"
STEP_ENDS = "step_ends"

# Keys of a dialogue's JSON.
MESSAGES, TOOLS, TEMPLATE_KWARGS = "messages", "tools", "chat_template_kwargs"


@dataclass(frozen=True, slots=True)
class RewardModelSpec:
    """Contract of one served reward model.

    name: folder name in the model store.
    form: see above.
    max_batch_size: most rows in a request.
    reward_names: one name per output column.
    max_length: tokens a sample may have, special tokens included; 0 if not known.
    max_queue_delay_us: microseconds the server may wait to fill a batch.
    instances: copies of the model that the server runs side by side.
    takes_attention_mask: token form only: whether `attention_mask` is an input, of the dtype of `input_ids`.
    input_dtype: Triton's name of the input's type; left empty it is BYTES for text and INT64 for tokens.
    output_dtype: Triton's name of the type of `rewards`.
    content_sha256: hash of the latest version's manifest, which hashes all its other files; "" if not known.
    engine: Triton's back end of `config.pbtxt`; `configs/embedded.pbtxt` runs the same files in the python
        one. `ensemble`: text form only, passes texts through the two models of `ensemble_parts`.
    members: of an ensemble, its members in the order of `member_rewards`; empty for any other model.
    variance: of an ensemble, whether the variance of k scores is divided by k or by k - 1.
    holds_members: whether an ensemble runs its members itself; else it asks models of their names.
    granularity: see above.
    reads: see above.
    special_tokens: strings that the model's tokenizer takes for one token each, whatever stands around them;
        empty if not known.
    """

    name: str
    form: Form = "text"
    max_batch_size: int = 64
    reward_names: tuple[str, ...] = ("reward",)
    max_length: int = 0
    max_queue_delay_us: int = 1000
    instances: int = 1
    takes_attention_mask: bool = True
    input_dtype: str = ""
    output_dtype: str = "FP32"
    content_sha256: str = ""
    engine: Engine = "python"
    members: tuple[str, ...] = ()
    variance: VarianceKind = "population"
    holds_members: bool = False
    granularity: Granularity = "sample"
    reads: Reads = "texts"
    special_tokens: tuple[str, ...] = ()

    @property
    def asks_members(self) -> bool:
        """Whether it has no weights, and sends samples on to other models."""
        return bool(self.members) and not self.holds_members

    @property
    def is_dense(self) -> bool:
        """Whether a client may ask for scores of steps or tokens."""
        return self.granularity != "sample"

    def __post_init__(self) -> None:
        if not self.input_dtype:
            object.__setattr__(self, "input_dtype", "BYTES" if self.form == "text" else "INT64")


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """Contract of the first part of a text-form ensemble: `text` BYTES [1] -> `input_ids`, `attention_mask`.

    max_batch_size: most rows in a request. max_length: most tokens a row gets.
    """

    name: str
    max_batch_size: int
    max_length: int


def ensemble_parts(name: str) -> tuple[str, str]:
    """Return the names of the tokenizer and of the token-form model of the text-form ensemble `name`."""
    return f"{name}-tokenizer", f"{name}-onnx"


# Keys of Triton's restricted protocols; a client sends `triton-grpc-protocol-<key>: <secret>`.
SECRET_KEY = "conch"
ADMIN_KEY = "conch-admin"

EMBEDDED_NAME = "embedded"
"""Stem of the configuration for the bundled server, `configs/embedded.pbtxt`."""
