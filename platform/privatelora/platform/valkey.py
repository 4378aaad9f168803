"""Valkey: an embedded server from its wheel, and clients of one at a URL (Redis does as well)."""

from __future__ import annotations

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from privatelora.platform.settings import without_password
from privatelora.protocol.errors import ConfigurationError

TIMEOUT_S = 2.0  # of one call: who needs an answer has something else to do when there is none


def connect(url: str) -> Redis:
    """A client that reconnects by itself; raises `ConfigurationError` for a URL that is none.

    A connection that its server has closed is replaced, and the call made again, once.
    """
    try:
        return Redis.from_url(
            url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, retry=Retry(NoBackoff(), 1)
        )
    except ValueError as error:
        raise ConfigurationError(f"valkey_url {without_password(url)} cannot be read ({error})") from None


def check(valkey: Redis, url: str) -> None:
    """Raise `ConfigurationError` if no server answers."""
    try:
        valkey.ping()
    except RedisError as error:
        raise ConfigurationError(
            f"Valkey at {without_password(url)} does not answer ({error}); check PRIVATELORA_VALKEY_URL"
        ) from None
