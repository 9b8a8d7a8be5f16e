"""A dialogue as the JSON that a served model with a chat template of its own reads."""

from __future__ import annotations

import json
from typing import Any

from conch.triton.contract import MESSAGES, TEMPLATE_KWARGS, TOOLS
from conch.types import Dialogue


def dialogue_json(dialogue: Dialogue) -> str:
    """Write a dialogue as `conch.triton.contract` has it; equal dialogues give equal strings.

    Raises:
        TypeError, ValueError: a message holds what JSON does not.
    """
    messages: list[Any] = [dict(message) for message in dialogue.messages]
    whole: Any = messages
    if dialogue.tools or dialogue.template_kwargs:
        whole = {MESSAGES: messages}
        if dialogue.tools:
            whole[TOOLS] = list(dialogue.tools)
        if dialogue.template_kwargs:
            whole[TEMPLATE_KWARGS] = dict(dialogue.template_kwargs)
    return json.dumps(whole, ensure_ascii=False, allow_nan=False)


def dialogue_parts(dialogue: str) -> dict[str, Any] | None:
    """Return what `dialogue_json` wrote, always as an object; None for ""."""
    if not dialogue:
        return None
    whole = json.loads(dialogue)
    return {MESSAGES: whole} if isinstance(whole, list) else whole
