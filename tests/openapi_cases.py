"""Requests drawn from an OpenAPI page: such as fit it, such as nearly do, and such as are nothing at all."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

_MOST = 4
_FLOATS = st.floats(allow_nan=True, allow_infinity=True, width=64)
_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | _FLOATS
    | st.text(max_size=8)
    | st.sampled_from(["", "\x00", "\ud800", "../../x", "a" * 5000, 10**400])
)
JSON_VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_NO_JSON = st.binary(max_size=40) | st.sampled_from(
    [b"", b"{", b"[" * 3000, b'"\\ud800"', b"1" * 6000, b"\xff"]
)


@dataclass(frozen=True)
class Operation:
    """One address with one method.

    statuses: that the page has for it.
    body: schema of the JSON that it takes, None for none.
    parameters: schemas of those in the query and in headers, by place and name.
    reply: schema of the JSON of its success, None where that is something else.
    """

    method: str
    path: str
    statuses: frozenset[int]
    body: dict[str, Any] | None
    parameters: Mapping[tuple[str, str], dict[str, Any]]
    reply: dict[str, Any] | None


@dataclass(frozen=True)
class Case:
    """A request. body: bytes as they are sent."""

    operation: Operation
    body: bytes
    query: Mapping[str, str]
    headers: Mapping[str, str]


def operations_of(page: Mapping[str, Any]) -> list[Operation]:
    """All that a page has."""
    return [
        _operation(method, path, said)
        for path, operations in page["paths"].items()
        for method, said in operations.items()
    ]


def _operation(method: str, path: str, said: Mapping[str, Any]) -> Operation:
    success = said["responses"]["200"].get("content", {})
    return Operation(
        method.upper(),
        path,
        frozenset(int(status) for status in said["responses"]),
        said["requestBody"]["content"]["application/json"]["schema"] if "requestBody" in said else None,
        {(each["in"], each["name"]): each["schema"] for each in said.get("parameters", ())},
        success.get("application/json", {}).get("schema"),
    )


class Cases:
    """Draws requests.

    page: of the server.
    known: property -> values that mean something to the server, drawn as often as any others.
    only: property -> the one values that are drawn, of those that decide how long a request takes.
    """

    def __init__(
        self,
        page: Mapping[str, Any],
        known: Mapping[str, Sequence[Any]],
        only: Mapping[str, Sequence[Any]],
    ) -> None:
        self._components = page["components"]["schemas"]
        self._known = known
        self._only = only

    def of(self, operation: Operation) -> st.SearchStrategy[Case]:
        """Requests to one address."""
        bodies = st.just(b"")
        if operation.body is not None:
            fitting = self.values(operation.body)
            bodies = st.one_of(
                fitting.map(_sent), fitting.map(_sent), self._spoiled(fitting).map(_sent), _NO_JSON
            )
        query, headers = (
            st.fixed_dictionaries(
                {},
                optional={
                    name: (self._property(name, schema) | JSON_VALUES).map(_in_a_line)
                    for (place, name), schema in operation.parameters.items()
                    if place == wanted
                },
            )
            for wanted in ("query", "header")
        )
        ranges = st.sampled_from(["", "bytes=0-0", "bytes=5-", "bytes=9-2", "bytes=999999999-", "lines=1"])
        kinds = st.sampled_from(["application/json"] * 8 + ["text/plain", "multipart/form-data", "nonsense"])
        return st.builds(
            lambda body, query, headers, part, kind: Case(
                operation,
                body,
                query,
                {"content-type": kind, **headers, **({"range": part} if part else {})},
            ),
            bodies,
            query,
            headers,
            ranges,
            kinds,
        )

    def values(self, schema: Mapping[str, Any]) -> st.SearchStrategy[Any]:
        """Values that fit a schema, small ones."""
        if "$ref" in schema:
            return self.values(self._components[schema["$ref"].rpartition("/")[2]])
        if "anyOf" in schema:
            return st.one_of([self.values(each) for each in schema["anyOf"]])
        if "enum" in schema or "const" in schema:
            return st.sampled_from(schema.get("enum", [schema.get("const")]))
        return self._of_kind(schema.get("type"), schema)

    def _of_kind(self, kind: str | None, schema: Mapping[str, Any]) -> st.SearchStrategy[Any]:
        low = schema.get("minimum", schema.get("exclusiveMinimum", -1) + ("exclusiveMinimum" in schema))
        simple: dict[str | None, st.SearchStrategy[Any]] = {
            "null": st.none(),
            "boolean": st.booleans(),
            "integer": st.integers(int(low), int(low) + _MOST),
            "number": st.floats(low, min(low + _MOST, schema.get("maximum", low + _MOST))),
            "string": st.text(min_size=schema.get("minLength", 0), max_size=8),
        }
        if kind in simple:
            return simple[kind]
        if kind == "array":
            least = schema.get("minItems", 0)
            return st.lists(self.values(schema.get("items", {})), min_size=least, max_size=least + _MOST)
        if kind == "object" and "properties" in schema:
            return self._objects(schema)
        return (
            st.dictionaries(st.text(max_size=8), JSON_VALUES, max_size=3) if kind == "object" else JSON_VALUES
        )

    def _objects(self, schema: Mapping[str, Any]) -> st.SearchStrategy[Any]:
        fields = {name: self._property(name, inner) for name, inner in schema["properties"].items()}
        needed = {name: fields.pop(name) for name in schema.get("required", ())}
        needed |= {name: fields.pop(name) for name in [*fields] if name in self._only}
        return st.fixed_dictionaries(needed, optional=fields)

    def _property(self, name: str, schema: Mapping[str, Any]) -> st.SearchStrategy[Any]:
        if name in self._only:
            return st.sampled_from(self._only[name])
        drawn = self.values(schema)
        return st.sampled_from(self._known[name]) | drawn if name in self._known else drawn

    def _spoiled(self, fitting: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        """Values of which one part is another than it should be."""

        @st.composite
        def spoil(draw: st.DrawFn) -> Any:
            value = copy.deepcopy(draw(fitting))
            if not isinstance(value, dict):
                return draw(JSON_VALUES)
            names = [*(name for name in value if name not in self._only), "surplus"]
            name = draw(st.sampled_from(names))
            if name in value and draw(st.booleans()):
                del value[name]
            else:
                value[name] = draw(JSON_VALUES)
            return value

        return spoil()


def _sent(value: Any) -> bytes:
    return json.dumps(value).encode()


def _in_a_line(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode("ascii", "backslashreplace").decode().translate({sign: None for sign in (0, 10, 13)})
