"""What a checkpoint must be to give scores of steps or tokens; refused, with the reason, where it is not."""

from __future__ import annotations

from conch.converters.checkpoint import CHAT, Checkpoint
from conch.errors import ConversionError
from conch.serving.spec import Form


def check_dense(checkpoint: Checkpoint, form: Form) -> None:
    """Raise ConversionError unless the scores of its steps or tokens have places in what a client sends.

    In the text form these are places in the client's own text, so the tokenizer must know from which
    characters a token was made, and the template must not end steps itself.
    """
    if checkpoint.granularity == "sample":
        return
    if len(checkpoint.reward_names) > 1:
        raise ConversionError(
            f"--granularity {checkpoint.granularity} serves one reward, and these are "
            f"{', '.join(checkpoint.reward_names)}: say with --reward which"
        )
    if form == "text":
        _check_tokenizer(checkpoint)
        _check_template(checkpoint)


def _check_tokenizer(checkpoint: Checkpoint) -> None:
    if not checkpoint.tokenizer.is_fast:
        raise ConversionError(
            f"{type(checkpoint.tokenizer).__name__} does not tell which characters a token was made of, so "
            f"the score of a {checkpoint.granularity} has no place in a text: use --form token"
        )


def _check_template(checkpoint: Checkpoint) -> None:
    if checkpoint.template == CHAT:
        raise ConversionError(
            f"--granularity {checkpoint.granularity} tells places in the client's text, which the template "
            "`chat` takes apart: write the conversation into --template, or use --form token"
        )
    before, _, after = checkpoint.template.partition("{text}")
    if after not in ("", "{eos}"):
        raise ConversionError(
            f"template {checkpoint.template!r}: behind {{text}} only {{eos}} may stand with --granularity "
            f"{checkpoint.granularity}, or the last score would be read in the template"
        )
    ids = checkpoint.tokenizer(before.format(eos=checkpoint.tokenizer.eos_token or "")).input_ids
    if checkpoint.separator_id is not None and checkpoint.separator_id in ids:
        raise ConversionError(
            f"template {checkpoint.template!r} holds the step separator, which would end a step before the "
            "text begins: take it out, or use --form token"
        )
