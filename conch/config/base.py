"""Sections: unknown keys are refused with the nearest valid name, and values are frozen."""

from __future__ import annotations

import ast
import difflib
import functools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from conch.config.other_names import ALGORITHMS, OTHER_NAMES, RENAMED
from conch.errors import ConfigError

_MOST_NAMESAKES = 3
"""Most sections with a key of one name, of which a message names each."""


class Section(BaseModel):
    """Base of all sections: unknown keys refused, frozen after load, a docstring under each field.

    A section given in part takes what is left from the default of the field that holds it, so that a run
    config may set defaults of its own: `train: TrainConfig = TrainConfig(total_steps=200)`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _complete_sections(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        defaults = {
            name: field.get_default(call_default_factory=True, validated_data={})
            for name, field in cls.model_fields.items()
            if name in values
        }
        # A section that must be given says itself what it needs.
        missing = [
            name
            for name, field in cls.model_fields.items()
            if name not in values and field.is_required() and nested_section(field.annotation)
        ]
        values = {**{name: dict[str, Any]() for name in missing}, **values}
        return {name: _completed(value, defaults.get(name)) for name, value in values.items()}


def _completed(value: Any, default: Any) -> Any:
    """Lay a section's values over what `default` sets explicitly, in the sections of that one as well."""
    if not isinstance(default, Section):
        return value
    if type(value) is type(default):
        value = {name: getattr(value, name) for name in value.model_fields_set}
    if not isinstance(value, Mapping):
        return value
    explicit = {name: getattr(default, name) for name in default.model_fields_set}
    return explicit | {name: _completed(inner, explicit.get(name)) for name, inner in value.items()}


SectionT = TypeVar("SectionT", bound=Section)


def load(section: type[SectionT], values: Mapping[str, Any]) -> SectionT:
    """Validate a plain mapping into `section`.

    Raises:
        ConfigError: one line per mistake: the key's full name, what is wrong, and for an unknown key the
            nearest valid one.
    """
    try:
        return section.model_validate(dict(values))
    except ValidationError as error:
        lines = [_explain(section, dict(problem)) for problem in error.errors()]
        raise ConfigError("configuration not valid:\n  " + "\n  ".join(lines)) from None


def refuse_unknown_keys(section: type[Section], keys: Iterable[str]) -> None:
    """Say of full names, `train.seed`, what `load` would say of those that `section` has no key of.

    Raises:
        ConfigError: one line per unknown key, with the nearest valid one.
    """
    unknown = [key for key in dict.fromkeys(keys) if not _may_stand(section, key.split("."))]
    if unknown:
        lines = [f"unknown key `{key}`; {_nearest(section, key.split('.'))}" for key in unknown]
        raise ConfigError("configuration not valid:\n  " + "\n  ".join(lines))


def nearest_key(section: type[Section], key: str) -> str:
    """What a full name that is no key may have meant, as a message goes on after a semicolon."""
    return _nearest(section, key.split("."))


def has_key(section: type[Section], key: str) -> bool:
    """Whether a full name is one of a value of `section`."""
    location = key.split(".")
    return _has(section, location) and section_at(section, location) is None


def _may_stand(section: type[Section], location: list[str]) -> bool:
    """Whether a key stands at `location`, or a value that has keys of its own above it, or a section that
    takes other names by itself."""
    if _reads_keys_itself(section):
        return True
    field = section.model_fields.get(location[0])
    inner = nested_section(field.annotation) if field is not None else None
    return field is not None and (inner is None or not location[1:] or _may_stand(inner, location[1:]))


def _reads_keys_itself(section: type[Section]) -> bool:
    """Whether a section turns what it is given into its keys: nobody else knows which ones it takes."""
    validators = section.__pydantic_decorators__.model_validators
    own = validators.keys() - Section.__pydantic_decorators__.model_validators.keys()
    return any(validators[name].info.mode == "before" for name in own)


def _explain(section: type[Section], problem: dict[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location) or section.__name__
    if problem["type"] == "extra_forbidden":
        return f"unknown key `{key}`; {_nearest(section, location)}"
    if problem["type"] == "missing":
        return f"`{key}` is missing"
    if problem["type"] == "model_type" and (owner := section_at(section, location)) is not None:
        return f"`{key}` is a section, no value: {_key_for(owner, key, problem['input'])}"
    message = problem["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(problem["input"], dict) else f" (got {problem['input']!r})"
    return f"`{key}`: {message}{shown}"


def section_at(section: type[Section], location: Sequence[str]) -> type[Section] | None:
    """The section that stands at `location` below `section`; None where there is none."""
    owner: type[Section] | None = section
    for part in location:
        field = owner.model_fields.get(part) if owner is not None else None
        owner = nested_section(field.annotation) if field else None
    return owner


def _key_for(section: type[Section], prefix: str, value: Any) -> str:
    """The key of `section` that has this value among its choices, else all of its keys."""
    for name, field in section.model_fields.items():
        if value is not None and value in get_args(field.annotation):
            return f"did you mean `{prefix}.{name}={value}`?"
    return "its keys are " + ", ".join(f"`{prefix}.{name}`" for name in section.model_fields)


def describe_field(section: type[Section], name: str) -> str:
    """Return the docstring below a field, of the class that declares it, on one line; "" where it has none.

    Read when it is asked for: pydantic would look for all of them in every program that loads a section,
    which takes as long as all else that it does then.
    """
    for owner in section.__mro__:
        if name in vars(owner).get("__annotations__", {}):
            return _docstrings(owner.__module__).get(f"{owner.__qualname__}.{name}", "")
    return ""


@functools.cache
def _docstrings(module: str) -> dict[str, str]:
    """Qualified name of each field in a module's file -> the docstring below it, on one line."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return {}
    return dict(_docstrings_in(ast.parse(Path(file).read_text(encoding="utf-8")), ""))


def _docstrings_in(scope: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    body: list[ast.AST] = getattr(scope, "body", [])
    for node, below in zip(body, [*body[1:], None], strict=True):
        match node, below:
            case ast.ClassDef(name=name), _:
                yield from _docstrings_in(node, f"{prefix}{name}.")
            case ((ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name)), _):
                yield from _docstrings_in(node, f"{prefix}{name}.<locals>.")
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield f"{prefix}{name}", " ".join(text.split())
            case _:
                pass


def nested_section(annotation: Any) -> type[Section] | None:
    """The section that a field of this type holds; None for a plain value."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def _nearest(section: type[Section], location: list[str]) -> str:
    """What an unknown key may have meant: by another name of it, or by its letters."""
    owner, key = section_at(section, location[:-1]), location[-1]
    names = (RENAMED.get(".".join(location), ""), *OTHER_NAMES.get(key, ()))
    known = [name for name in names if _has(section, name.split("."))]
    # Of several, the one in the section where the key stands.
    known.sort(key=lambda name: name.split(".")[:-1][:1] != location[:-1][:1])
    if known:
        return f"did you mean `{known[0]}`?"
    if len(location) == 1 and key in ALGORITHMS:
        return _whose(key)
    if owner is None:
        return _nearest_in_unknown_section(section, location)
    best, best_ratio = "", 0.0
    for place in _places(owner, location[:-1]):
        ratio = _ratio(place, location)
        # What stands in another section must be more alike: there are many keys, of other topics.
        if ratio > best_ratio and ratio >= (0.6 if len(place) == len(location) else 0.75):
            best, best_ratio = ".".join(place), ratio
    if best_ratio < 1 and (namesakes := _namesakes(section, location)):
        return namesakes
    if best:
        return f"did you mean `{best}`?"
    return f"valid here: {', '.join(owner.model_fields)}"


def _nearest_in_unknown_section(section: type[Section], location: list[str]) -> str:
    """What `trian.seed` may have meant: the section first, then the key in it."""
    if location[0] in ALGORITHMS and location[0] not in section.model_fields:
        return _of_another_algorithm(section, location)
    known = next(end for end in range(len(location)) if section_at(section, location[: end + 1]) is None)
    owner = section_at(section, location[:known])
    assert owner is not None
    sections = [name for name, field in owner.model_fields.items() if nested_section(field.annotation)]
    like = difflib.get_close_matches(location[known], sections, n=1)
    if not like and (namesakes := _namesakes(section, location)):
        return namesakes
    if not like:
        return f"valid here: {', '.join('.'.join([*location[:known], name]) for name in owner.model_fields)}"
    corrected = [*location[:known], like[0], *location[known + 1 :]]
    if _has(section, corrected):
        return f"did you mean `{'.'.join(corrected)}`?"
    return _nearest(section, corrected)


def _namesakes(section: type[Section], location: list[str]) -> str:
    """Keys of the same name in any section, by their full names, those of the section where it was written
    first; "" for none, or too many to choose from."""
    places = [place for place in _places(section, []) if place[-1] == location[-1]]
    places.sort(key=lambda place: place[0] != location[0])
    names = [f"`{'.'.join(place)}`" for place in places]
    return f"did you mean {' or '.join(names)}?" if 1 <= len(names) <= _MOST_NAMESAKES else ""


def _of_another_algorithm(section: type[Section], location: list[str]) -> str:
    """What a key of an algorithm's section is here, `grpo.kl.coef` for `ppo.kl.coef`, or where it is one."""
    own = [[name, *location[1:]] for name in ALGORITHMS if _has(section, [name, *location[1:]])]
    if own:
        return f"did you mean `{'.'.join(own[0])}`?"
    return (_namesakes(section, location) if len(location) == 2 else "") or _whose(location[0])


def _whose(name: str) -> str:
    python = f"conch.train(..., algorithm={name!r})"
    if name == "reward_model":  # which learns from other rows than `conch.train` takes
        python = "conch.trainers.reward_model.RewardModelTrainer"
    return f"it is a section of `conch train {name.replace('_', '-')}`, in Python of `{python}`"


def _ratio(place: list[str], location: list[str]) -> float:
    """How much a key at `place` is like what was written at `location`, which is no deeper: from 0 to 1."""
    key = location[-1]
    alone = _likeness(place[-1], key)
    # `kl_coef` is `kl.coef`, one section further down.
    joined = ["_".join(place[first:]) for first in range(len(location) - 1, len(place) - 1)]
    if len(joined) > 1 and alone < 1:  # two sections further down the name alone says too little
        alone = 0.0
    return max([alone, *(_likeness(name, key) for name in joined)])


def _likeness(name: str, key: str) -> float:
    return difflib.SequenceMatcher(None, name, key).ratio()


def _has(section: type[Section], location: list[str]) -> bool:
    owner = section_at(section, location[:-1])
    return owner is not None and location[-1] in owner.model_fields


def _places(section: type[Section] | None, location: list[str]) -> Iterator[list[str]]:
    """Where keys stand in `section`: its own first, then those of the sections in it."""
    fields = section.model_fields if section is not None else {}
    yield from ([*location, name] for name in fields)
    for name, field in fields.items():
        yield from _places(nested_section(field.annotation), [*location, name])
