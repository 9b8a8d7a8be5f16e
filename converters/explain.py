"""Say what a checkpoint is, what a conversion would do with it, and what must be said first.

Loads no weights, and no torch but for pickles of the older format, so that the answer takes a second or two.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conch.converters.checkpoints.files import (
    REWARD_MODEL_FILE,
    RewardModelFile,
    Source,
    base_model_of,
    glance_at,
    json_object,
    read_reward_model_file,
)
from conch.converters.checkpoints.kinds import Kind, recognise
from conch.converters.options import ReadOptions
from conch.converters.recipes import recipe_for, recipe_table
from conch.errors import ConversionError


def explain(checkpoint: str, requested: ReadOptions) -> str:
    """Describe a folder, a file of tensors or a hub model, line by line.

    Raises:
        ConversionError: there is no such checkpoint, or its files cannot be read.
    """
    source = glance_at(checkpoint, requested.revision)
    lines = {"checkpoint": _size_of(source)}
    recipe = recipe_for(checkpoint)
    try:
        kind = recognise(source, requested)
    except ConversionError as error:
        lines["cannot be done"] = str(error)
        if recipe and requested.recipe is None:
            lines["recipe"] = f"--recipe {recipe} has facts about it"
        return _table(lines)
    from_file = read_reward_model_file(source.folder)
    tokenizer = _tokenizer_facts(source, kind)
    lines |= kind.decisions
    lines.setdefault("pooling", _pooling(requested, from_file, kind))
    lines["template"] = _template(requested, from_file, tokenizer)
    lines["pad token"] = _pad_token(requested, kind, tokenizer)
    missing = _missing(source, requested, from_file, kind, tokenizer)
    if recipe and requested.recipe is None:
        lines["recipe"] = f"--recipe {recipe} has facts about it; --recipe none if it is another model"
    lines["to be said"] = "\n".join(missing) or "nothing"
    lines["command"] = _command(checkpoint, requested, recipe)
    return _table(lines)


def _command(checkpoint: str, requested: ReadOptions, recipe: str | None) -> str:
    """Return the conversion with what was given here; of a recipe, its name stands for its options."""
    given = {name: getattr(requested, name) for name in sorted(requested.model_fields_set)}
    if requested.recipe or recipe:
        of_recipe = recipe_table().recipes[requested.recipe or recipe or ""].options
        given = {name: value for name, value in given.items() if name not in of_recipe}
        given["recipe"] = requested.recipe or recipe
    words = ["conch", "convert", "--checkpoint", checkpoint]
    for name, value in given.items():
        option = "--reward" if name == "rewards" else f"--{name}"
        values = value if isinstance(value, tuple) else () if value is True else (str(value),)
        words += [option, *values] if value not in (None, False, ()) else []
    return shlex.join(words)


def _table(lines: Mapping[str, str]) -> str:
    width = max(map(len, lines))
    return "\n".join(
        f"{name:<{width}}  {text}".replace("\n", "\n" + " " * (width + 2)) for name, text in lines.items()
    )


def _size_of(source: Source) -> str:
    tensors = source.described()
    parameters = sum(math.prod(info.shape) for info in tensors.values())
    dtypes = ", ".join(sorted({info.dtype for info in tensors.values()}))
    return f"{source.name}: {len(tensors)} tensors, {parameters / 1e6:,.1f} million parameters, {dtypes}"


def _tokenizer_facts(source: Source, kind: Kind) -> dict[str, Any]:
    """Return `tokenizer_config.json` of the checkpoint, or of its base, with the chat template that lies
    beside it."""
    folders = [source.folder, *([kind.base.folder] if kind.base else [])]
    if source.is_adapter:
        folders.append(Path(base_model_of(source, None)).expanduser())
    for folder in folders:
        file = folder / "tokenizer_config.json"
        if file.is_file():
            facts = json_object(file)
            return {**facts, "chat_template": facts.get("chat_template") or _template_beside(folder)}
    return {}


def _template_beside(folder: Path) -> str | None:
    file = folder / "chat_template.jinja"
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _pooling(requested: ReadOptions, from_file: RewardModelFile, kind: Kind) -> str:
    if requested.pooling_token:
        return f"token {requested.pooling_token!r} (--pooling_token)"
    if requested.pooling or from_file.pooling:
        why = "--pooling" if requested.pooling else REWARD_MODEL_FILE
        return f"{requested.pooling or from_file.pooling} ({why})"
    if kind.name == "classifier" and kind.outputs is not None and kind.config.get("pad_token_id") is None:
        return "last_token (config.json has no pad token)"
    return f"{kind.pooling} (default of this kind)"


def _template(requested: ReadOptions, from_file: RewardModelFile, tokenizer: Mapping[str, Any]) -> str:
    if requested.template or requested.chat_template:
        return f"{requested.template or 'chat'} ({'--template' if requested.template else '--chat_template'})"
    if from_file.template:
        return f"{from_file.template} ({REWARD_MODEL_FILE})"
    if tokenizer.get("chat_template"):
        return "chat (the tokenizer has a chat template)"
    return "of texts (the tokenizer has no chat template)"


def _pad_token(requested: ReadOptions, kind: Kind, tokenizer: Mapping[str, Any]) -> str:
    if requested.pad_token:
        return f"{requested.pad_token!r} (--pad_token)"
    number = kind.config.get("pad_token_id")
    if number is not None:
        return f"id {number} (config.json)"
    token = tokenizer.get("pad_token")
    return f"{token!r} (tokenizer)" if token else "none (--pad_token sets one)"


def _missing(
    source: Source,
    requested: ReadOptions,
    from_file: RewardModelFile,
    kind: Kind,
    tokenizer: Mapping[str, Any],
) -> list[str]:
    """List what must be given before this can be converted, and what may have to be."""
    missing = []
    if not tokenizer:
        missing.append(
            "a tokenizer: save the one that the model was trained with beside it, or give --base_model"
        )
    if len(kind.head) == 2 and kind.activation is None:
        missing.append("--head_activation: what stands between the head's two layers")
    reads_steps = kind.pooling == "steps" and requested.granularity != "token"
    if reads_steps and requested.step_separator is None:
        missing.append("--step_separator: the text that ends a step; or --granularity token")
    if reads_steps and kind.outputs == 1 and requested.function_to_apply is None:
        missing.append(
            "--function_to_apply: whether a step's one output is a score (none) or a logit (sigmoid)"
        )
    labels = kind.config.get("id2label")
    outputs = len(labels) if labels else kind.config.get("num_labels", 2)
    is_encoder = kind.name == "classifier" and tokenizer.get("cls_token") and tokenizer.get("sep_token")
    says_template = requested.template or requested.chat_template or from_file.template
    if is_encoder and outputs == 1 and not says_template and not tokenizer.get("chat_template"):
        missing.append("--template: '{text}', or `pair` for prompt and answer as a pair of sentences")
    is_open = not (requested.pooling or requested.pooling_token or from_file.pooling or kind.closing_token_id)
    if kind.name == "head" and kind.head == ("v_head",) and is_open:
        missing.append("perhaps --pooling: the conversion compares where a `v_head` may be read, and says so")
    template = str(tokenizer.get("chat_template") or "")
    adds_bos = bool(tokenizer.get("add_bos_token")) and template and "bos_token" not in template
    if adds_bos and requested.add_special_tokens is None:
        missing.append(
            "perhaps --add_special_tokens: the tokenizer adds a bos, its chat template writes none"
        )
    return missing
