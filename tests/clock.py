"""Which metrics follow the clock, and so differ between two equal runs."""

from __future__ import annotations

CLOCK = (
    *("time/", "reward/latency", "reward/wait", "reward/hidden"),
    *("reward/in_flight", "reward/queue", "reward/compute"),
)
"""Beginnings of their names."""
