"""Section `reference`: where the frozen starting policy is held that the KL is measured from."""

from __future__ import annotations

from pydantic import Field

from conch.config.auth import AuthConfig
from conch.config.base import Section


class ReferenceConfig(Section):
    """Where PPO and GRPO have the log-probs of the starting policy from."""

    urls: str | None = None
    """`host:port` of a reference server (`conch reference-server`), or several, `host1:port,host2:port`,
    which share the micro-batches. None keeps the reference in the trainer's processes."""

    auth: AuthConfig = Field(default_factory=AuthConfig)
    """Access to the servers of `urls`."""

    request_timeout_s: float = Field(default=300.0, gt=0)
    """Longest wait for one server's answer to one micro-batch, in seconds, behind others' in its queue; then
    the next server is asked."""

    deadline_s: float = Field(default=600.0, gt=0)
    """Longest wait for the log-probs of a micro-batch from any server, in seconds; then the run ends with an
    error."""
