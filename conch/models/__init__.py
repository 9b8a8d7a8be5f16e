"""Policies, heads and references."""
