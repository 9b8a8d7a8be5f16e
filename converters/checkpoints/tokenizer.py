"""The tokenizer of a checkpoint, and the template that makes the model's input of a client's sample."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from conch.config.algorithms.reward_model import CHAT, template_mistake
from conch.converters.checkpoints.files import (
    REWARD_MODEL_FILE,
    RewardModelFile,
    Source,
    base_model_of,
    find_source,
)
from conch.converters.options import DIALOGUE_TEMPLATES, ReadOptions
from conch.data.preferences import default_template
from conch.data.text import special_tokens
from conch.errors import ConversionError, first_line
from conch.log import get_logger
from conch.models.loading import keep_legacy
from conch.store.manifest import Pooling

_log = get_logger(__name__)

PAIR = "pair"
"""Template of models that read a prompt and an answer as a pair of sentences."""

CLOSED_CHAT = "chat{eos}"
"""`CHAT` for models that were trained on dialogues with the template `{text}{eos}`: an eos ends them."""

_NOW = re.compile(r"""strftime_now\(\s*(?:"([^"]*)"|'([^']*)')\s*\)""")
_DATED = re.compile(r"\{#- (?P<day>\S+) -#\}\{%- macro strftime_now")

# What a vocabulary keeps for later is in no text.
_UNUSED = re.compile(r"reserved|unused|extra_id|placeholder", re.IGNORECASE)


def reads_dialogues(template: str) -> bool:
    """Whether a sample in this template is a dialogue, not a text."""
    return template in DIALOGUE_TEMPLATES


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
    keep_legacy(tokenizer)
    if requested.truncation_side:
        tokenizer.truncation_side = requested.truncation_side
    if requested.chat_template is not None:
        tokenizer.chat_template = _chat_template(requested.chat_template)
    tokenizer.chat_template = _dated(tokenizer.chat_template, _day(requested.template_date))
    return tokenizer


def _day(requested: str | None) -> date:
    if requested is None:
        return date.today()
    try:
        return date.fromisoformat(requested)
    except ValueError as error:
        raise ConversionError(f"--template_date {requested!r} is no day: write YYYY-MM-DD") from error


def shown_date(tokenizer: Any) -> str | None:
    """Return the day that a chat template shows which writes today's; None where it writes none."""
    match = _DATED.match(str(tokenizer.chat_template or ""))
    return match and match["day"]


def _dated(template: Any, day: date) -> Any:
    """Return a chat template, or several by name, that show this day where they ask for today's.

    Llama-3.2's writes the date into the system turn: scores would change from day to day, and a server would
    not score its golden samples as it did.
    """
    if isinstance(template, dict):
        return {name: _dated(each, day) for name, each in template.items()}
    if not template or _DATED.match(template):
        return template
    forms = dict.fromkeys(match[1] or match[2] for match in _NOW.finditer(template))
    if not forms:
        return template
    cases = "".join(f'{{%- if form == "{form}" -%}}{day.strftime(form)}{{%- endif -%}}' for form in forms)
    return f"{{#- {day.isoformat()} -#}}{{%- macro strftime_now(form) -%}}{cases}{{%- endmacro -%}}{template}"


def _chat_template(given: str) -> str:
    """Return the Jinja template that an option holds, or names."""
    if "{%" in given or "{{" in given:
        return given
    file = Path(given).expanduser()
    if not file.is_file():
        raise ConversionError(f"--chat_template {given!r} is neither Jinja nor a file of it")
    return file.read_text(encoding="utf-8")


def choose_template(
    requested: ReadOptions, from_file: RewardModelFile, tokenizer: Any, pooling: Pooling
) -> tuple[str, str]:
    """Return the template over {text} and {eos}, or `chat`, `chat{eos}`, `pair`; and where it comes from.

    {prompt}{output} means {text}: a client sends prompt and output of a sample joined, as one text.

    requested: wins over `from_file`. `chat` is `chat{eos}` where the model was trained with an eos at the end
        of its texts.
    from_file: if it says nothing either, the tokenizer decides.

    Raises:
        ConversionError: the template is malformed, or needs an eos or a chat template that is missing.
    """
    trained, why = from_file.template, "--template"
    chosen = requested.template or (CHAT if requested.chat_template is not None else None)
    if chosen is None:
        chosen, why = trained, REWARD_MODEL_FILE
    elif requested.template is None:
        why = "--chat_template"
    if chosen is None:
        return _default_template(tokenizer, pooling)
    _warn_of_other_template(requested.template, trained, chosen)
    return _checked_template(chosen, trained, tokenizer), why


def _warn_of_other_template(requested: str | None, trained: str | None, chosen: str) -> None:
    """Warn where an option overrides what `reward_model.json` says that the model was trained with."""
    # `chat` is also what dialogues were trained as whose template holds nothing but them.
    alike = {trained, "{prompt}{output}" if trained == "{text}" else None}
    if reads_dialogues(chosen) and trained in (CHAT, CLOSED_CHAT, "{text}", "{text}{eos}"):
        alike.add(chosen)
    if trained and requested and requested not in alike:
        _log.warning(
            "--template %r is taken, though reward_model.json says that the model was trained with %r",
            *(requested, trained),
        )


def _default_template(tokenizer: Any, pooling: Pooling) -> tuple[str, str]:
    if tokenizer.chat_template:
        return CHAT, "the tokenizer has a chat template"
    # An eos behind the last step would only stand in the way: steps are read at their own ends.
    return "{text}" if pooling == "steps" else default_template(tokenizer), "default for texts"


def closes_pairs(tokenizer: Any) -> bool:
    """Whether the tokenizer puts something between two sentences, as encoders' do."""
    separator = getattr(tokenizer, "sep_token_id", None)
    return separator is not None and separator in tokenizer("a", "a").input_ids


def _checked_template(chosen: str, from_file: str | None, tokenizer: Any) -> str:
    if chosen == PAIR:
        return PAIR
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
