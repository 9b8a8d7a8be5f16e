"""Pages of the reference, made from the code when the site is built; nothing of it is kept in files.

    ```{settings} conch.trainers.ppo:PPORunConfig     every key of a section: type, default, docstring
    ```{commands}                                     every command with its `--help`
    ```{http-api} training-service                    addresses and bodies of a server, from its OpenAPI page

Docstrings are plain text with `names` in backticks; `plain_to_rst` has autodoc show them as they are meant.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from conch.cli import describe
from conch.config import Section

ROOT = Path(__file__).resolve().parents[2]
SETTINGS_PAGE = "/docs/reference/settings/index"
# A verb below a verb that no help lists in a way that `subcommands` reads.
HIDDEN = {("convert",): ["ensemble"]}
_KEY = re.compile(r"^  (?P<name>\S+): (?P<type>.*?), (?:(?P<required>required)|default (?P<default>.*))$")
# FastAPI's own of what cannot be read, which our servers refuse with 400 and one sentence.
_UNUSED = ("HTTPValidationError", "ValidationError")
_NEVER_ASKED: Any = None  # for the server behind addresses that are only listed
_KEYS = re.compile(r"^keys(?:, | of |:)", re.MULTILINE)


@dataclass(frozen=True)
class Key:
    """One setting. default: as Python writes it; None where the key is required."""

    name: str
    type: str
    default: str | None
    text: str


def keys_of(listing: str) -> list[Key]:
    """The keys that `conch.cli.describe` lists."""
    keys: list[Key] = []
    lines: list[list[str]] = []
    for line in listing.splitlines():
        match = _KEY.match(line)
        if match is not None:
            keys.append(Key(match["name"], match["type"], match["default"], ""))
            lines.append([])
        else:
            lines[-1].append(line.strip())
    return [
        Key(key.name, key.type, key.default, " ".join(text)) for key, text in zip(keys, lines, strict=True)
    ]


def loaded(name: str) -> Any:
    """The object that `module:name` names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def inline(text: str) -> list[nodes.Node]:
    """A sentence with `code` in backticks."""
    parts = re.split(r"`+([^`]+)`+", text)
    return [
        nodes.literal("", part) if place % 2 else nodes.Text(part) for place, part in enumerate(parts) if part
    ]


def paragraph(text: str) -> nodes.paragraph:
    return nodes.paragraph("", "", *inline(text))


def titled(identifier: str, title: str, *content: nodes.Node) -> nodes.section:
    """A section whose title is code."""
    name = nodes.fully_normalize_name(identifier)
    return nodes.section(
        "", nodes.title("", "", nodes.literal("", title)), *content, ids=[identifier], names=[name]
    )


def entry(identifier: str, term: str, about: str, text: str) -> nodes.definition_list_item:
    """A name, what it takes, and a sentence, with an anchor."""
    words = nodes.term("", "", nodes.literal("", term), nodes.Text(" "), *inline(about), ids=[identifier])
    return nodes.definition_list_item("", words, nodes.definition("", paragraph(text or "")))


class Settings(SphinxDirective):
    """Every key of a section: `module:Class`, and `:prefix:` where its keys stand below another's."""

    required_arguments = 1
    option_spec = {"prefix": str, "group": str}  # noqa: RUF012

    def run(self) -> list[nodes.Node]:
        section: type[Section] = loaded(self.arguments[0])
        prefix = self.options.get("prefix", "")
        groups: dict[str, list[Key]] = {}
        for key in keys_of(describe(section, prefix=prefix)):
            groups.setdefault(key.name.partition(".")[0] if "." in key.name else "", []).append(key)
        tag = self.options.get("group", "")
        found: list[nodes.Node] = []
        for name, keys in groups.items():
            items = [entry(tag + key.name, key.name, _takes(key), key.text) for key in keys]
            listing = nodes.definition_list("", *items)
            found.append(titled(f"{tag}section-{name}", name, listing) if name else listing)
        return found


def _takes(key: Key) -> str:
    kind = key.type.replace("NoneType", "None")
    return f"`{kind}`, required" if key.default is None else f"`{kind}`, default `{key.default}`"


class Commands(SphinxDirective):
    """Every command with its help; the keys of `key=value` programs have pages of their own."""

    def run(self) -> list[nodes.Node]:
        return [self._section(words) for words in commands()]

    def _section(self, words: Sequence[str]) -> nodes.section:
        text, cut = without_keys(help_of(words))
        name = " ".join(("conch", *words))
        block = nodes.literal_block(text, text, language="text")
        more: list[nodes.Node] = []
        if cut:
            target = addnodes.pending_xref(
                "",
                nodes.Text("Settings"),
                refdomain="std",
                reftype="doc",
                reftarget=SETTINGS_PAGE,
                refdoc=self.env.docname,
                refexplicit=True,
                refwarn=True,
            )
            more = [nodes.paragraph("", "", nodes.Text("Its keys: "), target)]
        return titled("-".join(("conch", *words)), name, block, *more)


def without_keys(text: str) -> tuple[str, bool]:
    """A help up to the list of its keys, and whether it has one."""
    match = _KEYS.search(text)
    return (text[: match.start()].rstrip(), True) if match else (text.rstrip(), False)


def help_of(words: Sequence[str]) -> str:
    """What `conch ... --help` prints."""
    from conch.__main__ import main

    kept, columns = sys.argv, os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100"
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            main([*words, "--help"])
    finally:
        sys.argv = kept
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns
    return printed.getvalue().replace(f"{ROOT}{os.sep}", "")


def subcommands(text: str) -> list[str]:
    """The commands that a help lists: below `verbs:` or `algorithms:`, or as argparse does."""
    listed = re.search(r"^(?:verbs|algorithms|commands):\n((?:  .*\n|\n(?=  ))+)", text, re.MULTILINE)
    if listed is not None:
        return re.findall(r"^ {2,4}([a-z][\w-]*)(?:  |$)", listed[1], re.MULTILINE)
    choices = re.search(r"^positional arguments:\n  \{([\w,-]+)\}", text, re.MULTILINE)
    return choices[1].split(",") if choices else []


def commands(words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Words of every command, `conch` itself first."""
    yield words
    for name in [*subcommands(help_of(words)), *HIDDEN.get(words, [])]:
        yield from commands((*words, name))


class HttpApi(SphinxDirective):
    """Addresses of a server: `training-service`, `reward-server`, `rollout-server` or `reference-server`."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        forms = scoring_addresses() if name == "reward-server" else []
        schema = openapi_of(name)
        # Two servers have addresses and bodies of the same names; those of the first keep theirs as anchors.
        tag = "" if name in ("training-service", "reward-server") else f"{name}-"
        return [*forms, *self._operations(schema, tag), *self._bodies(schema, tag)]

    def _operations(self, schema: Mapping[str, Any], tag: str) -> Iterator[nodes.Node]:
        for path, methods in schema["paths"].items():
            for method, operation in methods.items():
                title = f"{method.upper()} {path}"
                text = operation.get("description") or operation.get("summary", "")
                identifier = nodes.make_id(tag + title)
                yield titled(
                    identifier, title, *self.parse_text_to_nodes(text), *_operation(operation, identifier)
                )

    def _bodies(self, schema: Mapping[str, Any], tag: str) -> Iterator[nodes.Node]:
        for name, body in sorted(schema.get("components", {}).get("schemas", {}).items()):
            if name in _UNUSED:
                continue
            required, properties = body.get("required", ()), body.get("properties", {})
            text, texts = of_fields(body.get("description", ""), properties)
            items = [
                entry(
                    f"{tag}{name}.{field}",
                    field,
                    f"`{_kind(of)}`" + (", required" if field in required else _given(of)),
                    of.get("description", texts.get(field, "")),
                )
                for field, of in properties.items()
            ]
            listing = [nodes.definition_list("", *items)] if items else []
            yield titled(f"{tag}body-{name}", name, *self.parse_text_to_nodes(text), *listing)


def of_fields(text: str, fields: Collection[str]) -> tuple[str, dict[str, str]]:
    """A docstring without its lines `field: text`, and these."""
    rest: list[str] = []
    texts: dict[str, str] = {}
    for block in _blocks(text.splitlines()):
        names: list[str] = []
        for line in block:
            match = _ITEM.match(line)
            named = match[1].split(", ") if match else []
            if match and set(named) <= {*fields}:
                names = named
                texts |= dict.fromkeys(names, match[2])
            elif names and line.startswith("    "):
                texts |= {name: f"{texts[name]} {line.strip()}" for name in names}
            else:
                rest.append(line)
        rest.append("")
    return "\n".join(rest), texts


def openapi_of(name: str) -> Mapping[str, Any]:
    """The OpenAPI page of a server of ours."""
    if name == "training-service":
        from conch.service.app import make_app
        from conch.service.runs.runs import Runs
        from conch.service.service_config import ServiceConfig

        return make_app(Runs(Path("never-made"), idle_s=1.0, stop_s=1.0), ServiceConfig()).openapi()
    if name == "rollout-server":
        from conch.rollouts import app as rollouts

        return rollouts.make_app(_NEVER_ASKED).openapi()
    if name == "reference-server":
        from conch.reference import server as reference
        from conch.reference.protocol import LogprobReply, LogprobRequest

        schema = reference.make_app(_NEVER_ASKED).openapi()
        bodies = schema["components"]["schemas"]
        bodies |= {body.__name__: body.model_json_schema() for body in (LogprobRequest, LogprobReply)}
        return schema
    from conch.reward_server.app import RewardFront
    from conch.reward_server.metrics import Meter

    return RewardFront([], Meter()).app.openapi()


def scoring_addresses() -> list[nodes.Node]:
    """Where a reward server gives scores, with the bodies that it reads there."""
    from conch.reward_server.forms import ADDRESSES
    from conch.reward_server.forms.kserve import KSERVE

    items = [
        entry(
            nodes.make_id(f"score-{path}") if path != "/" else "score-root",
            f"POST {path}",
            "",
            "; ".join(f"{form.name}: `{form.shape}`" for form in forms),
        )
        for path, forms in [*ADDRESSES.items(), ("/v2/models/NAME/infer", (KSERVE,))]
    ]
    return [nodes.definition_list("", *items)]


def _operation(operation: Mapping[str, Any], identifier: str) -> list[nodes.Node]:
    items = [
        entry(
            f"{identifier}-{each['name']}",
            each["name"],
            f"in {each['in']}, `{_kind(each['schema'])}`" + (", required" if each.get("required") else ""),
            each.get("description", each["schema"].get("description", "")),
        )
        for each in operation.get("parameters", ())
    ]
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        items.append(entry(f"{identifier}-body", "body", f"{kind}, `{_kind(content['schema'])}`", ""))
    for status, reply in operation.get("responses", {}).items():
        kinds = [f"`{_kind(of['schema'])}`" for of in reply.get("content", {}).values() if of.get("schema")]
        if any(name in kind for kind in kinds for name in _UNUSED):
            continue
        about = ", ".join(kinds)
        items.append(entry(f"{identifier}-{status}", status, about, reply.get("description", "")))
    return [nodes.definition_list("", *items)]


def _kind(schema: Mapping[str, Any]) -> str:
    """A JSON schema's type in a word or two."""
    if "$ref" in schema:
        return schema["$ref"].rpartition("/")[2]
    for several in ("anyOf", "oneOf", "allOf"):
        if several in schema:
            return " | ".join(_kind(each) for each in schema[several])
    if "enum" in schema:
        return " | ".join(repr(each) for each in schema["enum"])
    if schema.get("type") == "array":
        return f"array of {_kind(schema.get('items', {}))}"
    return schema.get("type", repr(schema["const"]) if "const" in schema else "any")


def _given(schema: Mapping[str, Any]) -> str:
    return f", default `{schema['default']!r}`" if "default" in schema else ""


def plain_to_rst(lines: Sequence[str]) -> list[str]:
    """A docstring of the house as reStructuredText.

    Paragraphs stay; `name: text` with its indented lines becomes an item, in `Raises:` as well; what is
    indented below a paragraph is shown as it stands.
    """
    found: list[str] = []
    for block in _blocks(lines):
        head, *rest = block
        if head.startswith("    "):
            found += ["::", "", *block, ""]
        elif head == "Raises:":
            found += ["Raises:", "", *_items([line[4:] for line in rest])]
        elif _ITEM.match(head) and all(_ITEM.match(line) or line.startswith("    ") for line in block):
            found += _items(block)
        elif rest and all(line.startswith("    ") for line in rest):
            found += [_escaped(head), "", "::", "", *rest, ""]
        else:
            found += [*(_escaped(line.strip()) for line in block), ""]
    return found


_ITEM = re.compile(r"^([\w*`., ]{1,60}): (.*)$")


def _blocks(lines: Sequence[str]) -> Iterator[list[str]]:
    block: list[str] = []
    for line in [*inspect.cleandoc("\n".join(lines)).splitlines(), ""]:
        if line.strip():
            block.append(line.rstrip())
        elif block:
            yield block
            block = []


def _items(lines: Sequence[str]) -> list[str]:
    items: list[str] = []
    for line in lines:
        match = _ITEM.match(line)
        if match is not None and not line.startswith(" "):
            name = match[1].replace("`", "")
            items.append(f"- ``{name}``: {_escaped(match[2])}")
        else:
            items.append(f"  {_escaped(line.strip())}" if items else f"- {_escaped(line.strip())}")
    return [*items, ""]


def _escaped(text: str) -> str:
    parts = re.split(r"`+([^`]+)`+", text)
    marked = [
        f"\\ ``{part.strip()}``\\ " if place % 2 else re.sub(r"([*_|\\`])", r"\\\1", part)
        for place, part in enumerate(parts)
    ]
    return "".join(marked)


def _show_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    del app, what, name, obj, options
    lines[:] = plain_to_rst(lines)


def _hide_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, returns: str
) -> tuple[str, str] | None:
    """A section's parameters are its fields, which are listed."""
    del app, what, name, options, signature, returns
    return ("", "") if isinstance(obj, type) and issubclass(obj, Section) else None


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("settings", Settings)
    app.add_directive("commands", Commands)
    app.add_directive("http-api", HttpApi)
    app.connect("autodoc-process-docstring", _show_docstring)
    app.connect("autodoc-process-signature", _hide_signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
