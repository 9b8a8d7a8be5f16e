"""The token of a cluster that somebody else started: does it ask for one, and has this process got it?

Ray's own answer comes a quarter of a minute later, to a process that has loaded its model by then, and does
not say why. Imports no Ray, which reads the environment once, when it is imported.
"""

from __future__ import annotations

import os
from pathlib import Path

from conch.errors import ConfigError

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_USUAL_FILE = Path(".ray") / "auth_token"

_IS_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""What costs the cluster's control store nothing to be asked."""

_ANSWER_S = 10.0
"""Longest wait for its answer; `check_address` has seen that somebody listens."""


def own_token() -> tuple[str, str]:
    """The token that Ray finds here, and where: of `RAY_AUTH_TOKEN`, of the file `RAY_AUTH_TOKEN_PATH`, of
    `~/.ray/auth_token`. Empty where there is none."""
    if token := os.environ.get(TOKEN, "").strip():
        return token, f"`{TOKEN}`"
    named = os.environ.get(TOKEN_PATH)
    file = Path(named) if named else Path.home() / _USUAL_FILE
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        token = ""
    return token, str(file) if token else ""


def asks_for_token(address: str) -> bool:
    """Whether a cluster lets nobody in without a token; False where it does not say."""
    return _refuses(address, "")


def check_token(address: str) -> None:
    """Refuse a cluster that asks for a token which this process does not have.

    Raises:
        ConfigError: says whether it is missing, another, or turned off.
    """
    if not asks_for_token(address):
        return
    token, place = own_token()
    where = f"the cluster at `rollout.ray.address` = {address} asks for a token"
    remedy = f"put the cluster's into ~/{_USUAL_FILE} or `{TOKEN}` of every rank"
    if not token:
        raise ConfigError(f"{where}, and there is none here: {remedy}")
    if _refuses(address, token):
        raise ConfigError(f"{where}, and refuses the one in {place}: {remedy}")
    mode = os.environ.get(MODE, "token")
    if mode.lower() != "token":
        raise ConfigError(f"{where}, and `{MODE}={mode}` shows none: set it to `token`, or leave it out")


def _refuses(address: str, token: str) -> bool:
    import grpc

    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    # As Ray itself, past a proxy of this machine's.
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(_IS_ALIVE)(b"", timeout=_ANSWER_S, metadata=metadata)
        except grpc.RpcError as error:
            return error.code() is grpc.StatusCode.UNAUTHENTICATED  # pyright: ignore[reportAttributeAccessIssue]
    return False
