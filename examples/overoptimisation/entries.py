"""From entries of YAML files and a command line to settings, as `trainer_rl.py` reads them.

`--configs A B` lays entry B of the files `config_rl*.yaml` over entry A; `config_ppo.yaml` stands below
`ppo_config`. Any setting may follow, by its full name: `--output_dir runs/x`, `gold_config.batch_size=8`.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from conch.cli import written_with
from conch.config import load
from conch.errors import ConfigError, missing_path, yaml_problem
from examples.overoptimisation.settings import NO_EFFECT, NOT_HERE, StudyConfig

CONFIGS = Path(__file__).resolve().parent / "configs"
_PPO_FILE = "config_ppo.yaml"
_ENTRY_FILES = "config_rl*.yaml"
_SETTING = re.compile(r"[\w.]+=")


def read_settings(argv: Sequence[str]) -> tuple[StudyConfig, list[str]]:
    """Settings of a command line, and lines about what of them has no effect.

    Raises:
        ConfigError: no such file or entry, or a setting is wrong; in a sentence each.
        SystemExit: after `--help` (0), and for a line without `--configs` (2).
    """
    arguments, rest = _parser().parse_known_args(written_with("_", argv))
    named = [word for word in arguments.configs if not _SETTING.match(word)]
    rest += [word for word in arguments.configs if _SETTING.match(word)]
    entries = read_entries(arguments.config_dir)
    values: dict[str, Any] = {"ppo_config": _yaml(arguments.config_dir / _PPO_FILE)}
    for name in (part for word in named for part in word.split(",") if part):
        if name not in entries:
            raise ConfigError(
                f"there is no entry `{name}` in {arguments.config_dir}; {_nearest(name, entries)}"
            )
        values = laid_over(values, entries[name])
    for name in ("rng_seed", "rm_seed"):
        if (value := getattr(arguments, name)) is not None:
            values[name] = value
    for name, value in _overrides(rest):
        values = laid_over(values, _nested(name, value))
    values, notes = known_here(values)
    return load(StudyConfig, values), notes


def read_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> settings of all entries.

    Raises:
        ConfigError: there is no such file, one cannot be read, or two have an entry of one name.
    """
    files = sorted(folder.glob(_ENTRY_FILES))
    if not files:
        raise ConfigError(
            f"{folder} has no {_ENTRY_FILES}{missing_path(folder) if not folder.is_dir() else ''}"
        )
    entries: dict[str, dict[str, Any]] = {}
    for file in files:
        for name, settings in _yaml(file).items():
            if name in entries:
                raise ConfigError(f"{file} has an entry `{name}`, as another file of {folder}: rename one")
            if settings is not None and not isinstance(settings, Mapping):
                raise ConfigError(f"{file}: the entry `{name}` holds no settings, but {settings!r}")
            entries[str(name)] = dict(settings or {})
    return entries


def laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with others over them, section by section; a list replaces a list."""
    merged = dict(below)
    for name, value in above.items():
        under = merged.get(name)
        if isinstance(value, Mapping):
            merged[name] = laid_over(under if isinstance(under, Mapping) else {}, value)
        elif value is not None or not isinstance(under, Mapping):
            merged[name] = value
    return merged


def known_here(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Settings without those that have no effect here, and a line for each of these.

    Sections without a value take their defaults.

    Raises:
        ConfigError: one asks for what is not done here.
    """
    nested: dict[str, Any] = laid_over({}, values)
    notes = []
    for name, reason in NO_EFFECT.items():
        value = _taken(nested, name)
        if value not in (None, [], "", False):
            notes.append(f"without effect: `{name}` = {value}: {reason}")
    for name, (harmless, reason) in NOT_HERE.items():
        value = _taken(nested, name)
        if value not in harmless:
            raise ConfigError(f"`{name}` = {value!r} is no setting of this program: {reason}")
    sections = ("gold_config", "rank_config", "sft_config", "ppo_config")
    return {key: value for key, value in nested.items() if value is not None or key not in sections}, notes


def _taken(values: dict[str, Any], name: str) -> Any:
    """Take a setting out; None where it does not stand."""
    *sections, key = name.split(".")
    inner: Any = values
    for section in sections:
        inner = inner.get(section) if isinstance(inner, dict) else None
    return inner.pop(key, None) if isinstance(inner, dict) else None


def _overrides(words: Sequence[str]) -> list[tuple[str, Any]]:
    """Settings of the rest of a command line: `--name value`, `--name=value`, `name=value`; a name alone is
    true."""
    found, left = [], list(words)
    while left:
        word = left.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not equals:
            if not word.startswith("--"):
                raise ConfigError(f"`{word}` is no setting: write --name value, or name=value")
            is_alone = not left or left[0].startswith("--") or _SETTING.match(left[0])
            value = "true" if is_alone else left.pop(0)
        try:
            found.append((name, yaml.safe_load(value)))
        except yaml.YAMLError as error:
            braces = "; in YAML, quotes stand around a text with braces" if "{" in value else ""
            raise ConfigError(f"the value of `{name}` cannot be read: {value}{braces}") from error
    return found


def _nested(name: str, value: Any) -> dict[str, Any]:
    for key in reversed(name.split(".")):
        value = {key: value}
    return value


def _yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}{missing_path(file)}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is no YAML: {yaml_problem(error)}") from error
    if content is not None and not isinstance(content, Mapping):
        raise ConfigError(f"{file} holds no settings by name")
    return dict(content or {})


def _nearest(name: str, entries: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, entries, n=1)
    return f"did you mean {near[0]}?" if near else f"there are: {', '.join(sorted(entries))}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trainer_rl.py",
        description="Train a policy with PPO against one reward model or an ensemble, then score its "
        "evaluations with a gold reward model.",
        epilog="Any setting may follow by its full name, as --name value or name=value.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--configs", nargs="+", required=True, metavar="ENTRY", help="entries, each over the last"
    )
    parser.add_argument("--rm_seed", type=int, help="stands for {seed} in rank_config.model_names")
    parser.add_argument("--rng_seed", type=int, help="seeds weights, data order and sampling")
    parser.add_argument(
        "--config_dir", type=Path, default=CONFIGS, help="folder of the files (default: %(default)s)"
    )
    return parser
