"""Types of the library that are checked while its tests run, at a price that thousands of tests can pay.

`jaxtyping`'s import hook decorates every function with `jaxtyped`, which binds the arguments, checks them
twice and opens a scope for the names of axes, and does so anew for each closure that is made. Only what names
axes needs that: where a module knows no array type, beartype alone checks the same annotations.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype

_CONF = BeartypeConf(violation_type=jaxtyping.TypeCheckError)
_FUNC = "__beartype_func"
_jaxtyped: Callable[..., Any] = jaxtyping.jaxtyped
_of_code: dict[CodeType, Any] = {}


def install(package: str) -> None:
    """Check all annotations of a package that is yet to be imported."""
    jaxtyping.jaxtyped = _checked  # pyright: ignore[reportAttributeAccessIssue]
    jaxtyping.install_import_hook(package, "beartype.beartype")


def _checked(*, typechecker: Any) -> Callable[[Any], Any]:
    """What the hook decorates functions and classes with."""

    def decorate(target: Any) -> Any:
        if isinstance(target, FunctionType) and not _knows_arrays(target.__module__):
            return checked(target)
        if inspect.isclass(target) and not _knows_arrays(target.__module__):
            init = target.__dict__.get("__init__")
            if dataclasses.is_dataclass(target) and isinstance(init, FunctionType):
                if not hasattr(init, "__wrapped__"):
                    target.__init__ = checked(init)
                return target
        return _jaxtyped(target, typechecker=typechecker)

    return decorate


@functools.cache
def _knows_arrays(module: str) -> bool:
    """Whether a module has imported an array type before its first function or class."""
    values = [value for value in vars(sys.modules[module]).values() if inspect.isclass(value)]
    return any(
        value.__module__.startswith("jaxtyping")
        or issubclass(value, jaxtyping.AbstractArray | jaxtyping.AbstractDtype)
        for value in values
    )


def checked(function: FunctionType) -> Any:
    """beartype's check of a function. That of a closure is made once, for all that are made of its code."""
    pattern = _of_code.get(function.__code__)
    if pattern is None:
        copy = _copied(function)
        copy.__annotations__ = {name: _resolved(function, name) for name in function.__annotations__}
        wrapper = beartype(conf=_CONF)(copy)
        if wrapper is copy:
            return function
        if "<locals>" in function.__qualname__ and _FUNC in (wrapper.__kwdefaults__ or {}):
            pattern = _copied(wrapper)
            pattern.__kwdefaults__ = {**wrapper.__kwdefaults__, _FUNC: None}  # keep nothing alive
            _of_code[function.__code__] = pattern
    else:
        wrapper = _copied(pattern)
        wrapper.__kwdefaults__ = {**pattern.__kwdefaults__, _FUNC: function}
    return functools.update_wrapper(wrapper, function)


def _copied(function: FunctionType) -> Any:
    copy = FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__module__, copy.__qualname__ = function.__module__, function.__qualname__
    return copy


def _resolved(function: FunctionType, name: str) -> Any:
    """An annotation; Any where it names what is not there yet, as `jaxtyped` has it."""
    probe: Any = lambda: None  # noqa: E731
    probe.__annotations__ = {name: function.__annotations__[name]}
    try:
        return get_type_hints(probe, function.__globals__, include_extras=True)[name]
    except Exception:
        return Any
