"""How fast a judge may be asked: by the configured rates, and by what its server says in headers."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping

from conch.rewards.client.http import retry_after_s

_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_DEFAULT_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 600.0


class RateLimit:
    """Lets at most so much through per minute, evenly after what a burst of one second takes.

    A bucket that fills continuously: unlike a count per calendar minute, it never lets through twice the rate
    around a minute's turn.

    per_minute: amount; None lets everything through.
    """

    def __init__(self, per_minute: float | None) -> None:
        self._per_s = None if per_minute is None else per_minute / 60
        self._free_at = time.monotonic()

    def take(self, amount: float) -> float:
        """Take an amount; returns the seconds to wait before it may be used."""
        if self._per_s is None:
            return 0.0
        now = time.monotonic()
        begins = max(self._free_at, now - 1.0)  # what was not used in the last second may be used at once
        self._free_at = begins + amount / self._per_s
        return max(0.0, begins - now)

    def correct(self, amount: float) -> None:
        """Take what turned out to be used beyond the estimate, or give back what was not."""
        if self._per_s is not None:
            self._free_at += amount / self._per_s


class Limits:
    """Requests and tokens per minute of one server.

    requests, tokens: per minute, of this process.
    """

    def __init__(self, requests: float | None, tokens: float | None) -> None:
        self._requests = RateLimit(requests)
        self._tokens = RateLimit(tokens)

    async def wait(self, tokens: int) -> None:
        """Wait until a request of so many tokens may be sent."""
        wait_s = max(self._requests.take(1.0), self._tokens.take(float(tokens)))
        if wait_s > 0:
            await asyncio.sleep(wait_s)

    def correct(self, tokens: int) -> None:
        """Count the tokens that a request turned out to have beyond the estimate."""
        self._tokens.correct(float(tokens))


def asked_pause_s(headers: Mapping[str, str]) -> float:
    """Return how long a server that answered 429 wants to be left alone, in seconds: what it says, else the
    reset of whichever `x-ratelimit-remaining-*` is 0, else 1."""
    seconds = told_pause_s(headers)
    return seconds if seconds is not None else exhausted_pause_s(headers) or _DEFAULT_PAUSE_S


def told_pause_s(headers: Mapping[str, str]) -> float | None:
    """Return how long a server says that it wants to be left alone, in seconds: `retry-after-ms`, or
    `retry-after` in seconds or as a date (RFC 9110, section 10.2.3). None where it does not say."""
    milliseconds = _number(headers.get("retry-after-ms"))
    seconds = retry_after_s(headers) if milliseconds is None else milliseconds / 1000
    return None if seconds is None else _bounded(seconds)


def exhausted_pause_s(headers: Mapping[str, str]) -> float:
    """Return for how long a server's headers say that nothing is left, in seconds; 0 where something is."""
    pauses = [
        duration_s(headers.get(f"x-ratelimit-reset-{what}"))
        for what in ("requests", "tokens")
        if _number(headers.get(f"x-ratelimit-remaining-{what}")) == 0
    ]
    return _bounded(max((pause for pause in pauses if pause is not None), default=0.0))


def duration_s(text: str | None) -> float | None:
    """Read `6m0s`, `120ms`, `1.5s` or plain seconds; None for anything else."""
    if text is None:
        return None
    if (plain := _number(text)) is not None:
        return plain
    parts = _PART.findall(text.strip())
    if not parts or "".join(number + unit for number, unit in parts) != text.strip():
        return None
    return sum(float(number) * _UNIT_S[unit] for number, unit in parts)


def _number(text: str | None) -> float | None:
    return float(text) if text is not None and re.fullmatch(r"\s*\d+(\.\d+)?\s*", text) else None


def _bounded(seconds: float) -> float:
    return min(_LONGEST_PAUSE_S, max(0.0, seconds))
