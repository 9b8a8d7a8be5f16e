"""A section's fields on a command line: described in `--help`, or as options of an argparse parser.

    add_options(parser, UpOptions)                                      # an option for each field
    options = parse_options(UpOptions, vars(parser.parse_args(argv)))   # validated

Names of options of several words take dashes and underscores alike: `written_with`.
"""

from __future__ import annotations

import argparse
import inspect
import textwrap
import types
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

from pydantic import BeforeValidator, ValidationError
from pydantic.fields import FieldInfo

from conch.config import Section
from conch.config.base import describe_field, nested_section
from conch.errors import ConfigError

SectionT = TypeVar("SectionT", bound=Section)
SettingsP = ParamSpec("SettingsP")
FirstT = TypeVar("FirstT")
ResultT = TypeVar("ResultT")


def describe(section: type[Section], values: Section | None = None, *, prefix: str = "") -> str:
    """List every key of `section` and of the sections in it: full name, type, default and docstring.

    values: shown for the defaults, for example those that a configuration file sets; None takes the section's
        own.
    prefix: full name of `section` where it stands inside another, with a dot behind.
    """
    return "\n".join(_describe_fields(section, prefix=prefix, defaults=values))


@dataclass(frozen=True, slots=True)
class Option:
    """How a field stands on the command line, as its metadata: `Annotated[int, Option(("-n", "--lines"))]`.

    names: names of the option, the long one last; empty takes `--name-of-the-field`.
    metavar: placeholder of the value in the help; None leaves it to argparse.
    positional: take the value by its place instead of after a name.
    repeated: of a tuple, take one value each time the option is given, instead of all after it.
    """

    names: tuple[str, ...] = ()
    metavar: str | None = None
    positional: bool = False
    repeated: bool = False


def add_options(
    parser: argparse._ActionsContainer,
    section: type[Section],
    prefix: str = "",
    *,
    without: Container[str] = (),
) -> None:
    """Add an option for each field of `section` to `parser`, with the field's type, default and docstring.

    A section inside `section` becomes a group of the help, its docstring the group's title. Only options that
    a user gives reach the namespace, each by the full name of its field: `network.grpc_port`.

    prefix: full name of `section` where it stands inside another, with a dot behind.
    without: fields of `section` that get no option.
    """
    for name, field in section.model_fields.items():
        if name in without:
            continue
        nested = nested_section(field.annotation)
        if nested is not None:
            title = (describe_field(section, name) or name).rstrip(".")
            add_options(parser.add_argument_group(title), nested, f"{prefix}{name}.")
            continue
        option = _option(field)
        settings: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _option_help(section, name)}
        kind, is_list = _value_type(field.annotation)
        if option.positional:
            parser.add_argument(f"{prefix}{name}", nargs="?", metavar=name, **settings)
            continue
        flags = option_names(section, name)
        settings |= {"dest": f"{prefix}{name}", "required": field.is_required()}
        if kind is bool:
            parser.add_argument(*flags, action="store_true", **settings)
            continue
        if get_args(kind):
            settings["choices"] = get_args(kind)
            # Other names of a choice are taken for it before it is looked up.
            other_names = [data.func for data in field.metadata if isinstance(data, BeforeValidator)]
            settings |= {"type": other_names[0]} if other_names else {}
        else:
            settings["type"] = kind
            settings["metavar"] = option.metavar or flags[-1].lstrip("-").replace("-", "_").upper()
        if is_list:
            settings |= {"action": "append"} if option.repeated else {"nargs": "+"}
        parser.add_argument(*flags, **settings)


def parse_options(section: type[SectionT], values: Mapping[str, Any]) -> SectionT:
    """Validate the options of `add_options` that a user gave, full name -> value, into a `section`.

    Raises:
        ConfigError: one sentence for each mistake, which names the option.
    """
    nested: dict[str, Any] = {}
    for full_name, value in values.items():
        *parents, name = full_name.split(".")
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = value
    try:
        return section.model_validate(nested)
    except ValidationError as error:
        problems = [_option_problem(section, dict(problem)) for problem in error.errors()]
        raise ConfigError("; ".join(problems)) from None


def _option(field: FieldInfo) -> Option:
    return next((data for data in field.metadata if isinstance(data, Option)), Option())


def option_names(section: type[Section], field_name: str) -> tuple[str, ...]:
    """Names of a field's option, the long one last; `log_file` has `--log-file` unless it names others."""
    return _option(section.model_fields[field_name]).names or ("--" + field_name.replace("_", "-"),)


def _option_help(section: type[Section], name: str) -> str:
    text = describe_field(section, name)
    default = _default(name, section.model_fields[name], None)
    has_default = default not in (..., None, "", ()) and default is not False
    return (f"{text} Default: {default}." if has_default else text).replace("%", "%%")


def _value_type(annotation: Any) -> tuple[Any, bool]:
    """Return the type of one value of an option, and whether it takes several.

    None counts for nothing; of several other types the first one reads the command line: `str | Path`.
    """
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(choice for choice in get_args(annotation) if choice is not type(None))
    if get_origin(annotation) is tuple:
        return get_args(annotation)[0], True
    return annotation, False


def _option_problem(section: type[Section], problem: dict[str, Any]) -> str:
    if problem["type"] == "value_error":  # a validator of ours, whose sentence names its options
        return problem["msg"].removeprefix("Value error, ")
    owner: Any = section
    *parents, name = (part for part in problem["loc"] if isinstance(part, str))
    for parent in parents:
        owner = nested_section(owner.model_fields[parent].annotation)
    flag, value = option_names(owner, name)[-1], problem["input"]
    shown = f"{value:g}" if isinstance(value, float) else str(value)
    if problem["type"] == "greater_than_equal":
        return f"{flag} {shown}: at least {problem['ctx']['ge']:g} is needed"
    if problem["type"] == "greater_than":
        return f"{flag} {shown}: it must be above {problem['ctx']['gt']:g}"
    return f"{flag} {shown}: {problem['msg']}"


def keywords_of(
    section: Callable[SettingsP, Any],
) -> Callable[
    [Callable[Concatenate[FirstT, ...], ResultT]], Callable[Concatenate[FirstT, SettingsP], ResultT]
]:
    """Decorate a function of one argument and `**settings`: type checkers and `help()` see its fields.

    So the fields stand in one place. The function itself turns `settings` into the section, by `load`.
    """

    def decorate(
        function: Callable[Concatenate[FirstT, ...], ResultT],
    ) -> Callable[Concatenate[FirstT, SettingsP], ResultT]:
        shown = inspect.signature(function)
        first, *_ = shown.parameters.values()
        fields = inspect.signature(section).parameters.values()
        function.__signature__ = shown.replace(parameters=[first, *fields])  # pyright: ignore[reportFunctionMemberAccess]
        return function

    return decorate


def written_with(sign: Literal["-", "_"], argv: Sequence[str]) -> list[str]:
    """Return the arguments with `sign` between the words of each option's name; values stay as they are."""
    other = "_" if sign == "-" else "-"
    return [_renamed(argument, other, sign) for argument in argv]


def _renamed(argument: str, old: str, new: str) -> str:
    name, equals, value = argument.partition("=")
    if name.startswith("--"):
        name = "--" + name[2:].replace(old, new)
    return name + equals + value


def _describe_fields(section: type[Section], prefix: str, defaults: Section | None) -> Iterator[str]:
    for name, field in section.model_fields.items():
        default = _default(name, field, defaults)
        nested = nested_section(field.annotation)
        if nested is not None:
            inner = default if isinstance(default, Section) else None
            yield from _describe_fields(nested, f"{prefix}{name}.", inner)
            continue
        shown = "required" if default is ... else f"default {_shown(default)}"
        yield f"  {prefix}{name}: {_type_name(field.annotation)}, {shown}"
        if text := describe_field(section, name):
            yield textwrap.fill(text, width=108, initial_indent=" " * 6, subsequent_indent=" " * 6)


def over_defaults(
    section: type[Section], values: Mapping[str, Any], defaults: Section | None = None
) -> dict[str, Any]:
    """Values, which nobody has validated, over the defaults of a section; required keys may be lacking.

    defaults: what the enclosing section has in place of this one.
    """
    whole = dict[str, Any](values)
    for name, field in section.model_fields.items():
        default, nested, value = (
            _default(name, field, defaults),
            nested_section(field.annotation),
            values.get(name),
        )
        if nested is not None and default is not None and (value is None or isinstance(value, Mapping)):
            inner = default if isinstance(default, Section) else None
            whole[name] = over_defaults(nested, value or {}, inner)
        elif name not in values and default is not ...:
            whole[name] = default
    return {name: whole[name] for name in dict.fromkeys((*section.model_fields, *whole)) if name in whole}


def _shown(value: Any) -> str:
    return repr(str(value) if isinstance(value, Path) else value)


def _default(name: str, field: FieldInfo, defaults: Section | None) -> Any:
    """Return the default of a key, `...` for a required one; a default of the enclosing section wins."""
    if defaults is not None:
        return getattr(defaults, name)
    return ... if field.is_required() else field.get_default(call_default_factory=True, validated_data={})


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(repr(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        return " | ".join(_type_name(choice) for choice in arguments)
    if annotation is type(None):
        return "None"
    if isinstance(annotation, type) and not arguments:
        return annotation.__name__
    return str(annotation).replace("typing.", "")
