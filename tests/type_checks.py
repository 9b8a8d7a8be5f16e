"""Types of the library that are checked while its tests run, at a price that thousands of tests can pay.

`jaxtyping`'s import hook decorates every function with `jaxtyped`, which binds the arguments, checks them
twice and opens a scope for the names of axes, and does so anew for each closure that is made. Only what names
axes needs that: where no annotation of a function does, beartype alone checks the same annotations.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from types import CodeType, FunctionType
from typing import Any, get_args, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype

_CONF = BeartypeConf(violation_type=jaxtyping.TypeCheckError)
_FUNC = "__beartype_func"
_jaxtyped: Callable[..., Any] = jaxtyping.jaxtyped
_Code = tuple[str, str, CodeType]
_of_closure: dict[_Code, Any] = {}
_with_axes: set[_Code] = set()


def install(package: str) -> None:
    """Check all annotations of a package that is yet to be imported."""
    jaxtyping.jaxtyped = _checked  # pyright: ignore[reportAttributeAccessIssue]
    jaxtyping.install_import_hook(package, "beartype.beartype")


def _checked(*, typechecker: Any) -> Callable[[Any], Any]:
    """What the hook decorates functions and classes with."""

    def decorate(target: Any) -> Any:
        if isinstance(target, FunctionType):
            return checked(target)
        if inspect.isclass(target) and dataclasses.is_dataclass(target):
            init = target.__dict__.get("__init__")
            if isinstance(init, FunctionType) and not hasattr(init, "__wrapped__"):
                target.__init__ = checked(init)
            return target
        return _jaxtyped(target, typechecker=typechecker)

    return decorate


def checked(function: FunctionType) -> Any:
    """A function whose annotations are checked. The check of a closure is made once for all of its code."""
    code = function.__module__, function.__qualname__, function.__code__
    if code in _with_axes:
        return _jaxtyped(function, typechecker=beartype)
    if code in _of_closure:
        wrapper = _copied(_of_closure[code])
        wrapper.__kwdefaults__ = {**wrapper.__kwdefaults__, _FUNC: function}
        return functools.update_wrapper(wrapper, function)
    hints = {name: _resolved(function, name) for name in function.__annotations__}
    if any(map(_names_axes, hints.values())):
        _with_axes.add(code)
        return _jaxtyped(function, typechecker=beartype)
    copy = _copied(function)
    copy.__annotations__ = hints
    wrapper = beartype(conf=_CONF)(copy)
    if wrapper is copy:
        return function
    if "<locals>" in function.__qualname__ and _FUNC in (wrapper.__kwdefaults__ or {}):
        _of_closure[code] = _copied(wrapper)
        _of_closure[code].__kwdefaults__ = {**wrapper.__kwdefaults__, _FUNC: None}  # keep nothing alive
    return functools.update_wrapper(wrapper, function)


def _names_axes(hint: Any) -> bool:
    """Whether an annotation holds an array type."""
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(_names_axes(part) for part in _parts(hint))


def _parts(hint: Any) -> Sequence[Any]:
    """What stands in the brackets of an annotation, some in brackets again: Callable[[int], int]."""
    return hint if isinstance(hint, list | tuple) else get_args(hint)


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
