"""From rollouts to what a served model reads, text or token ids."""

from __future__ import annotations

from collections.abc import Callable

from conch.rewards.dense import Decode, response_bounds
from conch.rewards.replica import ModelInfo, Row
from conch.types import Completion, Prompt, Rollout

# One token or letter that any vocabulary has; only whether it is scored matters, not how.
PROBE = Rollout(Prompt("a", (1,)), Completion("", (), (), "length"), policy_version=0)

Tokenizer = Callable[[str], list[int]]


def make_row(
    rollout: Rollout,
    position: int,
    info: ModelInfo,
    tokenizer: Tokenizer | None,
    max_bytes: int,
    *,
    dense: bool = False,
    decode: Decode | None = None,
) -> Row | str:
    """The row, or why the sample cannot be sent.

    tokenizer: makes a sample's ids for models that take tokens; None sends the sampled ids as they are.
    dense: whether the row's tokens are to get rewards of their own; models that take text need `decode` then.
    """
    sample = rollout.sample
    try:
        sample.encode("utf-8")
        ids = _token_ids(rollout, tokenizer) if info.takes_tokens else ()
        bounds = response_bounds(rollout, None if info.takes_tokens else decode) if dense else ()
    except Exception as error:  # the tokenizer is the user's: whatever it raises is about this sample
        return f"cannot be encoded: {type(error).__name__}: {error}"
    if dense and not info.takes_tokens and decode is None:
        return "cannot get dense scores: its tokens have no places in the text unless `decode` is given"
    if info.takes_tokens and not ids:
        return "has no tokens"
    if info.max_length and len(ids) > info.max_length:
        return f"has {len(ids)} tokens, the model takes {info.max_length} at most"
    row = Row(sample, ids, bounds, position)
    if row.size > max_bytes:
        return f"takes {row.size / 1e6:.1f} MB, more than reward.max_request_mb={max_bytes / 1e6:g}"
    return row


def _token_ids(rollout: Rollout, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    if tokenizer is not None:
        return tuple(tokenizer(rollout.sample))
    return rollout.prompt.token_ids + rollout.completion.token_ids
