"""What a Retry-After header says."""

from __future__ import annotations

import pytest

from conch.servers.refusals import retry_after


@pytest.mark.parametrize(
    ("seconds", "header"), [(0.0, "1"), (0.2, "1"), (1.0, "1"), (1.01, "2"), (30.0, "30")]
)
def test_pause_is_whole_seconds_and_never_none(seconds: float, header: str) -> None:
    assert retry_after(seconds) == header
