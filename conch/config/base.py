"""Sections: unknown keys are refused with the nearest valid name, and values are frozen."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from conch.errors import ConfigError


class Section(BaseModel):
    """Base of all sections: unknown keys refused, frozen after load, docstrings kept as descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


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


def _explain(section: type[Section], problem: dict[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location) or section.__name__
    if problem["type"] == "extra_forbidden":
        return f"unknown key `{key}`; {_nearest(section, location)}"
    if problem["type"] == "missing":
        return f"`{key}` is missing"
    message = problem["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(problem["input"], dict) else f" (got {problem['input']!r})"
    return f"`{key}`: {message}{shown}"


def nested_section(annotation: Any) -> type[Section] | None:
    """The section that a field of this type holds; None for a plain value."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def _nearest(section: type[Section], location: list[str]) -> str:
    """What an unknown key may have meant, looked for in its section and in the sections of that one."""
    owner: type[Section] | None = section
    for part in location[:-1]:
        field = owner.model_fields.get(part) if owner is not None else None
        owner = nested_section(field.annotation) if field else None
    key = location[-1]
    best, best_ratio = "", 0.0
    for place in _places(owner, location[:-1]):
        ratio = difflib.SequenceMatcher(None, place[-1], key).ratio()
        # What stands in another section must be more alike: there are many keys, of other topics.
        if ratio > best_ratio and ratio >= (0.6 if len(place) == len(location) else 0.75):
            best, best_ratio = ".".join(place), ratio
    if best:
        return f"did you mean `{best}`?"
    return f"valid here: {', '.join(getattr(owner, 'model_fields', {}))}"


def _places(section: type[Section] | None, location: list[str]) -> Iterator[list[str]]:
    """Where keys stand in `section`: its own first, then those of the sections in it."""
    fields = section.model_fields if section is not None else {}
    yield from ([*location, name] for name in fields)
    for name, field in fields.items():
        yield from _places(nested_section(field.annotation), [*location, name])
