"""The addresses of a reward that is asked over HTTP."""

from __future__ import annotations

from urllib.parse import SplitResult, urlsplit

from conch.errors import ConfigError

SCHEMES = ("http://", "https://")


def parse_urls(text: str) -> tuple[str, ...]:
    """Read `http://host:port/path`, or several with a comma between; those without a path have the last's.

    Raises:
        ConfigError: `text` is something else, names a server twice, or holds a password.
    """
    parts = [part.strip() for part in text.split(",")]
    path = urlsplit(parts[-1]).path or "/"
    urls = tuple(_complete(part, path, text) for part in parts)
    if len(set(urls)) < len(urls):
        raise ConfigError(f"reward `{text}` names a server twice")
    return urls


def _complete(part: str, path: str, text: str) -> str:
    split = _split(part)
    if split is None or split.scheme not in ("http", "https") or not split.hostname:
        raise ConfigError(
            f"reward `{_shown(text)}` is not of the form `http://host:port/path`; several servers have a "
            "comma between them: http://host1:8000,http://host2:8000/path"
        )
    if split.username is not None or split.query or split.fragment:
        raise ConfigError(
            f"reward `{_shown(text)}`: give no password, `?` or `#` in the address; a token goes into a "
            "header, `reward.headers_env.authorization=VARIABLE`"
        )
    return f"{split.scheme}://{split.netloc}{split.path or path}"


def _split(part: str) -> SplitResult | None:
    try:
        split = urlsplit(part)
        _ = split.port  # raises for what is no number
    except ValueError:
        return None
    return split


def _shown(text: str) -> str:
    """Without what stands before an @: it may be a password."""
    return ",".join(part.split("@")[-1] for part in text.split(","))
