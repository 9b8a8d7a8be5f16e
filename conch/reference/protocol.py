"""Messages between trainers and reference servers.

    GET  /health     -> ReferenceHealth, as JSON
    POST /logprobs   LogprobRequest and rows -> LogprobReply and log-probs

Requests and answers with tensors are safetensors files: numbers as they are, and nothing that could be code.
A file's metadata holds the message beside them, as JSON under the key `message`.

    request: input_ids int64 [B, T], attention_mask bool [B, T]   prompts padded left, responses padded right
    answer:  logprobs float32 or float64 [B, R]                   of response tokens, 0 where there is none

Rows travel as a trainer collates them, and the server packs them by the same code (`conch.models.forward`):
so its kernels see the shapes that the policy's see, and the quadratic mask of packed rows need not travel.

Where the server asks for a secret, every request has a header `authorization: Bearer SECRET`. A server
refuses with `{"detail": one sentence}`: 400 for what it can never answer, 401 without the secret or with
another, 408 and 413 for a request that is too slow or too large, 503 where it has failed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Literal, TypeVar

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from conch.config import Section
from conch.errors import DataError, first_line
from conch.models.forward import Packing

MEDIA_TYPE = "application/octet-stream"
_MESSAGE = "message"


class ReferenceHealth(Section):
    """State of a server that answers.

    digest: of its weights, see `conch.reference.digest`.
    dtype: of its weights, as torch names it.
    vocabulary: tokens that the model knows.
    window: longest prompt and response together, in tokens; None where there is no limit.
    packing: rows that the model reads.
    device: `cpu` or `cuda`.
    versions: of the libraries that compute.
    """

    digest: str
    dtype: str
    vocabulary: int
    window: int | None
    packing: Packing
    device: str
    versions: dict[str, str]


class LogprobRequest(Section):
    """Request for the log-probs of response tokens.

    num_response: R, the columns that hold responses.
    temperature: that logits are divided by.
    autocast: precision that the forward pass is cast to; None leaves the weights' own.
    trained_layers: top blocks that the trainer trains, -1 for all, 0 for none: torch may multiply in another
        order by weights that take a gradient, see `conch.models.reference`.
    """

    num_response: int = Field(ge=1)
    temperature: float = Field(gt=0, allow_inf_nan=False)
    autocast: Literal["bfloat16", "float16"] | None = None
    trained_layers: int = Field(default=-1, ge=-1)


class LogprobReply(Section):
    """What stands beside log-probs. digest: of the weights that gave them."""

    digest: str


MessageT = TypeVar("MessageT", bound=Section)


def encode(message: Section, tensors: Mapping[str, Tensor]) -> bytes:
    """A message and tensors as the bytes of a safetensors file."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(on_cpu, metadata={_MESSAGE: message.model_dump_json()})


def decode(message: type[MessageT], content: bytes) -> tuple[MessageT, dict[str, Tensor]]:
    """What `encode` made.

    Raises:
        DataError: it is something else; the reason repeats nothing of the content.
    """
    try:
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        values = header["__metadata__"][_MESSAGE]
        return message.model_validate_json(values), tensors
    except ValidationError as error:
        mistake = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, mistake["loc"])) or "all of it"
        raise DataError(f"its {message.__name__} cannot be read: `{where}`: {mistake['msg']}") from error
    except (SafetensorError, KeyError, TypeError) as error:
        raise DataError(f"it is no safetensors file with a message: {first_line(error)[:200]}") from error


def check_rows(tensors: Mapping[str, Tensor], num_response: int, vocabulary: int, window: int | None) -> None:
    """Refuse rows that the model could not read, or would read out of bounds.

    Raises:
        DataError: says what is wrong.
    """
    ids, mask = tensors.get("input_ids"), tensors.get("attention_mask")
    if ids is None or mask is None or len(tensors) != 2:
        raise DataError("it holds other tensors than `input_ids` and `attention_mask`")
    if ids.dtype != torch.int64 or mask.dtype != torch.bool or ids.ndim != 2 or ids.shape != mask.shape:
        raise DataError("`input_ids` are int64 and `attention_mask` bool, both of the same two dimensions")
    if not len(ids) or ids.shape[1] <= num_response:
        raise DataError(f"rows of {ids.shape[1]} columns hold no prompt before {num_response} of responses")
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise DataError(f"a row has token {int(ids.max())}, the model knows {vocabulary} tokens")
    longest = int(mask.sum(dim=1).max())
    if window is not None and longest > window:
        raise DataError(f"a row of {longest} tokens is longer than the model's window of {window}")
    prompts, responses = mask[:, :-num_response].int(), mask[:, -num_response:].int()
    holes = bool((prompts.diff(dim=1) < 0).any()) or bool((responses.diff(dim=1) > 0).any())
    if holes or not bool(prompts[:, -1].all()):
        raise DataError("prompts are padded left and responses right, without holes, and no prompt is empty")
