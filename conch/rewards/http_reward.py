"""A reward that an HTTP endpoint gives as JSON."""

from __future__ import annotations

import ssl

from conch.config import RewardConfig, TlsConfig
from conch.errors import ConfigError
from conch.rewards.headers import secret_headers
from conch.rewards.http_replica import HttpReplica
from conch.rewards.http_url import parse_urls
from conch.rewards.served_reward import ServedReward


class HttpReward(ServedReward):
    """Scores rollouts with what listens at `url`: `http://host:port/path`, or several with a comma between.

    `config.dialect` says what is sent and what comes back; see `HttpReplica`. Everything else (queue,
    retries, deadlines, checks) is as with served reward models.

    Raises:
        ConfigError: `url` is not of that form, a certificate cannot be read, or a secret's variable is not
            set.
    """

    def __init__(self, url: str, config: RewardConfig) -> None:
        if config.secret_env is not None:
            raise ConfigError(
                "`reward.secret_env` is for Triton servers: give an HTTP endpoint its token with "
                "`reward.headers_env.authorization=VARIABLE`"
            )
        urls = parse_urls(url)
        headers, context = secret_headers(config.headers_env), _context(config.tls)
        replicas = [HttpReplica(each, config, headers, context) for each in urls]
        shown = ", ".join(urls)
        super().__init__(shown, f"reward endpoint {shown}", replicas, config)


def _context(tls: TlsConfig) -> ssl.SSLContext:
    """Certificates are always verified: by `tls.ca`, or by the system's authorities."""
    try:
        context = ssl.create_default_context(cafile=None if tls.ca is None else str(tls.ca))
        if tls.cert is not None and tls.key is not None:
            context.load_cert_chain(str(tls.cert), str(tls.key), password=_no_password)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ConfigError(
            f"reward.tls: a certificate or key cannot be read ({error}); give PEM files, the key unencrypted"
        ) from error
    return context


def _no_password() -> str:
    raise ValueError("the key is encrypted")
