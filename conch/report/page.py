"""Puts a page together: data, charts and our own files in one HTML file that asks the network for nothing.

The content security policy of the page names the scripts that may run, by their hashes, and forbids all else:
a text that got among its tags could run nothing. Data is gzip in base64, which no text can end or escape.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from conch.atomic_files import replace_text
from conch.errors import ConfigError, install_extra

_SCRIPTS = (
    *("store.js", "charts.js", "curves.js", "samples.js", "compare.js", "rewards.js", "tables.js"),
    "app.js",
)
"""Files of `assets/`, in the order in which they run."""


def plotly_script() -> str:
    """The charting library, as the installed plotly package has it.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ConfigError(f"a report needs the package plotly: {install_extra('report')}") from error
    return get_plotlyjs()


def page(data: Mapping[str, Any] | None, *, title: str) -> str:
    """The whole page.

    data: of `Collector.update`; None for a page that asks the server it comes from.

    Raises:
        ConfigError: plotly is not installed.
    """
    own = "\n".join(asset(name) for name in _SCRIPTS)
    charts = plotly_script()
    for script in (own, charts):
        assert "</script" not in script.lower(), "a script that ends its own tag"
    hashes = " ".join(f"'sha256-{_sha256(script)}'" for script in (charts, own))
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        f"connect-src '{'none' if data is not None else 'self'}'; base-uri 'none'; form-action 'none'"
    )
    values = {
        "POLICY": html.escape(policy, quote=True),
        "TITLE": html.escape(title),
        "MODE": "live" if data is None else "file",
        "STYLE": asset("style.css"),
        "DATA": "" if data is None else packed(data),
        "PLOTLY": charts,
        "SCRIPT": own,
    }
    parts = asset("page.html").split("@@")  # text, name, text, name, ...
    return "".join(values[part] if place % 2 else part for place, part in enumerate(parts))


def write_page(path: Path, data: Mapping[str, Any], *, title: str) -> None:
    """Write a report; a reader sees the old file or the new one.

    Raises:
        ConfigError: plotly is not installed, or the file cannot be written.
    """
    text = page(data, title=title)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}): choose another --output") from error


def packed(data: Mapping[str, Any]) -> str:
    """JSON as gzip in base64."""
    return base64.b64encode(gzip.compress(as_json(data), compresslevel=6, mtime=0)).decode("ascii")


def as_json(data: Mapping[str, Any]) -> bytes:
    """Compact JSON in UTF-8."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8")


def asset(name: str) -> str:
    """A file of our own."""
    return (files("conch.report") / "assets" / name).read_text(encoding="utf-8")


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
