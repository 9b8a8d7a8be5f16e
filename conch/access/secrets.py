"""Secrets that clients show to servers. They stand in environment variables, and in no message or log."""

from __future__ import annotations

import os

from conch.errors import ConfigError


def secret_from(variable: str | None) -> str:
    """Return the secret in an environment variable; "" if `variable` is None.

    Raises:
        ConfigError: the variable is not set, or holds characters that no header can carry.
    """
    if variable is None:
        return ""
    secret = os.environ.get(variable, "")
    if not secret:
        raise ConfigError(
            f"environment variable {variable}, which is to hold the server's secret, is not set or empty"
        )
    if not (secret.isascii() and secret.isprintable()) or any(sign in secret for sign in " =:,"):
        raise ConfigError(
            f"the secret in environment variable {variable} holds characters that Triton's flag or a header "
            "cannot carry; take letters, digits, dash and underscore (for example `openssl rand -hex 32`)"
        )
    return secret


def key_from(variable: str, setting: str) -> str:
    """Return the key of a provider in an environment variable, whatever signs it is made of.

    setting: full name of the key that names the variable, for messages.

    Raises:
        ConfigError: the variable is not set, or holds what no header can carry.
    """
    key = os.environ.get(variable, "")
    if not key:
        raise ConfigError(f"`{setting}` = {variable}: this environment variable is not set or empty")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigError(
            f"`{setting}` = {variable}: what this environment variable holds is no key, which is "
            "printable ASCII without blanks"
        )
    return key
