"""A trlX configuration as one of Conch's, with a line that says what became of each key.

    conch trlx ppo_config.yml > conch.yaml
    conch train ppo --config-dir . --config-name conch data.train=prompts.jsonl reward.url=host:8001/model

    translation = translate(TRLConfig.load_yaml("ppo_config.yml").to_dict())
    conch.train("gpt2", reward=f, prompts=prompts, config=translation.values)

Both forms that trlX has had are read: settings of optimizer, schedule and tokenizer in sections of their own,
or among `train` and `model`. A key that neither has is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from conch.config import load
from conch.config.algorithms import run_config_of
from conch.errors import ConfigError, missing_path
from conch.interop.trlx_keys import Algorithm, Line, Work, take
from conch.log import get_logger

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Translation:
    """A configuration of Conch.

    algorithm: that it is for.
    values: section -> key -> value.
    lines: one for each key that trlX's configuration has.
    refusal: what Conch says of `values` where it does not take them together, each of which it has; else "".
    """

    algorithm: Algorithm
    values: Mapping[str, Any]
    lines: tuple[Line, ...]
    refusal: str = ""

    def to_yaml(self) -> str:
        """Return a file that `conch train <algorithm> --config-name` takes, with the lines as comments."""
        notes = [f"# conch train {self.algorithm}", "#"]
        if self.refusal:
            notes += [*(f"# {line}" for line in self.refusal.splitlines()), "#"]
        notes += [f"# {line}" for line in self.lines]
        return (
            "\n".join(notes) + "\n" + yaml.safe_dump(dict(self.values), sort_keys=False, allow_unicode=True)
        )


def translate(config: Mapping[str, Any]) -> Translation:
    """Translate a `TRLConfig` as a dict: what `to_dict()` gives, or its YAML file holds.

    Raises:
        ConfigError: no trlX configuration, a key that trlX does not have, or a value that has no counterpart.
    """
    sections = {name: dict(of) for name, of in config.items() if isinstance(of, Mapping)}
    if not {"model", "train", "method"} <= sections.keys():
        raise ConfigError(
            "no configuration of trlX: it has the sections `model`, `train` and `method`; here is "
            + (", ".join(f"`{name}`" for name in config) or "nothing")
        )
    unknown = [name for name in config if name not in _SECTIONS]
    if unknown:
        raise ConfigError(f"trlX has no section `{unknown[0]}`; it has {', '.join(_SECTIONS)}")
    work = Work(_algorithm(sections), _flat(sections))
    for key in work.given:
        take(work, key)
    return Translation(work.algorithm, work.values, tuple(work.lines), _refusal(work))


def _refusal(work: Work) -> str:
    """What the program says of the values as a whole; a model may be named elsewhere."""
    model = {"path": "a model", **work.values.get("model", {})}
    try:
        load(run_config_of(work.algorithm), {**work.values, "model": model})
    except ConfigError as error:
        return str(error)
    return ""


_SECTIONS = ("model", "tokenizer", "optimizer", "scheduler", "train", "method")
_NESTED = ("optimizer.kwargs", "scheduler.kwargs", "method.gen_kwargs", "method.gen_experience_kwargs")


def _flat(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Full name -> value; dicts that are values themselves stay whole."""
    flat: dict[str, Any] = {}
    for section, values in sections.items():
        for name, value in values.items():
            key = f"{section}.{name}"
            if key in _NESTED and isinstance(value, Mapping):
                flat |= {f"{key}.{inner}": each for inner, each in value.items()}
            else:
                flat[key] = value
    return flat


def _algorithm(sections: Mapping[str, Mapping[str, Any]]) -> Algorithm:
    """What the trainer, in older files the model's type, else the method names."""
    named = (
        sections["train"].get("trainer"),
        sections["model"].get("model_type"),
        sections["method"].get("name"),
    )
    for name in named:
        text = str(name or "").lower()
        if "nemo" in text:
            raise ConfigError(f"`{name}` trains checkpoints of NeMo: convert them to transformers first")
        for algorithm in ("ppo", "ilql", "sft", "rft"):
            if algorithm in text:
                return algorithm
    given = ", ".join(str(name) for name in named if name)
    raise ConfigError(f"no trainer of trlX's that Conch has: {given}")


def main(argv: Sequence[str]) -> None:
    """Command line: a YAML file of trlX's; our file goes to stdout, also where Conch does not take it before
    it is edited. Why not stands in its comments, and on stderr.

    Raises:
        ConfigError: see `translate`; or the file cannot be read.
    """
    if len(argv) != 1 or argv[0] in ("-h", "--help"):
        print("usage: conch trlx TRLX_CONFIG.yml > conch.yaml")
        return
    path = Path(argv[0])
    if not path.is_file():
        raise ConfigError(f"{path} cannot be read: there is no such file{missing_path(path)}")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(config, Mapping):
        raise ConfigError(f"{path} is no configuration of trlX: it holds no sections")
    translation = translate(_numbers(config))
    print(translation.to_yaml(), end="")
    if translation.refusal:
        _log.warning("Conch does not take this yet, edit it first: %s", translation.refusal)


def _numbers(value: Any) -> Any:
    """YAML's `1e-4`, which by its rules is a text, as the number that is meant."""
    if isinstance(value, Mapping):
        return {name: _numbers(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_numbers(each) for each in value]
    if isinstance(value, str):
        try:
            return float(value) if value[:1] in "0123456789+-." and value[:1] else value
        except ValueError:
            return value
    return value


if __name__ == "__main__":
    from conch.cli import run_main

    run_main(main)
