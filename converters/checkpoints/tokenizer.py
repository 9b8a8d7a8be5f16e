"""The tokenizer of a checkpoint, and the template that makes the model's input of a client's sample."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from conch.converters.checkpoints.files import Source, base_model_of, find_source
from conch.converters.options import ReadOptions
from conch.data.preferences import CHAT, default_template, template_mistake
from conch.data.text import special_tokens
from conch.errors import ConversionError, first_line
from conch.log import get_logger
from conch.store.manifest import Pooling

_log = get_logger(__name__)

CLOSED_CHAT = "chat{eos}"
"""`CHAT` for models that were trained on dialogues with the template `{text}{eos}`: an eos ends them."""

# What a vocabulary keeps for later is in no text.
_UNUSED = re.compile(r"reserved|unused|extra_id|placeholder", re.IGNORECASE)


def reads_dialogues(template: str) -> bool:
    """Whether a sample in this template is a dialogue, not a text."""
    return template in (CHAT, CLOSED_CHAT)


def used_special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """List the tokenizer's special tokens, sorted, without those that nothing uses."""
    return tuple(sorted(token for token in special_tokens(tokenizer) if not _UNUSED.search(token)))


def load_tokenizer(source: Source, requested: ReadOptions) -> Any:
    """Load the checkpoint's own tokenizer, else the base model's, with the requested side of truncation.

    Raises:
        ConversionError: neither has a tokenizer, or its files cannot be read.
    """
    tokenizer = _tokenizer_in(source.folder, requested.trust_remote_code)
    base = base_model_of(source, requested.base_model)
    if tokenizer is None and base:
        tokenizer = _tokenizer_in(find_source(base, weights=False).folder, requested.trust_remote_code)
    if tokenizer is None:
        raise ConversionError(
            f"{source.name} has no tokenizer files{f', and neither has {base}' if base else ''}; save the "
            "tokenizer that the model was trained with beside it (tokenizer.save_pretrained), or give the "
            "--base_model that has it"
        )
    if requested.truncation_side:
        tokenizer.truncation_side = requested.truncation_side
    return tokenizer


def choose_template(requested: str | None, from_file: str | None, tokenizer: Any, pooling: Pooling) -> str:
    """Return the template over {text} and {eos}, or `chat`, or `chat{eos}`.

    {prompt}{output} means {text}: a client sends prompt and output of a sample joined, as one text.

    requested: what options say; wins over `from_file`. `chat` is `chat{eos}` where the model was trained with
        an eos at the end of its texts.
    from_file: what `reward_model.json` says; if it says nothing either, the tokenizer and pooling decide.

    Raises:
        ConversionError: the template is malformed, or needs an eos or a chat template that is missing.
    """
    chosen = requested or from_file
    # `chat` is also what dialogues were trained as whose template holds nothing but them.
    alike = {from_file, "{prompt}{output}" if from_file == "{text}" else None}
    if reads_dialogues(chosen or "") and from_file in (CHAT, CLOSED_CHAT, "{text}", "{text}{eos}"):
        alike.add(chosen)
    if from_file and requested and requested not in alike:
        _log.warning(
            "--template %r is taken, though reward_model.json says that the model was trained with %r",
            *(requested, from_file),
        )
    if chosen is None:
        if tokenizer.chat_template:
            _log.warning(
                "the tokenizer has a chat template, and the model will be served for texts: if it was "
                "trained on dialogues, add --template chat, so that it gets their messages"
            )
        # An eos behind the last step would only stand in the way: steps are read at their own ends.
        return "{text}" if pooling == "steps" else default_template(tokenizer)
    if reads_dialogues(chosen):
        if not tokenizer.chat_template:
            raise ConversionError(
                f"template {chosen}: the tokenizer has no chat template; give one in its folder"
            )
        is_closed = chosen == CLOSED_CHAT or (from_file or "").endswith("{eos}")
        if is_closed and not tokenizer.eos_token:
            raise ConversionError(f"template {CLOSED_CHAT} uses an eos but the tokenizer has none")
        return CLOSED_CHAT if is_closed else CHAT
    template = chosen.replace("{prompt}{output}", "{text}")
    if "{prompt}" in template or "{output}" in template:
        raise ConversionError(
            f"template {chosen!r} puts something between {{prompt}} and {{output}}, but a client sends "
            "both joined as one text: write {prompt}{output}, and what stands between them into the "
            "trainer's prompts; or use the template `chat`"
        )
    check_template(template, tokenizer)
    return template


def check_template(template: str, tokenizer: Any) -> None:
    """Raise ConversionError unless the template is a format string with {text} once and nothing unknown."""
    if mistake := template_mistake(template):
        raise ConversionError(mistake)
    if "\0" in template.format(text="", eos="\0") and not tokenizer.eos_token:
        raise ConversionError(f"template {template!r} uses {{eos}} but the tokenizer has no eos token")


def _tokenizer_in(folder: Path, trust_remote_code: bool) -> Any | None:
    """Load the tokenizer of a folder; None where the folder has no tokenizer files."""
    if not any(folder.glob("*token*")) and not any(folder.glob("*vocab*")):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds for the same thing
        raise ConversionError(
            f"{folder} has no tokenizer that can be loaded ({first_line(error)}); "
            "save the one that the model was trained with beside it (tokenizer.save_pretrained)"
        ) from error
    # Where the files are missing, transformers makes up a tokenizer with nothing but special tokens.
    return tokenizer if set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids) else None
