"""Sections: unknown keys are refused with the nearest valid name, and values are frozen."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

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


def _nearest(section: type[Section], location: list[str]) -> str:
    owner: Any = section
    for part in location[:-1]:
        field = owner.model_fields.get(part) if hasattr(owner, "model_fields") else None
        owner = field.annotation if field else None
    names = list(getattr(owner, "model_fields", {}))
    close = difflib.get_close_matches(location[-1], names, n=1)
    if close:
        return f"did you mean `{'.'.join([*location[:-1], close[0]])}`?"
    return f"valid here: {', '.join(names)}"
