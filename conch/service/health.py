"""Does the service that these settings start answer? What a container's health check asks, from within it."""

from __future__ import annotations

import http.client
import json
import socket
import ssl

from conch.access.secrets import secret_from
from conch.errors import ServiceUnavailableError
from conch.service.protocol import KEY_HEADER
from conch.service.service_config import ServiceConfig

_LONGEST_S = 5.0
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def ask_health(config: ServiceConfig) -> str:
    """State of the service's run, `none` before the first. Of one that asks for clients' certificates nothing
    but its port is looked at: it lets nobody in who has none.

    Raises:
        ConfigError: the key's variable is not set.
        ServiceUnavailableError: it does not answer, or refuses the key.
    """
    host = _EVERYWHERE.get(config.host, config.host)
    where = f"the service on {host}, port {config.port},"
    try:
        if config.require_client_cert:
            socket.create_connection((host, config.port), _LONGEST_S).close()
            return "listening"
        connection = _connection(host, config)
        connection.request("GET", "/status", headers={KEY_HEADER: secret_from(config.secret_env)})
        reply = connection.getresponse()
        answer = json.loads(reply.read())
        connection.close()
        if reply.status == http.client.OK:
            return str(answer["state"])
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException) as error:
        raise ServiceUnavailableError(f"{where} does not answer: {error or type(error).__name__}") from error
    raise ServiceUnavailableError(f"{where} refuses: {answer.get('detail', reply.status)}")


def _connection(host: str, config: ServiceConfig) -> http.client.HTTPConnection:
    """To a service of these settings, which has this very certificate, whatever name it is for."""
    if config.tls_cert is None:
        return http.client.HTTPConnection(host, config.port, timeout=_LONGEST_S)
    context = ssl.create_default_context(cafile=str(config.tls_cert))
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
    context.check_hostname = False
    return http.client.HTTPSConnection(host, config.port, timeout=_LONGEST_S, context=context)
