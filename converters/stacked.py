"""Whether the members of an ensemble can share one served model, `conch convert ensemble --stacked`.

It reads each sample once, by the first member's tokenizer, so all must make the same token ids of it; and it
runs them through one architecture. What they make of their outputs, mean and std for instance, stays theirs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conch.errors import ConversionError
from conch.store.manifest import Manifest
from conch.store.store import StoredModel

# What decides which tokens a member reads of a sample, and how a batch of them is filled up.
_READING = (
    *("template", "contents", "arguments", "truncation_side", "max_length", "add_special_tokens"),
    *("closing_token_id", "separator_id", "separator_ids", "step_separator", "step_delimiter", "steps_apart"),
    *("granularity", "pad_token_id", "eos_token_id", "vocab_size"),
)
_RUNNING = ("layout", "dtype", "batch_invariant")
# Names in configurations that say where a model comes from, and nothing of what it computes.
_ORIGINS = {
    *("_name_or_path", "name_or_path", "is_local", "transformers_version"),
    *("architectures", "id2label", "label2id"),
}
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
_TOKENIZER_SUFFIXES = (".model", ".tiktoken", ".jinja")
_APART = "leave out --stacked: then each is served by itself, with its own"


def check_stackable(stored: Sequence[StoredModel]) -> None:
    """Raise ConversionError unless all models read samples alike and are of one architecture."""
    for model in stored:
        assert isinstance(model.manifest, Manifest)
        if model.manifest.backend != "python":
            raise ConversionError(
                f"member {model.name} is of the {model.manifest.backend} back end, whose graph holds its "
                "weights: convert it with --backend python, or leave out --stacked"
            )
    first = stored[0]
    for other in stored[1:]:
        pair = f"{first.name} and {other.name}"
        if file := _differing_file(first, other):
            raise ConversionError(f"members {pair} have different tokenizers ({file} differs): {_APART}")
        if said := _difference(_settings(first, _READING), _settings(other, _READING), first, other):
            raise ConversionError(f"members {pair} read samples differently, {said}: {_APART}")
        one, two = (_settings(model, _RUNNING) for model in (first, other))
        if said := _difference(one, two, first, other) or _architectures(first, other):
            raise ConversionError(f"members {pair} differ in architecture, {said}: {_APART}")


def _settings(model: StoredModel, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(model.manifest, name) for name in names}


def _differing_file(first: StoredModel, other: StoredModel) -> str:
    """Return the first file of the tokenizers that differs, "" where none does."""
    files = [_tokenizer_files(model) for model in (first, other)]
    for name in sorted({*files[0], *files[1]}):
        if files[0].get(name) != files[1].get(name):
            return name
    configs = [_configuration(model, "tokenizer_config.json") for model in (first, other)]
    return "" if configs[0] == configs[1] else "tokenizer_config.json"


def _tokenizer_files(model: StoredModel) -> dict[str, str]:
    return {
        Path(file).name: digest
        for file, digest in model.manifest.files.items()
        if Path(file).name in _TOKENIZER_FILES or file.endswith(_TOKENIZER_SUFFIXES)
    }


def _architectures(first: StoredModel, other: StoredModel) -> str:
    one, two = (_configuration(model, "config.json") for model in (first, other))
    if one.get("model_type") != two.get("model_type"):
        return f"{first.name} is {one.get('model_type')}, {other.name} {two.get('model_type')}"
    labels = [{"num_labels": len(config.get("id2label", ()))} for config in _raw(first, other)]
    return _difference({**one, **labels[0]}, {**two, **labels[1]}, first, other)


def _raw(*models: StoredModel) -> list[dict[str, Any]]:
    return [json.loads((model.path / "config.json").read_text(encoding="utf-8")) for model in models]


def _configuration(model: StoredModel, file: str) -> dict[str, Any]:
    path = model.path / file
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return {name: value for name, value in content.items() if name not in _ORIGINS}


def _difference(
    one: Mapping[str, Any], two: Mapping[str, Any], first: StoredModel, other: StoredModel
) -> str:
    """Say in words which setting differs first, "" where none does."""
    for name in sorted({*one, *two}):
        if one.get(name) != two.get(name):
            values = f"{_shown(one.get(name))} in {first.name}, {_shown(two.get(name))} in {other.name}"
            return f"{name} is {values}"
    return ""


def _shown(value: Any, longest: int = 60) -> str:
    shown = repr(value)
    return shown if len(shown) <= longest else f"{shown[:longest]}..."
